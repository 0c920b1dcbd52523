"""A pretend link: the real cores of clients, broker, workers and launcher, joined by simulated connections and a clock.

Nothing here sleeps or opens a socket. Every connection delivers in order, after a delay drawn from the seed; it breaks
when told to, and what was under way on it is lost. One seed replays one run.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from loopmux import codec, events, messages, wire
from loopmux.connection import Connection
from loopmux.errors import LoopmuxError
from loopmux.results import Result, TextDelta
from loopmux_broker import events as broker_events
from loopmux_broker.broker import Broker
from loopmux_broker.config import BrokerConfig
from loopmux_launcher import events as launcher_events
from loopmux_launcher.groups import Group
from loopmux_launcher.link import Link, Welcomed
from loopmux_launcher.plan import Plan
from loopmux_worker import session as worker_session
from loopmux_worker.engine.echo import EchoEngine

STEP = 0.005
"""Seconds an engine step takes here."""
LATENCY = (0.0001, 0.003)
"""Seconds a message is under way."""


class Clock:
    """Simulated time and what is to happen at which of it."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (max(when, self.now), next(self._order), what))

    def run_until(self, end: float) -> None:
        instant, same = self.now, 0
        while self._agenda and self._agenda[0][0] <= end:
            self.now, _, what = heapq.heappop(self._agenda)
            same = same + 1 if self.now == instant else 0
            instant = self.now
            assert same < 10_000, f"time stands still at {self.now}: a core asks to be woken without doing anything"
            what()
        self.now = end


class Alarm:
    """Wakes a core at its ``next_timer``; a core that moved its timer is woken at the new one."""

    def __init__(self, clock: Clock, due: Callable[[], float | None], ring: Callable[[], None]) -> None:
        self._clock, self._due, self._ring = clock, due, ring
        self._set = math.inf

    def look(self) -> None:
        due = self._due()
        if due is not None and due < self._set:
            self._set = due
            self._clock.at(due, lambda: self._fire(due))

    def _fire(self, due: float) -> None:
        if due != self._set:
            return
        self._set = math.inf
        self._ring()
        self.look()


@dataclass
class Line:
    """One connection: in order in both directions, until it breaks."""

    peer: bytes
    receive: Callable[[list[bytes]], None]
    alive: bool = True
    up: float = 0.0
    down: float = 0.0


class BrokerHost:
    """The broker process: may die and come back as another one that knows nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lines: dict[bytes, Line] = {}
        self.core: Broker
        self.alarm: Alarm
        self.alive = False
        self.start()

    def start(self) -> None:
        clock = self.world.clock
        epoch = clock.random.randbytes(8)
        self.core = core = Broker(self.world.config, epoch=epoch, now=clock.now)
        self.alive = True
        self.alarm = Alarm(
            clock,
            lambda: core.next_timer() if self.core is core and self.alive else None,
            lambda: self._handle(core, broker_events.TimerDue()),
        )

    def kill(self) -> None:
        self.alive = False
        for line in self.lines.values():
            line.alive = False
        self.lines.clear()

    def connect(self, receive: Callable[[list[bytes]], None]) -> Line:
        line = Line(self.world.clock.random.randbytes(5), receive)
        if self.alive:
            self.lines[line.peer] = line
        return line

    def deliver(self, line: Line, frames: list[bytes], from_worker: bool) -> None:
        """An endpoint sent frames on a line."""
        clock, core = self.world.clock, self.core
        line.up = max(line.up, clock.now + clock.random.uniform(*LATENCY))
        kind = broker_events.WorkerSent if from_worker else broker_events.ClientSent

        def arrive() -> None:
            if line.alive and self.alive:
                self._handle(core, kind(line.peer, frames))

        clock.at(line.up, arrive)

    def lose(self, line: Line) -> None:
        """A connection broke; the broker's system tells it."""
        if line.alive:
            line.alive = False
            self.lines.pop(line.peer, None)
            self._handle(self.core, broker_events.ConnectionLost(line.peer))

    def _handle(self, core: Broker, event: broker_events.Event) -> None:
        if core is not self.core or not self.alive:
            return
        clock = self.world.clock
        for action in core.handle(event, clock.now):
            if isinstance(action, broker_events.Log):
                assert action.event != "internal error", action.fields["traceback"]
                continue
            if (line := self.lines.get(action.peer)) is not None:
                self._send(line, action.frames)
        self.alarm.look()

    def _send(self, line: Line, frames: list[bytes]) -> None:
        clock = self.world.clock
        line.down = max(line.down, clock.now + clock.random.uniform(*LATENCY))
        clock.at(line.down, lambda: line.receive(frames) if line.alive else None)


class Endpoint:
    """One end of a line to the broker, which connects again a moment after it broke."""

    from_worker = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.line: Line | None = None
        self.connect()

    def connect(self) -> None:
        if not self.alive:
            return
        if not self.world.broker.alive:
            self.world.clock.at(self.world.clock.now + 0.05, self.connect)
            return
        self.line = line = self.world.broker.connect(lambda frames: self.receive(frames) if self.line is line else None)
        self.connected()

    def break_line(self) -> None:
        """Cut the connection; what is under way is lost."""
        if self.line is not None:
            self.world.broker.lose(self.line)
            self.line = None
            self.disconnected()
            self.connect()

    def check_line(self) -> None:
        """Notice that the broker's end is gone."""
        if self.alive and self.line is not None and not self.line.alive:
            self.line = None
            self.disconnected()
            self.connect()

    def send(self, message: wire.Message) -> None:
        if self.alive and self.line is not None and self.line.alive:
            self.world.broker.deliver(self.line, wire.to_frames(message), self.from_worker)

    def connected(self) -> None: ...
    def disconnected(self) -> None: ...
    def receive(self, frames: list[bytes]) -> None:
        raise NotImplementedError


@dataclass
class Story:
    """What a caller saw of one request."""

    id: bytes
    submitted: float
    deadline: float
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    outcomes: list[Result | LoopmuxError] = field(default_factory=list)
    ended: float = math.inf


class ClientHost(Endpoint):
    """A client process with its connection core and the callers' view of every request."""

    def __init__(self, world: World) -> None:
        self.stories: dict[bytes, Story] = {}
        self.core = Connection("sim://broker", world.clock.random.randbytes(16), connect_timeout=5.0)
        self.alarm = Alarm(
            world.clock,
            lambda: self.core.next_timer() if self.alive else None,
            lambda: self.handle(events.TimePassed()),
        )
        super().__init__(world)

    def submit(self, model: str = "echo", timeout: float = 30.0, **generate: object) -> Story:
        now = self.world.clock.now
        id_ = self.world.clock.random.randbytes(16)
        body = codec.pack(messages.Generate(prompt="x", **generate))
        story = self.stories[id_] = Story(id_, now, now + timeout)
        request = events.Request(id_, messages.Submit(model, timeout=timeout), body, now + timeout)
        self.handle(events.Submitted(request))
        return story

    def cancel(self, story: Story) -> None:
        self.handle(events.CancelAsked(story.id))

    def receive(self, frames: list[bytes]) -> None:
        self.handle(events.Received(frames))

    def handle(self, event: events.ConnectionEvent) -> None:
        for action in self.core.handle(event, self.world.clock.now):
            self._do(action)
        self.alarm.look()

    def _do(self, action: events.Action) -> None:
        match action:
            case events.Send(message) | events.Introduce(message):
                self.send(message)
            case events.Deliver(id_, event, report):
                story = self.stories[id_]
                assert not story.outcomes, "an event after the end"
                if isinstance(event, TextDelta):
                    assert event.position == len(story.tokens), "a gap or a repetition"
                    story.tokens += event.token_ids
                    story.text += event.text
                if report:
                    self.world.clock.at(self.world.clock.now + 0.001, lambda: self.handle(events.Consumed(id_, report)))
            case events.Finish(id_, outcome) | events.Fail(id_, outcome):
                self.stories[id_].outcomes.append(outcome)
                self.stories[id_].ended = self.world.clock.now


class WorkerHost(Endpoint):
    """A worker process: its session core and a real echo engine on simulated time."""

    from_worker = True

    def __init__(self, world: World, spec: messages.WorkerSpec) -> None:
        self.spec = spec
        clock = world.clock
        self.engine = EchoEngine(spec, clock=lambda: clock.now)
        about = self.engine.describe()
        register = messages.Register(
            "worker", spec.name, clock.random.randbytes(16), wire.VERSIONS, models=about.models, slots=about.slots
        )
        self.core = worker_session.Session(register, {}, clock.now)
        self.alarm = Alarm(
            clock,
            lambda: self.core.next_timer() if self.alive else None,
            lambda: self.handle(worker_session.Woke()),
        )
        self._stepping = False
        super().__init__(world)
        self.alarm.look()

    def die(self) -> None:
        """kill -9."""
        self.alive = False
        if self.line is not None:
            self.world.broker.lose(self.line)

    def stop(self) -> None:
        """SIGTERM."""
        self.handle(worker_session.Asked())

    def disconnected(self) -> None:
        self.handle(worker_session.Disconnected())

    def receive(self, frames: list[bytes]) -> None:
        self.handle(worker_session.Received(wire.from_frames(frames)))

    def handle(self, event: worker_session.Event) -> None:
        if not self.alive:
            return
        for action in self.core.handle(event, self.world.clock.now):
            match action:
                case worker_session.Send(message):
                    self.send(message)
                case worker_session.Submit(job):
                    self.engine.submit(job)
                case worker_session.Leave():
                    self.die()
                    return
                case worker_session.Cancel(key):
                    self.handle(worker_session.Cancelled(key, self.engine.cancel(key)))
        self.alarm.look()
        self._step_later()

    def _step_later(self) -> None:
        due = self.engine.due()
        if due is not None and not self._stepping:
            self._stepping = True
            self.world.clock.at(self.world.clock.now + max(due, STEP), self._step)

    def _step(self) -> None:
        self._stepping = False
        if self.alive:
            self.handle(worker_session.Stepped(tuple(self.engine.step()), self.engine.load()))


class LauncherHost(Endpoint):
    """A launcher process: its planning core and its side of the wire; processes are simulated ones."""

    from_worker = True

    def __init__(self, world: World, groups: list[Group]) -> None:
        clock = world.clock
        self.plan = Plan(groups, required=[m for g in groups for m in g.model_ids], with_broker=False)
        self.link = Link(messages.Register("launcher", "host", clock.random.randbytes(16), wire.VERSIONS))
        self.workers: dict[str, WorkerHost] = {}
        self.alarm = Alarm(clock, self.plan.next_timer, lambda: self.handle(launcher_events.TimerFired()))
        self.heartbeat = Alarm(clock, self.link.next_timer, self._beat)
        super().__init__(world)
        self.handle(launcher_events.Began())
        self.heartbeat.look()

    def disconnected(self) -> None:
        self.link.lost()
        self.heartbeat.look()

    def _beat(self) -> None:
        for message in self.link.due(self.world.clock.now):
            self.send(message)

    def receive(self, frames: list[bytes]) -> None:
        news = self.link.received(wire.from_frames(frames), self.world.clock.now)
        if isinstance(news, Welcomed):
            self.handle(launcher_events.BrokerWelcomed())
        self.heartbeat.look()

    def kill(self, worker: WorkerHost) -> None:
        """A worker is killed and its parent hears of it."""
        worker.die()
        draw = self.world.clock.random.random()
        self.handle(launcher_events.ProcessExited(worker.spec.name, -9, (), draw))

    def handle(self, event: launcher_events.Event) -> None:
        for action in self.plan.handle(event, self.world.clock.now):
            match action:
                case launcher_events.StartWorker(name=name, spec=spec):
                    self._start(name, spec)
                case launcher_events.ReportPhase(catalogue):
                    for message in self.link.report(catalogue):
                        self.send(message)
        self.alarm.look()

    def _start(self, name: str, spec: messages.WorkerSpec) -> None:
        def ready() -> None:
            self.workers[name] = WorkerHost(self.world, spec)
            self.handle(launcher_events.ProcessReported(name, "ready"))

        self.world.clock.at(self.world.clock.now + 0.2, ready)


class World:
    """Everything together."""

    def __init__(self, seed: int, groups: list[Group], clients: int = 2, config: BrokerConfig | None = None) -> None:
        self.clock = Clock(seed)
        self.config = config or BrokerConfig()
        self.broker = BrokerHost(self)
        self.launcher = LauncherHost(self, groups)
        self.clients = [ClientHost(self) for _ in range(clients)]

    @property
    def workers(self) -> list[WorkerHost]:
        return [w for w in self.launcher.workers.values() if w.alive]

    @property
    def stories(self) -> list[Story]:
        return [story for client in self.clients for story in client.stories.values()]

    def run(self, seconds: float) -> None:
        self.clock.run_until(self.clock.now + seconds)

    def restart_broker(self, away: float = 0.1) -> None:
        """kill -9 of the broker; its successor listens after ``away`` seconds."""
        self.broker.kill()

        def back() -> None:
            self.broker.start()
            for endpoint in (self.launcher, *self.launcher.workers.values(), *self.clients):
                endpoint.check_line()

        self.clock.at(self.clock.now + away, back)
