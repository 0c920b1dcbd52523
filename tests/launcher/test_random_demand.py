"""The launcher's core against random demand: a small broker and processes that take their time, on one clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from launcher.plankit import make
from loopmux.messages import Demand, WorkerLoad
from loopmux_launcher.events import (
    Action,
    Announce,
    Began,
    DemandReported,
    Event,
    ProcessExited,
    ProcessReported,
    StartWorker,
    StopProcess,
    TimerFired,
)
from loopmux_launcher.groups import Group
from loopmux_launcher.memory import overdrawn, stay
from loopmux_launcher.plan import Plan

STEP = 0.25
"""Seconds of a turn of the little world."""
SLOTS = 2


@dataclass
class Worker:
    """A process: it loads, serves up to ``SLOTS`` requests, and leaves when it is asked to."""

    name: str
    model: str
    started: float
    ready_at: float
    ready: bool = False
    leaves_at: float | None = None
    ends: list[float] = field(default_factory=list)
    moved: float = 0.0


class World:
    """One host and its broker. ``arrivals`` are (second, model, seconds of work)."""

    def __init__(self, groups: list[Group], budget: float | None, loading: float) -> None:
        self.groups = {group.name: group for group in groups}
        self.budget, self.loading = budget, loading
        self.core = Plan(groups, with_broker=False, budget=budget)
        self.now = 0.0
        self.workers: dict[str, Worker] = {}
        self.queues: dict[str, list[float]] = {group.name: [] for group in groups}
        self.starts: Counter[str] = Counter()
        self.served = 0
        self.handle(Began())

    def handle(self, event: Event) -> None:
        for action in self.core.handle(event, self.now):
            self.do(action)

    def do(self, action: Action) -> None:
        match action:
            case StartWorker(name):
                model = name.rpartition("-")[0]
                assert name not in self.workers
                self.starts[model] += 1
                self.workers[name] = Worker(name, model, self.now, self.now + self.loading)
                self.within_limits()
            case StopProcess(name):
                worker = self.workers[name]
                assert worker.ready, "what was started is allowed to become ready"
                worker.leaves_at = self.now + STEP
            case Announce(name, text) if "makes room" in text:
                worker = self.workers[name]
                assert not worker.ends, "who works is left alone"
                assert self.now - worker.ready_at >= stay(self.loading) - STEP, "two models that take turns do not flap"
            case Announce(name, text) if "not enough" in text:
                worker = self.workers[name]
                stayed = self.now - worker.ready_at
                assert stayed >= self.groups[worker.model].idle_timeout - STEP, "what was started is kept for a while"

    def within_limits(self) -> None:
        running = Counter(worker.model for worker in self.workers.values())
        for name, count in running.items():
            assert count <= self.groups[name].limit
        taken = sum(self.groups[name].memory * count for name, count in running.items())
        assert self.budget is None or taken <= self.budget + 1e-6

    def report(self) -> None:
        there = [w for w in self.workers.values() if w.ready and w.leaves_at is None]
        loads = tuple(WorkerLoad(w.name, SLOTS, len(w.ends), 0.0 if w.ends else self.now - w.moved) for w in there)
        self.handle(DemandReported(Demand({m: len(q) for m, q in self.queues.items() if q}, loads)))

    def turn(self) -> None:
        self.now += STEP
        for worker in list(self.workers.values()):
            done = [end for end in worker.ends if end <= self.now]
            self.served += len(done)
            worker.ends = [end for end in worker.ends if end > self.now]
            if done:
                worker.moved = self.now
            if worker.leaves_at is not None and worker.leaves_at <= self.now:
                self.queues[worker.model] += [end - self.now for end in worker.ends]  # handed over
                del self.workers[worker.name]
                self.handle(ProcessExited(worker.name, 0))
            elif not worker.ready and worker.ready_at <= self.now:
                worker.ready, worker.moved = True, self.now
                self.handle(ProcessReported(worker.name, "ready"))
        for worker in self.workers.values():
            queue = self.queues[worker.model]
            while queue and worker.ready and worker.leaves_at is None and len(worker.ends) < SLOTS:
                worker.ends.append(self.now + queue.pop(0))
                worker.moved = self.now
        due = self.core.next_timer()
        if due is not None and due <= self.now:
            self.handle(TimerFired())
        if self.now % 1.0 == 0.0:
            self.report()


def arrive(world: World, model: str, seconds: float) -> None:
    """A request comes in, and the launcher hears of it at once where its model has no worker."""
    cold = not any(w.model == model and w.ready and w.leaves_at is None for w in world.workers.values())
    world.queues[model].append(seconds)
    if cold and len(world.queues[model]) == 1:
        world.report()


SIZES = st.tuples(
    st.integers(0, 2), st.integers(1, 4), st.sampled_from((0.0, 0.5, 1.0, 3.0)), st.sampled_from((1.0, 5.0, 30.0))
)
ARRIVALS = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 3), st.sampled_from((0.25, 2.0, 15.0))), max_size=60)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    budget=st.one_of(st.none(), st.sampled_from((1.0, 3.0, 4.0, 7.0))),
    loading=st.sampled_from((0.25, 2.0, 20.0)),
    arrivals=ARRIVALS,
)
def test_never_too_much_and_everybody_is_served(
    sizes: list[tuple[int, int, float, float]], budget: float | None, loading: float,
    arrivals: list[tuple[int, int, float]],
) -> None:  # fmt: skip
    groups = [
        make(f"m{i}", processes=fewest, most=most, memory=memory, idle_timeout=idle)
        for i, (fewest, most, memory, idle) in enumerate(sizes)
    ]
    assume(budget is None or overdrawn(groups, budget) is None)
    world = World(groups, budget, loading)
    for second, which, seconds in sorted(arrivals):
        while world.now < second:
            world.turn()
        arrive(world, f"m{which % len(groups)}", seconds)
    # each waits at most for all others, one after the other, and a start and a stay before each of them
    while world.served < len(arrivals):
        world.turn()
        assert world.now < 120 + len(arrivals) * (15 + 2 * loading + 10), f"{world.queues} are not served"
    for _ in range(int(200 / STEP)):
        world.turn()
    running = Counter(worker.model for worker in world.workers.values())
    assert running == Counter({g.name: g.fewest for g in groups if g.fewest}), "at rest there are the fewest"
    asked = Counter(f"m{which % len(groups)}" for _, which, _ in arrivals)
    for group in groups:
        assert world.starts[group.name] <= group.fewest + asked[group.name], "one start serves one request at least"


@settings(max_examples=50, deadline=None)
@given(clients=st.integers(1, 12), seconds=st.sampled_from((0.5, 1.0, 5.0)), loading=st.sampled_from((0.25, 5.0)))
def test_steady_demand_settles_on_one_number_of_processes(clients: int, seconds: float, loading: float) -> None:
    """So many clients that ask again as soon as they are answered, for five minutes: what was started stays."""
    world = World([make("m", processes=0, most=4, idle_timeout=20.0)], None, loading)
    asked, changes = 0, 0
    while world.now < 300.0:
        while asked < world.served + clients:
            arrive(world, "m", seconds)
            asked += 1
        before = set(world.workers)
        world.turn()
        changes += world.now > 120 and set(world.workers) != before
    assert changes == 0
