"""For tests of the broker's core: a broker on a clock that the test moves, peers that say things, short names."""

from __future__ import annotations

from typing import Any

from loopmux import codec, wire
from loopmux.messages import (
    Catalogue,
    End,
    Evict,
    Failure,
    Heartbeat,
    Held,
    Hello,
    LeftOut,
    Register,
    Run,
    ServedModel,
    Submit,
    Tok,
)
from loopmux.results import Timing, Usage
from loopmux.wire import Header, Kind, Message, pack_tokens
from loopmux_broker.broker import Broker
from loopmux_broker.config import BrokerConfig
from loopmux_broker.dispatch import session_of
from loopmux_broker.events import (
    Action,
    AdminSent,
    ClientSent,
    ConnectionLost,
    Event,
    Log,
    LoopStalled,
    Push,
    Send,
    TimerDue,
    WorkerSent,
    say,
)
from loopmux_broker.tables import Alarm

EPOCH = b"epoch--1"
BODY = codec.pack({"prompt": "hello"})
CLIENT, OTHER = b"c1", b"c2"
WORKER, SECOND, THIRD = b"w1", b"w2", b"w3"
LAUNCHER = b"l1"
ADMIN = b"a1"
ONE, TWO, THREE, FOUR = (bytes([n]) * 16 for n in (1, 2, 3, 4))
_OF_REQUESTS = {
    Alarm.RUN,
    Alarm.STOP,
    Alarm.DEADLINE,
    Alarm.TERMINAL,
    Alarm.TOMBSTONE,
    Alarm.RECOVERY,
    Alarm.HOME,
}
"""Timers that end with their request."""


def instance(peer: bytes) -> bytes:
    return peer.ljust(16, b".")


class Core:
    """A broker whose clock stands still until the test moves it."""

    def __init__(self, **config: Any) -> None:
        self.now = 100.0
        self.config = BrokerConfig(**{"settle": 0.0} | config)  # most stories begin long after the start
        self.broker = Broker(self.config, epoch=EPOCH, now=self.now)
        self.tables = self.broker.tables
        self.logged: list[Log] = []

    def handle(self, event: Event) -> list[Action]:
        """What comes of an event, log lines kept apart. A bug in the core fails the test here."""
        actions = self.broker.handle(event, self.now)
        for action in actions:
            if isinstance(action, Log):
                assert action.event != "internal error", action.fields["traceback"]
                self.logged.append(action)
        return [a for a in actions if not isinstance(a, Log)]

    def client(self, message: Message, peer: bytes = CLIENT) -> list[Action]:
        return self.handle(ClientSent(peer, wire.to_bytes(message)))

    def worker(self, message: Message, peer: bytes = WORKER) -> list[Action]:
        return self.handle(WorkerSent(peer, wire.to_bytes(message)))

    def admin(self, message: Message, peer: bytes = ADMIN) -> list[Action]:
        return self.handle(AdminSent(peer, wire.to_bytes(message)))

    def evict(self, worker: str, within: float = 10.0) -> list[Action]:
        return self.admin(Message(Header(Kind.EVICT, FOUR), codec.pack(Evict(worker, within))))

    def lose(self, peer: bytes) -> list[Action]:
        return self.handle(ConnectionLost(peer))

    def sleep(self, seconds: float = 5.0) -> None:
        """The broker's process is stopped for a while; nobody else is."""
        self.now += seconds
        assert self.handle(LoopStalled(seconds)) == []

    def hello(self, peer: bytes = CLIENT, who: bytes | None = None, *, introduction: int = 0) -> list[Action]:
        route = codec.pack(Hello(wire.VERSIONS, who or instance(peer)))
        return self.client(Message(Header(Kind.HELLO, seq=introduction), route=route), peer)

    def register(
        self,
        peer: bytes = WORKER,
        *,
        name: str | None = None,
        models: tuple[str, ...] = ("m",),
        slots: int = 1,
        boot: bytes | None = None,
        adapters: tuple[str, ...] = (),
        role: Any = "worker",
        left_out: dict[str, str] | None = None,
        fingerprint: str = "f",
        held: int = 0,
        introduction: int = 0,
        host: str = "",
    ) -> list[Action]:
        served = tuple(ServedModel(m, fingerprint) for m in models) if role == "worker" else ()
        without = tuple(LeftOut(model, reason) for model, reason in (left_out or {}).items())
        common = (role, name or peer.decode(), boot or instance(peer), wire.VERSIONS)
        offers = {"models": served, "slots": slots, "adapters": adapters, "left_out": without}
        register = Register(*common, **offers, held=held, host=host)
        header = Header(Kind.REGISTER, seq=introduction)
        return self.worker(Message(header, codec.pack(register), codec.pack({})), peer)

    def launcher(
        self, peer: bytes = LAUNCHER, name: str = "host", boot: bytes | None = None, **more: Any
    ) -> list[Action]:
        return self.register(peer, name=name, role="launcher", slots=0, boot=boot, **more)

    def declare(self, model: str, phase: Any, peer: bytes = LAUNCHER, **details: Any) -> list[Action]:
        route = codec.pack(Catalogue(model, phase, **details))
        return self.worker(Message(Header(Kind.CATALOGUE), route=route), peer)

    def submit(self, request: bytes, peer: bytes = CLIENT, *, body: bytes = BODY, **route: Any) -> list[Action]:
        route.setdefault("model", "m")
        return self.client(Message(Header(Kind.SUBMIT, request), codec.pack(Submit(**route)), body), peer)

    def running(self, request: bytes = ONE, peer: bytes = CLIENT, worker: bytes = WORKER, **route: Any) -> None:
        """A request that a worker has confirmed."""
        self.submit(request, peer, **route)
        self.worker(say(Kind.RUNACK, request, attempt=1), worker)

    def wait(self, seconds: float, *, silent: tuple[bytes, ...] = ()) -> list[Action]:
        """Let time pass, timers ring and all peers but the ``silent`` say that they are there (answers left out)."""
        end = self.now + seconds
        actions: list[Action] = []
        while self.now < end:
            self.now = min(end, self.now + 0.25)
            self.keep_alive(silent)
            while (due := self.broker.next_timer()) is not None and due <= self.now:
                actions += self.handle(TimerDue())
        return actions

    def at_once(self) -> list[list[Action]]:
        """What comes of each timer that rings at once, or at once after the one before."""
        rounds = []
        while (due := self.broker.next_timer()) is not None and due < self.now + 0.01:
            self.now = max(self.now, due)
            rounds.append(self.handle(TimerDue()))
        return rounds

    def keep_alive(self, silent: tuple[bytes, ...]) -> None:
        for peer in [p for p in self.tables.clients.by_peer if p not in silent]:
            assert self.client(say(Kind.PING), peer) == [Send(peer, say(Kind.PONG))]
        for peer in [p for p in (*self.tables.pool.workers, *self.tables.pool.launchers) if p not in silent]:
            beat = Message(Header(Kind.HB), route=codec.pack(Heartbeat()))
            assert self.worker(beat, peer) == [Send(peer, say(Kind.PONG))]

    @property
    def counted(self) -> dict[str, int]:
        return dict(self.tables.counters)

    def assert_empty(self) -> None:
        """Nothing is left of any request."""
        t = self.tables
        assert (t.requests, t.pool.leases, t.queues.length) == ({}, {}, 0)
        assert (t.admission.queued, t.admission.held, t.admission.output) == (0, 0, 0)
        accounts = [client.principal for client in t.clients.by_instance.values()]
        assert all(not p.known and not p.held and not p.queued for p in accounts)
        assert all(not w.leases for w in t.pool.workers.values())
        assert not _OF_REQUESTS & {key[0] for key in t.timers._due}


def order(core: Core, count: int, worker: bytes = WORKER) -> list[bytes]:
    """The requests that one worker with one slot gets one after the other, beginning with ONE."""
    ran, current = [], ONE
    for _ in range(count):
        actions = core.worker(end(current, 0), worker)
        current = next(a.message.header.request for a in actions if isinstance(a, Send) and a.message.kind is Kind.RUN)
        ran.append(current)
    return ran


# --- messages that the broker passes on or makes ----------------------------------------------------------------------


def tok(request: bytes, seq: int, count: int = 1, *, attempt: int = 1, text: str = "x") -> Message:
    ids = list(range(seq, seq + count))
    header = Header(Kind.TOK, request, seq, count, attempt)
    return Message(header, body=codec.pack(Tok(text * count)), tokens=pack_tokens(ids))


def end(request: bytes, total: int, *, attempt: int = 1) -> Message:
    body = codec.pack(End("stop", Usage(1, total), Timing(), "m", "w1"))
    return Message(Header(Kind.END, request, total, attempt=attempt), body=body)


def stopped(request: bytes, total: int = 0, *, attempt: int = 1) -> Message:
    header = Header(Kind.CANCELLED, request, total, attempt=attempt)
    return Message(header, body=codec.pack(Failure("cancelled", "stopped")))


def run(
    request: bytes,
    peer: bytes = WORKER,
    *,
    attempt: int = 1,
    timeout: float = 600.0,
    prefix: int = 0,
    client: bytes = CLIENT,
    **route: Any,
) -> Send:
    """RUN behind the first ``prefix`` tokens, which are 0, 1, 2 …"""
    if "session" in route:
        route["session"] = session_of(instance(client), route["session"])
    body = Run(route.pop("model", "m"), timeout=timeout, client=instance(client), **route)
    header = Header(Kind.RUN, request, attempt=attempt)
    return Send(peer, Message(header, codec.pack(body), BODY, pack_tokens(list(range(prefix)))))


def accepted(request: bytes, position: int = 0, peer: bytes = CLIENT) -> Send:
    return Send(peer, say(Kind.ACCEPTED, request, arg=position))


def stop(request: bytes, reason: int, *, attempt: int = 1, peer: bytes = WORKER) -> Send:
    return Send(peer, say(Kind.STOP, request, arg=reason, attempt=attempt))


def pushed(message: Message, peer: bytes = CLIENT) -> Push:
    return Push(peer, wire.to_bytes(message), message.header.request, message.header.seq)


def failure(action: Action) -> tuple[bytes, Kind, int, Failure]:
    """(receiver, kind, seq, body) of a terminal that the broker made."""
    message = wire.from_bytes(action.data) if isinstance(action, (Push, Send)) else None
    assert message is not None, action
    assert isinstance(action, (Push, Send))
    return action.peer, message.kind, message.header.seq, codec.unpack(Failure, message.body)


def runs(actions: list[Action]) -> list[tuple[bytes, bytes, int]]:
    """Who is given what, in which attempt."""
    found = [(a.peer, a.message.header) for a in actions if isinstance(a, Send) and a.message.kind is Kind.RUN]
    return [(peer, header.request, header.attempt) for peer, header in found]


def kinds(actions: list[Action]) -> list[tuple[bytes, Kind]]:
    """Who gets what, without the details."""
    return [(a.peer, wire.from_bytes(a.data).kind) for a in actions if isinstance(a, (Push, Send))]


def held(
    core: Core,
    request: bytes,
    start: int,
    end: int,
    attempt: int = 1,
    worker: bytes = WORKER,
    client: bytes = CLIENT,
    epoch: bytes = b"former--",
) -> list[Action]:
    """A worker names an attempt that it has; unless told otherwise, one that a former broker gave it."""
    header = Header(Kind.HELD, request, start, end, attempt)
    return core.worker(Message(header, codec.pack(Held(instance(client), "m", epoch=epoch))), worker)
