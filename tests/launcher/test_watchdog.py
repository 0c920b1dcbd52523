"""Workers that hang for good: who is taken for one, and what becomes of it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import loopmux
from launcher.impatient import POLL, SILENCE
from launcher.plankit import lines, make, of, plan, ready, told
from launcher.programs import program, wait_for
from loopmux_launcher import watchdog
from loopmux_launcher.events import (
    Action,
    Began,
    KillProcess,
    Looked,
    ProcessExited,
    StartWorker,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.lifecycle import STOP_GRACE
from loopmux_launcher.plan import Plan

LOOK = watchdog.between()


def looks(core: Plan, count: int, *beating: str, now: float = 0.0, every: float = LOOK) -> list[Action]:
    """What is done about so many looks, the first of them at ``now + every``."""
    found = [core.handle(Looked(frozenset(beating)), now + every * (n + 1)) for n in range(count)]
    return [action for actions in found for action in actions]


def serving(*names: str) -> Plan:
    core = plan(make("m", processes=2, timeout=1000.0))
    core.handle(Began(), 0.0)
    core.handle(Looked(frozenset()), 0.0)
    ready(core, *names)
    return core


def test_a_worker_without_a_sign_of_life_for_a_minute_is_killed_and_starts_again() -> None:
    core = serving("m-1", "m-2")
    assert looks(core, 5, "m-2") == []
    assert of(KillProcess, looks(core, 1, "m-2", now=50.0)) == [KillProcess("m-1")]
    assert told(core.handle(ProcessExited("m-2", -9), 60.0))["m"].detail == (
        "starts again: it gave no sign of life for 60 s (it hangs, or somebody stopped it) and was killed"
    )
    [said] = lines(core.handle(ProcessExited("m-1", -9, ("a last word",)), 60.0), "warning")
    assert said.startswith("it gave no sign of life for 60 s")
    assert said.endswith("starts again in 0.2 s\n    a last word")
    assert [start.name for start in of(StartWorker, core.handle(TimerFired(), 61.0))] == ["m-1", "m-2"]


def test_it_counts_as_one_that_crashed_when_it_was_ready() -> None:
    core = serving("m-1", "m-2")
    looks(core, 6, "m-2")
    core.handle(ProcessExited("m-1", -9), 60.1)
    assert (core.workers["m-1"].backoff.failed_starts, core.workers["m-1"].backoff.streak) == (0, 1)


def test_one_that_does_not_end_by_that_is_killed_once_more_and_not_called_ready() -> None:
    core = serving("m-1", "m-2")
    assert told(looks(core, 6, "m-2"))["m"].workers == 1
    assert of(KillProcess, looks(core, 9, "m-2", now=60.0)) == []
    assert of(KillProcess, core.handle(TimerFired(), 60.0 + STOP_GRACE)) == [KillProcess("m-1")]


def test_one_sign_of_life_is_enough() -> None:
    core = serving("m-1", "m-2")
    for now in (0.0, 60.0, 120.0):
        assert of(KillProcess, looks(core, 5, now=now)) == []
        assert of(KillProcess, looks(core, 1, "m-1", "m-2", now=now + 50.0)) == []


def test_a_launcher_that_was_stopped_itself_takes_nobody_for_silent() -> None:
    core = serving("m-1", "m-2")
    looks(core, 5)
    assert of(KillProcess, looks(core, 1, now=50.0, every=600.0)) == []
    assert of(KillProcess, looks(core, 5, now=650.0)) == []
    assert of(KillProcess, looks(core, 1, now=700.0)) == [KillProcess("m-1"), KillProcess("m-2")]


def test_one_that_loads_or_is_stopping_is_not_watched() -> None:
    core = serving("m-2")
    assert of(KillProcess, looks(core, 20, "m-2")) == []  # it has its start_timeout
    core.handle(StopRequested(patiently=True), 201.0)
    assert of(KillProcess, looks(core, 7, now=200.0)) == []  # it has its time to end what it runs


def test_a_worker_whose_interpreter_stays_locked_is_ended_by_its_launcher(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config, endpoint = home / "llm_backends.yaml", f"ipc://{home}/s/client.ipc"
    config.write_text("models: {echo: {engine: echo, workers: 2}}\n")
    words = ("up", "--config", str(config), "--endpoint", endpoint)
    with program(*words, module="launcher.impatient") as up, loopmux.Client(endpoint) as client:
        up.line("ready after")
        first, second = wait_for(lambda: len(both := up.children("--pulse-fd")) == 2 and both, "both workers")
        began = time.monotonic()
        first.send_signal(signal.SIGUSR2)
        said = up.line("gave no sign of life for")
        assert time.monotonic() - began > SILENCE - 2 * POLL  # its last sign was before, and may have been late
        assert not first.is_running()
        [name] = {f"echo-{n}" for n in (1, 2) if f"echo-{n}: it gave" in said}
        up.line(f"{name}: ready")
        assert client.generate("hello", model="echo").text
        assert second.is_running()
        up.process.terminate()
        assert up.wait() == 0
    assert up.text.count("gave no sign of life") == 1
