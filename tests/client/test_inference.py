"""The helpers of the replaced system, against a real private stack with the echo engine, and against the tiny model."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopmux import InferenceConfig, ToolEnabledInferenceConfig, run_inference, run_inference_with_tools, server
from loopmux.errors import BadRequestError, ConnectionLostError, ModelNotFoundError, ProtocolError
from toolhttp import Server, serving

CONFIG = f"""
environments:
  default: {{path: {sys.prefix}}}
models:
  default: {{engine: echo}}
"""


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="lmx-"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNTIME_DIR", "DATA_HOME", "CONFIG_HOME", "STATE_HOME"):
            (folder / name).mkdir()
            patch.setenv(f"XDG_{name}", str(folder / name))
        patch.delenv("LOOPMUX_ENDPOINT", raising=False)
        (folder / "c.yaml").write_text(CONFIG)
        patch.setenv("LOOPMUX_CONFIG", str(folder / "c.yaml"))
        yield folder
        server.shutdown_all()
    shutil.rmtree(folder)


def tool(name: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    return {"name": name, "description": f"{name}.", "parameters": schema} | more


def act(body: dict[str, Any]) -> tuple[int, Any]:
    if body["args"]["path"] == "missing":
        return 200, {"ok": False, "result": None, "error": "no such file"}
    return 200, {"ok": True, "result": f"{body['name']} {body['args']['path']}", "error": None}


@pytest.fixture
def tools() -> Iterator[Server]:
    listed = [tool("read_file"), tool("write_file"), tool("run_shell"), tool("own"), tool("marked", danger="safe")]
    with serving({"/tools": (200, listed), "/call": act}) as running:
        yield running


def calls(*made: tuple[str, str]) -> str:
    """A prompt that has the echo engine make these calls, all in one turn, and then answer."""
    lines = [f"{name} {json.dumps({'path': path})}" for name, path in made]
    return "!call " + "\n+call ".join(lines) + "\n!say finished"


def run(running: Server, prompt: str, *callbacks: Any, **settings: Any) -> tuple[str, list[dict[str, Any]]]:
    config = ToolEnabledInferenceConfig(prompt, tool_server_url=running.url, tool_server_token="secret", **settings)
    return run_inference_with_tools(config, *callbacks)


def test_clean_text():
    lines: list[str] = []
    assert run_inference(InferenceConfig(prompt="!say Hello there"), lines.append) == "Hello there"
    assert len(run_inference(InferenceConfig("Hello", max_new_tokens=3)).split()) == 3


def test_an_unknown_model():
    with pytest.raises(ModelNotFoundError, match="nobody"):
        run_inference(InferenceConfig("Hello", model_id="nobody"))


def test_tools_run_on_the_server_and_are_logged(tools: Server):
    told: list[Any] = []
    text, log = run(tools, calls(("read_file", "a"), ("read_file", "missing")), lambda *seen: told.append(seen))
    assert text == "finished"
    assert log == [
        {
            "tool": "read_file",
            "args": {"path": "a"},
            "status": "success",
            "result": "read_file a",
            "error": None,
            "iteration": 1,
        },
        {
            "tool": "read_file",
            "args": {"path": "missing"},
            "status": "error",
            "result": None,
            "error": "no such file",
            "iteration": 1,
        },
    ]
    assert sorted(told, key=str) == [
        ("read_file", {"path": "a"}, "read_file a"),
        ("read_file", {"path": "missing"}, "no such file"),
    ]
    assert {seen[2] for seen in tools.seen} == {"secret"}


ALL = (("read_file", "a"), ("write_file", "b"), ("run_shell", "c"), ("own", "d"), ("marked", "e"))


def test_safe_tools_run_by_themselves_and_all_others_are_asked_about(tools: Server):
    asked: list[tuple[str, dict[str, str]]] = []

    def approve(name: str, args: dict[str, str]) -> bool:
        asked.append((name, args))
        return name != "run_shell"

    _, log = run(tools, calls(*ALL), None, approve)
    assert asked == [("write_file", {"path": "b"}), ("run_shell", {"path": "c"}), ("own", {"path": "d"})]
    assert [entry["status"] for entry in log] == ["success", "success", "denied", "success", "success"]
    assert log[2] == {"tool": "run_shell", "args": {"path": "c"}, "status": "denied", "iteration": 1}


def test_safe_tools_are_asked_about_if_so_wanted(tools: Server):
    asked: list[str] = []
    run(tools, calls(*ALL), None, lambda name, _: not asked.append(name), auto_execute_safe_tools=False)
    assert asked == [name for name, _ in ALL]


def test_without_a_callback_everything_runs(tools: Server):
    _, log = run(tools, calls(*ALL))
    assert {entry["status"] for entry in log} == {"success"}


def test_all_denied_ends_the_loop(tools: Server):
    text, log = run(tools, calls(("write_file", "a"), ("own", "b")), None, lambda *_: False)
    assert text != "finished"
    assert [entry["status"] for entry in log] == ["denied", "denied"]
    assert not [seen for seen in tools.seen if seen[1] == "/call"]


def test_a_denied_call_is_told_to_the_model(tools: Server):
    prompt = '!call own {"path": "a"}\n+call read_file {"path": "b"}'  # the echo engine then repeats the results
    text, _ = run(tools, prompt, None, lambda *_: False)
    assert "Denied: the user did not allow this call." in text


def test_iterations_are_limited(tools: Server):
    prompt = "\n".join(f'!call read_file {{"path": "{n}"}}' for n in range(9))
    lines: list[str] = []
    text, log = run(tools, prompt, None, None, lines.append, max_tool_iterations=3)
    assert [entry["iteration"] for entry in log] == [1, 2, 3]
    assert text == ""
    assert lines[-1] == "stopped after 3 tool iterations"


@pytest.mark.parametrize("times", [-1, 2.5, True, None])
def test_a_number_of_iterations_that_is_none(times: Any):
    with pytest.raises(BadRequestError, match=r"^max_tool_iterations: found "):
        run_inference_with_tools(ToolEnabledInferenceConfig(prompt="x", max_tool_iterations=times))


def test_a_system_prompt_and_no_tools(tools: Server):
    assert run(tools, "!say plain", enable_tools=False) == ("plain", [])
    assert tools.seen == []
    assert run(tools, "!say with a system prompt", system_prompt="You are terse.") == ("with a system prompt", [])


def test_schemas_for_a_server_that_lists_nothing():
    with serving({"/tools": (404, b""), "/call": act}) as bare:
        with pytest.raises(ProtocolError, match="schemas="):
            run(bare, "!say x")
        _, log = run(bare, calls(("read_file", "a")), tools=[tool("read_file")])
    assert log[0]["result"] == "read_file a"


def test_functions_of_this_process_need_no_server():
    def shout(path: str) -> str:
        return path.upper()

    config = ToolEnabledInferenceConfig(calls(("shout", "a")), tool_server_url="http://127.0.0.1:1", tools=[shout])
    _, log = run_inference_with_tools(config)
    assert log[0]["result"] == "A"


def test_no_tool_server():
    with pytest.raises(ConnectionLostError, match="is it running"):
        run_inference_with_tools(ToolEnabledInferenceConfig("x", tool_server_url="http://127.0.0.1:1"))


def test_an_adapter_without_its_base():
    with pytest.raises(BadRequestError, match="found no base_model beside it"):
        run_inference(InferenceConfig("x", adapter_dir="/tmp"))


def test_a_model_that_the_configuration_does_not_have(tmp_path: Path):
    import tinymodel  # here: it imports torch

    base = tmp_path / "base"
    tinymodel.write_base(base)
    lines: list[str] = []
    config = InferenceConfig("Hello", base_model=str(base), max_new_tokens=8, temperature=0.0)
    first = run_inference(config, lines.append)
    assert any("loading" in line for line in lines)
    assert run_inference(config) == first
    server.shutdown("default")
