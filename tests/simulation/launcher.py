"""A launcher process: the real plan and link cores; the processes that it starts are simulated ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmux import wire
from loopmux.messages import Register, WorkerSpec
from loopmux_launcher import events
from loopmux_launcher.adapters import Added, extended
from loopmux_launcher.groups import Group
from loopmux_launcher.lifecycle import State
from loopmux_launcher.link import Link, Refused
from loopmux_launcher.plan import Plan
from simulation.process import Endpoint
from simulation.worker import WorkerProcess

if TYPE_CHECKING:
    from simulation.world import World

_LOADING = (0.1, 1.0)
_CRASHED = 1
FULL = "the disk is full"
_FULL = 0.05
"""The chance that the file of adapters cannot be written."""


class _Starting:
    """A process that does not serve yet. ``fails``: it never will."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.over = False


class LauncherProcess(Endpoint):
    """One launcher, and as many successors as it needs."""

    from_worker = True

    def __init__(self, world: World, groups: list[Group]) -> None:
        super().__init__(world, "launcher")
        self.groups = groups
        self.saved: tuple[Added, ...] = ()
        """What its file of adapters has; it outlives the process."""
        self.children: dict[str, WorkerProcess | _Starting] = {}
        self.fail_starts = 0.0
        """The chance that a start fails."""
        self.began: dict[str, list[float]] = {}
        self.wake_by(lambda: self.plan.next_timer(), lambda: self.handle(events.TimerFired()))
        self.wake_by(lambda: self.link.next_timer() + 0.001, self._beat)
        self.start()

    def start(self) -> None:
        self.alive, self.frozen_since, self.line, self.born = True, None, None, self.clock.now
        groups, idle = extended(self.groups, self.saved)
        self.plan = Plan(groups, with_broker=False, added=self.saved, idle=idle)
        self.link = Link(Register("launcher", "host", self.clock.random.randbytes(16), wire.VERSIONS), stay=10.0)
        self.connect()
        self.handle(events.Began())

    def die(self, news: float = 0.0) -> None:
        """kill -9; its workers die with it."""
        if not self.alive:
            return
        super().die(news)
        children, self.children = list(self.children.values()), {}
        for child in children:
            if isinstance(child, WorkerProcess):
                child.die(news)
            else:
                child.over = True

    @property
    def workers(self) -> list[WorkerProcess]:
        return [c for c in self.children.values() if isinstance(c, WorkerProcess) and c.alive]

    # --- the wire

    def connected(self) -> None:
        if self.watches:
            self.link.introduce()
            self.look()

    def disconnected(self) -> None:
        if self.watches:
            self.link.disconnected()
            self.look()

    def _beat(self) -> None:
        for message in self.link.due(self.clock.now):
            self._tell(message)

    def _tell(self, message: wire.Message) -> None:
        if not self.put(message, lasting=False):
            self.link.lost()

    def receive(self, data: bytes) -> None:
        news = self.link.received(wire.from_bytes(data), self.clock.now)
        if isinstance(news, Refused):
            self.world.story.tell(self, f"was refused: {news.reason}")
            self.die()
            self.clock.after(1.0, self.start)
        elif news is not None:
            self.handle(news)
        self.look()

    # --- processes

    def handle(self, event: events.Event) -> None:
        for action in self.plan.handle(event, self.clock.now):
            match action:
                case events.StartWorker(name=name, spec=spec):
                    self._start_child(name, spec)
                case events.StopProcess(name):
                    self._stop_child(name)
                case events.KillProcess(name):
                    self._kill_child(name)
                case events.ReportPhase(catalogue):
                    for message in self.link.report(catalogue):
                        self._tell(message)
                case events.SaveAdapters(id_, added):
                    self._save(id_, added)
                case events.AnswerOrder(id_, trouble):
                    for message in self.link.answer(id_, trouble):
                        self._tell(message)
                case events.Announce(subject, text, level) if level != "progress":
                    self.world.story.tell(self, f"{subject}: {text}")
                case events.Finish():
                    self._finished()
                    return
        self.look()

    def _save(self, id_: bytes, added: tuple[Added, ...]) -> None:
        full = self.clock.random.random() < _FULL
        if not full:
            self.saved = added
        self.handle(events.AdaptersSaved(id_, FULL if full else ""))

    def _start_child(self, name: str, spec: WorkerSpec) -> None:
        self.world.promise.launches.started(self, name)
        dice = self.clock.random
        child = self.children[name] = _Starting(dice.random() < self.fail_starts)

        def up() -> None:
            if child.over or not self.alive:
                return
            if child.fails:
                self.child_ended(name, child, _CRASHED)
            else:
                self.children[name] = WorkerProcess(self.world, self, spec)
                self.world.promise.launches.ready(name)
                self.handle(events.ProcessReported(name, "ready"))

        self.later(dice.uniform(*_LOADING), up)

    def _stop_child(self, name: str) -> None:
        child = self.children.get(name)
        if isinstance(child, WorkerProcess):
            child.stop()
        elif child is not None:
            self.later(0.05, lambda: self.child_ended(name, child, -15))

    def _kill_child(self, name: str) -> None:
        child = self.children.get(name)
        if isinstance(child, WorkerProcess):
            child.die()
        elif child is not None:
            self.child_ended(name, child, -9)

    def child_ended(self, name: str, child: WorkerProcess | _Starting, code: int) -> None:
        """The system tells that a child is gone."""
        if isinstance(child, _Starting):
            child.over = True
        if self.children.get(name) is child:
            del self.children[name]
            draw = self.clock.random.random()
            if code and self.plan.fleet.process(name).state is not State.STOPPING:
                self.world.promise.launches.ended(name)
            self.later(0.002, lambda: self.handle(events.ProcessExited(name, code, (), draw)))

    def stop(self) -> None:
        """SIGTERM; whoever looks after it starts it again."""
        self.act(lambda: self.handle(events.StopRequested()))

    def _finished(self) -> None:
        for message in self.link.bye():
            self._tell(message)
        self.die()
        self.clock.after(0.5, self.start)
