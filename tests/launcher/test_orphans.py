"""kill -9 of any part of the stack, and what ``ps`` shows afterwards. Each worker has a child, as some engines do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import loopmux
from e2e import stacks
from launcher.programs import Program, program, wait_for

WITH_CHILD = (
    """-c 'import subprocess, sys; subprocess.Popen(["sleep", "1000"]); """
    """from loopmux_worker.__main__ import main; sys.exit(main())\'"""
)
PARTS = {"loopmux_broker": "broker", "loopmux_launcher": "launcher", "--spec": "worker", "1000": "child"}


@pytest.fixture
def up(home: Path) -> Iterator[tuple[Program, loopmux.Client]]:
    python = stacks.interpreter(home / "python", WITH_CHILD)
    config = home / "llm_backends.yaml"
    config.write_text(
        f"environments: {{here: {{path: {python}}}}}\n"
        "models: {echo: {engine: echo, environment: here, workers: 2}}\n"
    )
    endpoint = f"ipc://{home}/s/client.ipc"
    with program("up", "--config", str(config), "--endpoint", endpoint) as one, loopmux.Client(endpoint) as client:
        one.line("ready after")
        wait_for(lambda: len(client.status().workers) == 2, "both workers to have joined the broker")
        yield one, client


def ours(home: Path) -> dict[int, str]:
    """All processes of this test's stack that ``ps`` shows: number to part."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("XDG_STATE_HOME", "").startswith(str(home)) and process.status() != "zombie":
                words = process.cmdline()
                found[process.pid] = next((part for word, part in PARTS.items() if word in words), "guard")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


WHOLE = Counter({"launcher": 1, "broker": 2, "worker": 2, "child": 2, "guard": 1})
"""The broker that serves has a parent of its kind."""


def kill(pid: int) -> None:
    psutil.Process(pid).kill()


def test_a_killed_launcher_leaves_nothing(up: tuple[Program, loopmux.Client], home: Path) -> None:
    assert Counter(ours(home).values()) == WHOLE
    up[0].process.kill()
    wait_for(lambda: not ours(home), "everything to end")


def test_a_killed_launcher_and_workers_leave_nothing(up: tuple[Program, loopmux.Client], home: Path) -> None:
    for pid in (up[0].process.pid, *(w.pid for w in up[1].status().workers)):
        kill(pid)
    wait_for(lambda: not ours(home), "everything to end")


def test_a_killed_broker_is_replaced_and_nothing_else(up: tuple[Program, loopmux.Client], home: Path) -> None:
    launcher, client = up
    wait_for(lambda: client.status().uptime > 1.0, "a broker that has served")
    before = ours(home)
    kill(client.status().pid)
    launcher.line("broker: ended by SIGKILL; another one serves at once")
    wait_for(lambda: len(client.status().workers) == 2, "the workers to be back")
    after = ours(home)
    assert Counter(after.values()) == WHOLE
    assert [part for pid, part in before.items() if pid not in after] == ["broker"]
    stop(launcher, home)


def test_a_killed_parent_of_the_broker_is_replaced_with_it(up: tuple[Program, loopmux.Client], home: Path) -> None:
    launcher, client = up
    before = ours(home)
    kill(psutil.Process(client.status().pid).ppid())
    launcher.line("broker: ready in")
    wait_for(lambda: len(client.status().workers) == 2, "the workers to be back")
    after = ours(home)
    assert Counter(after.values()) == WHOLE
    assert [part for pid, part in before.items() if pid not in after] == ["broker", "broker"]
    stop(launcher, home)


def test_a_killed_worker_is_replaced_with_its_child(up: tuple[Program, loopmux.Client], home: Path) -> None:
    launcher, client = up
    before = ours(home)
    kill(client.status().workers[0].pid)
    launcher.line("ready in")
    after = ours(home)
    assert Counter(after.values()) == WHOLE
    assert sorted(part for pid, part in before.items() if pid not in after) == ["child", "worker"]
    stop(launcher, home)


def test_a_killed_child_of_a_worker_is_that_workers_own_affair(up: tuple[Program, loopmux.Client], home: Path) -> None:
    launcher, client = up
    before = ours(home)
    kill(next(pid for pid, part in before.items() if part == "child"))
    assert client.generate("hello", model="echo").text
    wait_for(lambda: Counter(ours(home).values()) == WHOLE - Counter(["child"]), "the child to be gone")
    stop(launcher, home)


def test_a_killed_guard_is_no_trouble(up: tuple[Program, loopmux.Client], home: Path) -> None:
    launcher, client = up
    kill(next(pid for pid, part in ours(home).items() if part == "guard"))
    kill(client.status().workers[0].pid)
    launcher.line("ready in")
    assert client.generate("hello", model="echo").text
    stop(launcher, home)


def stop(launcher: Program, home: Path) -> None:
    launcher.process.terminate()
    assert launcher.wait() == 0
    wait_for(lambda: not ours(home), "the children of workers, which nobody waits for, to end")
