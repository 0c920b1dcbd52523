"""The broker process around the real core: its lines, its timers, and what its sockets do when a pipe is full."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loopmux import codec, wire
from loopmux.messages import Evict, SessionHint
from loopmux.wire import Kind
from loopmux_broker import events
from loopmux_broker.broker import Broker
from loopmux_broker.events import (
    AdminSent,
    ClientSent,
    ConnectionLost,
    Log,
    LoopStalled,
    Push,
    PushBlocked,
    Send,
    TimerDue,
    WorkerSent,
)
from simulation.broken import broken
from simulation.lines import Line, Pipe
from simulation.process import Endpoint, Process

if TYPE_CHECKING:
    from simulation.world import World

_CLOSE = (0.001, 0.003)
"""Seconds until a closed connection is noticed."""
_TURN = 0.005
"""Seconds of the longest turn."""


class BrokerProcess(Process):
    """May die and come back as another process that knows nothing."""

    core: Broker

    def __init__(self, world: World) -> None:
        super().__init__(world, "broker")
        self.lines: dict[bytes, Line] = {}
        self.owner: dict[bytes, Endpoint] = {}
        self.spoke: dict[str, float] = {}
        """When each endpoint was last heard."""
        self._said: list[tuple[bytes, wire.Message]] = []
        self._refused: dict[bytes, dict[bytes, int]] = {}
        self.born = 0.0
        self.wake_by(lambda: self.core.next_timer(), lambda: self.handle(TimerDue()))
        self.start()

    def start(self) -> None:
        self.alive, self.frozen_since, self.born = True, None, self.clock.now
        self.core = Broker(self.world.profile.config, epoch=self.clock.random.randbytes(8), now=self.clock.now)
        self.look()

    def die(self) -> None:
        super().die()
        self._refused.clear()
        lines, owners = list(self.lines.values()), dict(self.owner)
        self.lines.clear()
        self.owner.clear()
        for line in lines:
            line.cut()
            line.far = False
            self._tell_near(owners[line.peer], line)

    def _tell_near(self, owner: Endpoint, line: Line) -> None:
        when = max(self.clock.now + self.clock.random.uniform(*_CLOSE), line.down.last)
        self.clock.at(when, lambda: owner.act(lambda: owner.closed(line)))

    # --- connections

    def accept(self, endpoint: Endpoint) -> Line | None:
        """A connection, if this process is there to shake hands."""
        if not self.running:
            return None
        latency = self.world.profile.latency
        sent = WorkerSent if endpoint.from_worker else ClientSent
        peer = self.clock.random.randbytes(5)
        up = Pipe(self.clock, latency, self.act, lambda data: self._hear(line, sent(peer, data)))
        down = Pipe(self.clock, latency, endpoint.act, lambda data: endpoint.heard(line, data))
        line = Line(peer, up, down)
        self.lines[peer], self.owner[peer] = line, endpoint
        return line

    def _hear(self, line: Line, event: ClientSent | WorkerSent) -> None:
        if not line.far:
            return
        peer, owner, promise = line.peer, self.owner[line.peer], self.world.promise
        self.spoke[owner.name] = self.clock.now
        if owner.stranger:
            self.handle(event)
            return
        message = wire.from_bytes(event.data)
        header = message.header
        if header.kind is Kind.SESSION and codec.unpack(SessionHint, message.route).state == "done":
            promise.talk.dispatches.forget(owner.name, codec.unpack(SessionHint, message.route).session)
        owed = promise.answers.of_broker(peer, header, from_worker=owner.from_worker)
        self._said = []
        self.handle(event)
        promise.answers.check(self, header, owed, [said for to, said in self._said if to == peer])

    def evict(self, worker: str, within: float) -> None:
        """An administrator comes, wants a worker to leave, and goes."""
        question = wire.Header(Kind.EVICT, self.clock.random.randbytes(16))
        data = wire.to_bytes(wire.Message(question, codec.pack(Evict(worker, within))))
        self.act(lambda: self.handle(AdminSent(b"admin", data)))

    def left(self, line: Line, after: float = 0.0, flushed: float = -math.inf) -> None:
        """The near end is gone: what is under way arrives, up to a point after ``flushed``, then the news does."""
        line.cut(flushed)
        when = max(self.clock.now + after + self.clock.random.uniform(*_CLOSE), line.up.last)
        self.clock.at(when, lambda: self.act(lambda: self._lose(line)))

    def _lose(self, line: Line) -> None:
        if line.far:
            line.far = False
            self.lines.pop(line.peer, None)
            self.owner.pop(line.peer, None)
            self.handle(ConnectionLost(line.peer))

    def snap(self, line: Line, near: float, far: float) -> None:
        """A connection breaks; its ends notice after ``near`` and ``far`` seconds."""
        owner = self.owner.get(line.peer)
        self.left(line, far)
        if owner is not None:
            self.clock.after(near, lambda: owner.act(lambda: owner.closed(line)))

    # --- the core

    def thawed(self, away: float) -> None:
        if away > 2 * self.world.profile.config.heartbeat:
            self.handle(LoopStalled(away))

    def handle(self, event: events.Event) -> None:
        for action in self.core.handle(event, self.clock.now):
            match action:
                case Log(level, text, fields):
                    if text == "internal error":
                        broken("the broker's core raises nothing", str(fields["traceback"]))
                    self.world.story.tell(self, f"{level}: {text} {fields or ''}")
                case Push(peer, data):
                    if not self._send(peer, data):
                        refused = self._refuse(peer)
                        refused[action.request] = min(action.seq, refused.get(action.request, action.seq))
                case Send(peer, message):
                    if not self._send(peer, action.data, message):
                        self._refuse(peer)
        self.look()

    def _refuse(self, peer: bytes) -> dict[bytes, int]:
        """A pipe is full, and until the core hears of it, at the end of the turn, what it says to that peer is lost.

        Returns the lowest push of each request that was.
        """
        if peer not in self._refused:
            self._refused[peer] = {}
            self.later(self.clock.random.uniform(0, _TURN), lambda: self._turned(peer))
        return self._refused[peer]

    def _turned(self, peer: bytes) -> None:
        for request, seq in self._refused.pop(peer, {}).items():
            self.handle(PushBlocked(peer, request, seq))

    def _send(self, peer: bytes, data: bytes, message: wire.Message | None = None) -> bool:
        """False if the peer's pipe is full. What is sent to one that is gone is lost."""
        line = self.lines.get(peer)
        if line is None:
            return True
        sent = peer not in self._refused and line.down.send(data)
        message = message or wire.from_bytes(data)
        self._said.append((peer, message))
        self.world.promise.talk.broker_said(self.owner[peer], peer, message)
        if self.world.story.loud:
            self.world.story.message(self, self.owner[peer], data, lost=not sent)
        return sent
