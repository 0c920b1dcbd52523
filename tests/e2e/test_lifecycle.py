"""Start, work, die, restart, stop: what is there afterwards and what is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import loopmux
from e2e import stacks
from e2e.conftest import DEMO, ECHO
from loopmux_worker.engine.echo import echo_text, echo_token
from processes import running


def test_the_model_is_loaded_once_over_many_calls(demo_stack: stacks.Stack) -> None:
    with loopmux.Client(demo_stack.endpoint) as client:
        stacks.wait_for(lambda: len(client.status().workers) == 2, "both workers to be known to the broker")
        before = {w.name: (w.pid, w.served) for w in client.status().workers}
        for _ in range(8):
            client.generate("Hello", model="shout", max_new_tokens=4)
        after = {w.name: (w.pid, w.served) for w in client.status().workers}
    assert {n: pid for n, (pid, _) in before.items()} == {n: pid for n, (pid, _) in after.items()}
    assert sum(s for _, s in after.values()) == sum(s for _, s in before.values()) + 8


def test_adapters_answer_side_by_side_from_the_same_processes(demo_stack: stacks.Stack) -> None:
    with loopmux.Client(demo_stack.endpoint) as client:
        plain = client.generate("What is a broker?", model="default", temperature=0).text
        loud = client.generate("What is a broker?", model="shout", temperature=0).text
        assert plain == client.generate("What is a broker?", model="default", temperature=0).text
        assert len(client.status().workers) == 2
    assert loud == loud.upper() != plain
    assert loud.casefold() == plain.casefold()


@pytest.fixture(scope="module")
def struck(home: Path) -> Iterator[stacks.Stack]:
    """A stack whose parts are killed; each test leaves it to bring them back."""
    config = home / "struck.yaml"
    config.write_text(ECHO)
    stack = stacks.start(config, home, folder=home / "struck")
    yield stack
    assert stack.stop() == 0


def test_a_killed_worker_is_started_again_and_others_go_on(struck: stacks.Stack) -> None:
    with loopmux.Client(struck.endpoint) as client:
        victim = next(w for w in client.status().workers if "echo" in w.models)
        psutil.Process(victim.pid).kill()
        assert client.generate("still there?", model="echo").finish_reason == "stop"
        stacks.wait_for(
            lambda: (
                len(ws := [w for w in client.status().workers if "echo" in w.models]) == 2
                and victim.pid not in {w.pid for w in ws}
            ),
            "the worker to be replaced",
        )


@pytest.mark.parametrize("part", ["worker", "broker"])
def test_a_stream_goes_on_when_a_part_of_the_stack_dies(struck: stacks.Stack, part: str) -> None:
    with loopmux.Client(struck.endpoint) as client:
        with client.stream("x", model="slow", max_new_tokens=100) as stream:
            seen = [next(e.text for e in stream if isinstance(e, loopmux.TextDelta))]
            if part == "worker":
                [victim] = [w.pid for w in client.status().workers if "slow" in w.models]
            else:
                victim = client.status().pid
            psutil.Process(victim).kill()
            seen.extend(e.text for e in stream if isinstance(e, loopmux.TextDelta))
        request = bytes.fromhex(stream.request_id)
        assert "".join(seen) == "".join(echo_text(echo_token(request, n)) for n in range(100))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_up_ends(echo_config: Path, home: Path, number: int) -> None:
    stack = stacks.start(echo_config, home, folder=home / f"end{number}")
    family = stack.family()
    assert len(family) == 7  # up, broker and its parent, guard, three workers
    code = stack.stop(number)
    assert code == (-number if number == signal.SIGKILL else 0)
    stacks.wait_for(lambda: not any(map(running, family)), "all to end")
    stacks.wait_for(lambda: not stack.left_behind(), f"files to go: {stack.left_behind()}")


def test_down_stops_what_up_started(echo_config: Path, home: Path) -> None:
    stack = stacks.start(echo_config, home, folder=home / "down")
    family = stack.family()
    done = subprocess.run(
        [sys.executable, "-m", "loopmux", "down", "--endpoint", stack.endpoint], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert stack.process.wait(60) == 0
    assert not any(map(running, family))
    assert stack.left_behind() == []


def test_a_second_up_on_the_same_socket_says_who_holds_it(echo_stack: stacks.Stack, echo_config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loopmux", "up", "--config", str(echo_config), "--endpoint", echo_stack.endpoint],
        capture_output=True,
        text=True,
        timeout=60,
        env=stacks.environment(echo_stack.home),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    pids = {str(p.pid) for p in echo_stack.family()}
    assert any(pid in done.stderr for pid in pids), done.stderr
    with loopmux.Client(echo_stack.endpoint) as client:
        assert client.generate("undisturbed", model="echo").text


def test_a_model_on_demand_tells_what_is_done_for_it_and_goes_when_it_is_idle(home: Path, tmp_path: Path) -> None:
    config = tmp_path / "llm_backends.yaml"
    config.write_text(
        f"""
environments:
  here: {{path: "{stacks.interpreter(tmp_path / "python")}"}}
models:
  default: {{base_model: "{DEMO}/base", environment: here, min: 0, idle_timeout: 2, torch_threads: 1}}
"""
    )
    stack = stacks.start(config, home, folder=home / "cold")
    with loopmux.Client(stack.endpoint) as client:
        assert stack.part("loopmux_worker") == []
        with client.stream("Hello", model="default", max_new_tokens=4) as stream:
            waited = [event for event in stream if isinstance(event, loopmux.Waiting)]
        assert list(dict.fromkeys(event.phase for event in waited)) == ["queued", "building", "loading", "warming"]
        assert stream.result.usage.completion_tokens > 0
        stacks.wait_for(lambda: stack.part("loopmux_worker") == [], "the worker to go")
        stacks.wait_for(lambda: [m.phase for m in client.status().models] == ["idle"], "the model to be idle")
    assert stack.stop() == 0
