from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loopmux

HEAVY = ("torch", "transformers", "peft", "yaml", "structlog", "asyncio", "mcp", "anyio")


def loaded_after(program: str) -> set[str]:
    code = f"{program}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("program", ["import loopmux", "import loopmux; loopmux.Client(); loopmux.Result"])
def test_the_client_loads_nothing_heavy(program: str) -> None:
    assert not loaded_after(program) & set(HEAVY)


def test_the_sdk_for_mcp_is_loaded_when_a_server_is_opened() -> None:
    assert not loaded_after("import loopmux.mcp; loopmux.mcp.MCPServer('python')") & {"mcp", "anyio"}


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_who_uses_no_tools_does_not_wait_for_what_they_need(tmp_path: Path, kind: str) -> None:
    program = f"""
import asyncio, inspect, sys, loopmux

async def ask():
    client = loopmux.{kind}("ipc://{tmp_path}/nobody", connect_timeout=0.01)
    try:
        answer = client.generate("x")
        await answer
    except loopmux.ConnectionLostError:
        answer = client.close()
        _ = inspect.isawaitable(answer) and await answer

asyncio.run(ask())
assert "loopmux.tools" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_alone_loads_not_even_zmq() -> None:
    assert not loaded_after("import loopmux") & {"zmq", "msgpack"}


def test_every_public_name_is_there() -> None:
    for name in loopmux.__all__:
        assert getattr(loopmux, name) is not None, name
    assert set(loopmux.__all__) <= set(dir(loopmux))
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        _ = loopmux.Clint  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(loopmux.__file__).read_text())
    seen: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("loopmux"):
            for alias in node.names:
                assert alias.asname == alias.name, f"{alias.name} is not marked as re-exported"
                seen[alias.name] = node.module.removeprefix("loopmux").removeprefix(".")
    modules = {name for name, home in seen.items() if not home}
    assert modules == set(loopmux._MODULES)
    assert {n: h for n, h in seen.items() if h} == loopmux._HOME


def test_the_error_family_is_public() -> None:
    from loopmux import errors

    assert {cls.__name__ for cls in errors.BY_CODE.values()} <= set(loopmux.__all__)
