"""Every error class, reached through the real stack the way a user reaches it."""

from __future__ import annotations

import http.server
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import zmq

import loopmux
from e2e import stacks
from e2e.conftest import DEMO, ROOT
from loopmux.toolserver import ToolServer
from processes import running

FAILING = """
models:
  echo: {engine: echo}
  broken: {engine: echo, echo: {fail_after: 3}}
"""


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_wrong_requests(echo_stack: stacks.Stack) -> None:
    cases: list[tuple[type[loopmux.LoopmuxError], str, Callable[[loopmux.Client], object]]] = [
        (loopmux.BadRequestError, "temperature: found -1", lambda c: c.generate("x", model="echo", temperature=-1)),
        (loopmux.BadRequestError, "did you mean 'temperature'", lambda c: c.generate("x", temprature=1)),  # type: ignore[call-arg]
        (loopmux.BadRequestError, "UTF-8", lambda c: c.generate("a\udcff", model="echo")),
        (loopmux.BadRequestError, "decode", lambda c: c.generate(b"bytes", model="echo")),  # type: ignore[arg-type]
        (loopmux.BadRequestError, "exactly one of", lambda c: c.generate(model="echo")),
        (loopmux.ModelNotFoundError, "'echo'", lambda c: c.generate("x", model="ecko")),
        (loopmux.AdapterNotFoundError, "nope", lambda c: c.generate("x", model="echo", adapter="nope")),
        (loopmux.PayloadTooLargeError, "4194304", lambda c: c.generate("x" * 5_000_000, model="echo")),
        (loopmux.DeadlineExceededError, "deadline", lambda c: c.generate("x", model="slow", timeout=0.3)),
        (
            loopmux.ToolNotFoundError,
            "subtract",
            lambda c: c.run_tools("x", model="echo", tools=[add], tool_choice="subtract"),
        ),
        (
            loopmux.MaxTurnsError,
            "1",
            lambda c: c.run_tools('!call add {"a": 1, "b": 2}', model="echo", tools=[add], max_turns=1),
        ),
    ]
    with loopmux.Client(echo_stack.endpoint) as client:
        for kind, words, call in cases:
            with pytest.raises(kind) as raised:
                call(client)
            assert words in str(raised.value), f"{kind.__name__}: {raised.value}"
            assert client.generate("and the next one?", model="echo").text, "something else stopped working"


def test_chat_with_an_unknown_model_says_so_before_the_first_question(echo_stack: stacks.Stack) -> None:
    command = [sys.executable, "-m", "loopmux", "chat", "ecko", "--endpoint", echo_stack.endpoint]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "loopmux: model 'ecko' is not known, expected one of echo, slow; did you mean 'echo'?\n"
    known = subprocess.run(
        [*command[:4], "echo", *command[5:]], input="hi\n", capture_output=True, text=True, timeout=60
    )
    assert (known.returncode, bool(known.stdout.strip())) == (0, True)


def test_a_cancelled_stream(echo_stack: stacks.Stack) -> None:
    with loopmux.Client(echo_stack.endpoint) as client, client.stream("x", model="slow") as stream:
        next(iter(stream))
        stream.cancel()
        with pytest.raises(loopmux.CancelledError):
            list(stream)


def test_a_failing_engine_and_a_lost_worker(home: Path, tmp_path: Path) -> None:
    config = tmp_path / "llm_backends.yaml"
    config.write_text(FAILING)
    stack = stacks.start(config, home, folder=home / "failing")
    try:
        with loopmux.Client(stack.endpoint) as client:
            with pytest.raises(loopmux.EngineError) as failed:
                client.generate("x", model="broken", max_new_tokens=10)
            assert len(failed.value.partial_text.split()) == 3
            stack.process.send_signal(signal.SIGSTOP)  # no other one yet
            psutil.Process(next(w.pid for w in client.status().workers if "echo" in w.models)).kill()
            stacks.wait_for(lambda: not any("echo" in w.models for w in client.status().workers), "the loss to be seen")
            with pytest.raises(loopmux.OverloadedError, match="does not wait") as refused:
                client.generate("x", model="echo", wait=False)
            assert refused.value.retry_after
            stack.process.send_signal(signal.SIGCONT)
            assert client.generate("x", model="echo").text
    finally:
        stack.stop()


BROKEN_ADAPTER = """
environments:
  here: {{path: "{python}"}}
models:
  default: {{base_model: "{demo}/base", environment: here, torch_threads: 1}}
  bad: {{base_model: "{demo}/base", adapter_dir: bad, environment: here, torch_threads: 1}}
  shout: {{base_model: "{demo}/base", adapter_dir: "{demo}/adapters/shout", environment: here, torch_threads: 1}}
"""


def test_a_broken_adapter_beside_good_ones(home: Path, tmp_path: Path) -> None:
    """Its files are whole, so only the worker can find out: the tensors are those of another rank."""
    shutil.copytree(DEMO / "adapters" / "tools", tmp_path / "bad")
    described = tmp_path / "bad" / "adapter_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"r": 8}))
    config = tmp_path / "llm_backends.yaml"
    python = stacks.interpreter(tmp_path / "python")
    config.write_text(BROKEN_ADAPTER.format(python=python, demo=DEMO))
    stack = stacks.start(config, home, folder=home / "left-out")
    family = stack.family()
    try:
        [worker] = stack.part("loopmux_worker")
        assert "default, shout; without bad, which failed" in stack.lines[-1]
        [said] = [line for line in stack.lines if "goes on without bad" in line]
        assert f"{tmp_path}/bad: the tensor" in said
        with loopmux.Client(stack.endpoint) as client:
            with pytest.raises(loopmux.EngineError, match=r"model 'bad' failed to start: .*expected \(8, ") as failed:
                client.generate("x", model="bad", timeout=20)
            assert failed.value.model == "bad"
            assert not failed.value.retryable
            with pytest.raises(loopmux.AdapterNotFoundError, match=r"loaded are: shout; 'bad' failed: .*the tensor"):
                client.generate("x", model="default", adapter="bad", timeout=20)
            plain = client.generate("What is a broker?", model="default", temperature=0).text
            loud = client.generate("What is a broker?", model="shout", temperature=0).text
            assert loud == loud.upper() != plain
            models = {model.id: model for model in client.status().models}
            assert {name: model.phase for name, model in models.items()} == {
                "bad": "failed", "default": "ready", "shout": "ready"
            }  # fmt: skip
            assert "expected (8, " in models["bad"].detail
        shown = subprocess.run(
            [sys.executable, "-m", "loopmux", "models", "--endpoint", stack.endpoint], capture_output=True, text=True
        )
        [row] = [line for line in shown.stdout.splitlines() if line.startswith("bad ")]
        assert row.split()[1:3] == ["failed", "0"]
        assert "expected (8, " in row
        assert stack.part("loopmux_worker") == [worker]  # it was not started again
    finally:
        assert stack.stop() == 0
    stacks.wait_for(lambda: not any(map(running, family)), "all to end")
    assert stack.left_behind() == []


TIGHT = """
environments:
  tight: {{path: "{python}"}}
models:
  echo: {{engine: echo}}
  default: {{base_model: "{demo}/base", environment: tight, torch_threads: 1}}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts from what /proc tells")
def test_a_worker_that_runs_out_of_memory_while_it_starts(home: Path, tmp_path: Path) -> None:
    """An interpreter whose workers get less memory than their libraries need; its probe gets all there is.

    What else of a worker is too large for the memory, and what is said of it then, is tested beside the worker.
    """
    python = stacks.interpreter(tmp_path / "python", f'"{ROOT / "tests" / "tightmemory.py"}" bare')
    config = tmp_path / "llm_backends.yaml"
    config.write_text(TIGHT.format(python=python, demo=DEMO))
    stack = stacks.start(config, home, folder=home / "tight")
    try:
        assert "echo; without default, which failed" in stack.lines[-1]
        said = "\n".join(stack.lines)
        assert "default-1: out of memory while torch and transformers were imported" in said
        with loopmux.Client(stack.endpoint) as client:
            with pytest.raises(loopmux.EngineError, match=r"out of memory while .* raise the limit"):
                client.generate("x", model="default", timeout=20)
            assert client.generate("x", model="echo").text
        assert len([line for line in stack.lines if "starting, pid" in line and "default" in line]) == 1
        assert "Traceback" not in "\n".join(stack.lines)
    finally:
        assert stack.stop() == 0


def test_no_broker_a_lost_broker_and_something_else(echo_config: Path, home: Path, tmp_path: Path) -> None:
    with loopmux.Client(f"ipc://{tmp_path}/none", connect_timeout=0.3) as client:
        with pytest.raises(loopmux.ConnectionLostError, match="loopmux up"):
            client.generate("x")
    with pytest.raises(loopmux.ConfigError, match="tcp://host:port"):
        loopmux.Client("http://localhost")

    stack = stacks.start(echo_config, home, folder=home / "lost")
    try:
        with (
            loopmux.Client(stack.endpoint) as client,
            client.stream("x", model="slow", max_new_tokens=2_000, timeout=5) as stream,
        ):
            seen = [next(e.text for e in stream if isinstance(e, loopmux.TextDelta))]
            for process in stack.family():  # nobody is left to start another broker, which would go on with it
                process.kill()
            with pytest.raises(loopmux.DeadlineExceededError) as lost:
                seen.extend(e.text for e in stream if isinstance(e, loopmux.TextDelta))
            assert lost.value.partial_text == "".join(seen)
    finally:
        assert stack.stop() == -signal.SIGKILL


def test_a_peer_that_is_no_broker(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/other"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as other:
        other.bind(endpoint)
        with loopmux.Client(endpoint, connect_timeout=1.0) as client:
            with pytest.raises(loopmux.ConnectionLostError, match="no broker answers"):
                client.generate("x")


def test_a_tool_server_that_refuses_the_token() -> None:
    class Locked(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(loopmux.AuthError, match="token"):
            ToolServer(f"http://127.0.0.1:{server.server_port}", token="wrong").tools()
        server.shutdown()


def test_a_busy_socket_names_its_holder(echo_stack: stacks.Stack) -> None:
    holder = echo_stack.process  # the sockets belong to the launcher, and outlive its broker
    done = subprocess.run(
        [sys.executable, "-m", "loopmux_broker", "--endpoint", echo_stack.endpoint],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert str(holder.pid) in done.stderr
    assert "Traceback" not in done.stderr
    assert psutil.pid_exists(holder.pid)
