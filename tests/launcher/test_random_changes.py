"""The launcher's core against all that may go wrong while its configuration changes: a small host on one clock.

Processes crash, hang, never get ready or leave late; builds fail; the configuration is another one every few seconds.
Afterwards nothing goes wrong any more, and what runs is what the last configuration asks for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count

import pytest

from launcher.plankit import make
from loopmux.cadence import LEAVE_PATIENTLY
from loopmux.messages import Demand, WorkerLoad, WorkerSpec
from loopmux_launcher import watchdog
from loopmux_launcher.backoff import CRASHES, LONGEST_DELAY, WINDOW
from loopmux_launcher.events import (
    Action,
    Began,
    BuildEnvironment,
    ConfigurationChanged,
    ConfigurationRefused,
    DemandReported,
    EnvironmentFailed,
    EnvironmentReady,
    Event,
    Finish,
    KillProcess,
    Looked,
    ProcessExited,
    ProcessReported,
    ReportPhase,
    StartBroker,
    StartWorker,
    StopBuild,
    StopProcess,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.groups import Group
from loopmux_launcher.lifecycle import STOP_GRACE
from loopmux_launcher.memory import overdrawn
from loopmux_launcher.plan import BROKER, Plan

QUIET = LEAVE_PATIENTLY + LONGEST_DELAY + 4 * watchdog.SILENCE
"""Seconds in which all that went wrong has ended: what hangs is killed, what was put off starts, what is idle stops."""


@dataclass(eq=False)
class Running:
    """A process that was started: with what, and what it does."""

    spec: WorkerSpec | None = None
    python: str | None = None
    memory: float = 0.0
    ready: bool = False
    silent: bool = False
    stopping: bool = False


class Host:
    """One host, whose dice decide what goes wrong as long as it is ``faulty``."""

    def __init__(self, seed: int) -> None:
        self.dice, self.now, self.faulty, self.finished = random.Random(seed), 0.0, True, list[int]()
        self.steady = seed % 2 == 0
        """The limits of memory never change, so that they hold with what is still leaving."""
        self.broker_died = 0.0
        self.running: dict[str, Running] = {}
        self.builds: dict[str, object] = {}
        self.versions = {"e": 1, "f": 1}
        self.told: dict[str, str] = {}
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self.budget: float | None = None
        self.memory: dict[str, float] = {}
        self.limits()
        self.groups = self.configuration()
        self.core = Plan(self.groups, with_broker=True, budget=self.budget)
        self.handle(Began())

    def chance(self, share: float) -> bool:
        return self.faulty and self.dice.random() < share

    def limits(self) -> None:
        self.budget = self.dice.choice([None, 4.0, 6.0])
        self.memory = {name: self.dice.choice([0.0, 1.0, 2.0]) for name in "abcz"}

    def configuration(self) -> list[Group]:
        """One that would be accepted, and always has one model on demand: without one all may fail for good."""
        while True:
            names = self.dice.sample(["a", "b", "c"], self.dice.randint(0, 3))
            groups = [self.group(name, self.dice.randint(0, 2)) for name in names] + [self.group("z", 0)]
            if self.budget is None or overdrawn(groups, self.budget) is None:
                return groups

    def group(self, name: str, fewest: int) -> Group:
        dice = self.dice
        group = make(name, environment=dice.choice([None, "e", "f"]), processes=fewest, most=dice.randint(1, 3),
                     slots=dice.choice([None, 7]), memory=self.memory[name], idle_timeout=20.0,
                     timeout=30.0)  # fmt: skip
        return replace(group, spec=replace(group.spec, base_model=dice.choice(["/x", "/x", "/y"])))

    # --- what the core does

    def handle(self, event: Event) -> None:
        for action in self.core.handle(event, self.now):
            assert not self.finished, "after the last word there is none"
            self.do(action)

    def do(self, action: Action) -> None:
        match action:
            case StartBroker():
                self.start(BROKER, Running())
            case StartWorker(name, environment, python, spec):
                assert (python is None) == (environment is None)
                crew = self.core.fleet.crew_of(name)
                assert crew is not None, "nothing is started that the configuration does not have"
                self.start(name, Running(spec, python, crew.group.memory))
                there = sum(other in crew.processes for other in self.running)
                assert there <= crew.group.limit, "no more than may run"
                assert self.within_budget(with_leaving=self.steady), "the memory is enough"
            case StopProcess(name, patiently):
                assert name in self.running, "what is stopped runs"
                self.running[name].stopping = True
                slow = 3 * STOP_GRACE if self.chance(0.2) else STOP_GRACE / 2
                self.exit(name, LEAVE_PATIENTLY / 2 if patiently and self.chance(0.5) else slow, 0)
            case KillProcess(name):
                assert name in self.running, "what is killed runs"
                self.exit(name, 0.01, -9)
            case BuildEnvironment(name):
                assert name not in self.builds, "one builds"
                self.build(name)
            case StopBuild(name):
                build = self.builds[name]
                self.after(self.dice.random(), lambda: self.built(name, build, ""))
            case ReportPhase(told):
                self.told.pop(told.model, None)
                if not told.removed:
                    self.told[told.model] = told.phase
            case Finish(code):
                assert not self.running, "nothing is left behind"
                assert not self.builds
                self.finished.append(code)

    def within_budget(self, *, with_leaving: bool) -> bool:
        taken = sum(one.memory for one in self.running.values() if with_leaving or not one.stopping)
        return self.budget is None or taken <= self.budget

    def start(self, name: str, process: Running) -> None:
        assert name not in self.running, "one process of a name"
        self.running[name] = process
        if self.chance(0.1) and name != BROKER:
            self.exit(name, self.dice.random(), self.dice.choice([1, 78, -11]))
        elif name == BROKER or not self.chance(0.1):  # else it never gets ready, and never leaves by itself
            self.after(self.dice.uniform(0.1, 3.0), lambda: self.got_ready(name, process))

    def got_ready(self, name: str, process: Running) -> None:
        if self.running.get(name) is process and not process.stopping:
            process.ready, process.silent = True, self.chance(0.1)
            self.handle(ProcessReported(name, "ready"))

    def exit(self, name: str, seconds: float, code: int) -> None:
        process = self.running[name]

        def ended() -> None:
            if self.running.get(name) is process:
                del self.running[name]
                self.handle(ProcessExited(name, code, draw=self.dice.random()))

        self.after(seconds, ended)

    def build(self, name: str) -> None:
        build = self.builds[name] = object()
        python = "" if self.chance(0.2) else f"/{name}/{self.versions[name]}"
        self.after(self.dice.uniform(0.1, 8.0), lambda: self.built(name, build, python))

    def built(self, name: str, build: object, python: str) -> None:
        if self.builds.get(name) is build:
            del self.builds[name]
            self.handle(EnvironmentReady(name, python, "") if python else EnvironmentFailed(name, "no such package"))

    # --- time

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heappush(self._coming, (self.now + seconds, next(self._number), what))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while not self.finished:
            timer, due = self.core.next_timer(), self._coming[0][0] if self._coming else math.inf
            if min(due, math.inf if timer is None else timer) > end:
                break
            if timer is not None and timer <= due:
                self.now = max(self.now, timer)
                self.handle(TimerFired())
                after = self.core.next_timer()
                assert after is None or after > self.now, "a timer that has fired is not due any more"
            else:
                self.now, _, what = heappop(self._coming)
                what()
        self.now = end

    def every(self, seconds: float, what: Callable[[], None]) -> None:
        def again() -> None:
            what()
            self.after(seconds, again)

        self.after(seconds, again)

    def look(self) -> None:
        self.handle(Looked(frozenset(name for name, one in self.running.items() if not one.silent)))

    def report(self) -> None:
        """What a broker says: who waits, and how busy whom it knows is."""
        queued = {name: 2 for name in "abcz" if self.chance(0.4)}
        there = [name for name, one in self.running.items() if one.ready and not one.stopping and name != BROKER]
        busy = [name for name in there if self.chance(0.5)]
        idle = {name: 0.0 if name in busy else 2.0 if self.chance(0.9) else 25.0 for name in there}
        loads = tuple(WorkerLoad(name, 4, int(name in busy), idle[name]) for name in there)
        self.handle(DemandReported(Demand(queued, loads)))

    def crash(self) -> None:
        if not self.running or not self.chance(0.3):
            return
        name = self.dice.choice([*self.running])
        if name == BROKER:
            if self.now - self.broker_died < WINDOW / (CRASHES - 1):
                return  # a crash loop of the broker ends everything
            self.broker_died = self.now
        self.exit(name, 0.0, self.dice.choice([0, 1, -9, -11]))

    # --- changes

    def change(self) -> None:
        if self.dice.random() < 0.15:
            self.handle(ConfigurationRefused("it is wrong"))
            return
        if not self.steady:
            self.limits()
        self.groups = self.configuration()
        self.reconfigure(retry=self.dice.random() < 0.3)

    def reconfigure(self, *, retry: bool) -> None:
        changed = frozenset(name for name in self.versions if self.dice.random() < 0.2)
        for name in changed:
            self.versions[name] += 1
        for name, process in self.running.items():
            if any(name in group.worker_names() for group in self.groups):
                process.memory = self.memory[name[0]]
        self.handle(ConfigurationChanged(tuple(self.groups), changed, self.budget, retry))
        assert self.within_budget(with_leaving=False), "a limit applies at once"


def busy(seed: int, changes: int) -> Host:
    """A host on which much went wrong, and still does."""
    host = Host(seed)
    host.every(watchdog.between(), host.look)
    host.every(1.0, host.report)
    host.every(2.0, host.crash)
    for _ in range(changes):
        host.run(host.dice.expovariate(0.1))
        host.change()
    return host


@pytest.mark.parametrize("seed", range(40))
def test_whatever_went_wrong_in_the_end_that_runs_which_is_asked_for(seed: int) -> None:
    host = busy(seed, 25)
    host.faulty = False
    host.run(60.0)  # what the dice have decided comes to pass
    host.reconfigure(retry=True)  # what was given up is repaired
    host.run(QUIET)
    groups = host.core.fleet.groups
    assert [group.model_ids for group in groups] == [group.model_ids for group in host.groups]
    expected: dict[str, tuple[WorkerSpec | None, str | None]] = {BROKER: (None, None)}
    for group in groups:
        python = group.environment and f"/{group.environment}/{host.versions[group.environment]}"
        found = [name for name in group.worker_names() if name in host.running]
        assert len(found) == group.fewest
        expected |= {name: (replace(group.spec, name=name), python) for name in found}
    assert {name: (one.spec, one.python) for name, one in host.running.items()} == expected
    assert all(one.ready and not one.stopping for one in host.running.values())
    assert host.told == {m: "ready" if group.fewest else "idle" for group in groups for m in group.model_ids}
    assert host.core.next_timer() is None
    host.handle(StopRequested())
    host.run(3 * STOP_GRACE)
    assert host.finished == [0]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_goes_wrong_nothing_is_left_behind(seed: int) -> None:
    host = busy(seed, seed % 5)
    host.handle(StopRequested(patiently=host.dice.random() < 0.5))
    host.run(2.0)
    if not host.finished and host.dice.random() < 0.5:
        host.handle(StopRequested(at_once=True))
        host.run(STOP_GRACE)
        assert not [name for name in host.running if name != BROKER], "they were killed"
    host.run(LEAVE_PATIENTLY + 3 * STOP_GRACE)
    assert host.finished == [0]
