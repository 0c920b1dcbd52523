"""Adapters while everything dies: in the end workers have what their launcher remembers, and every order its answer."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from loopmux import codec, wire
from loopmux.messages import AdapterOrder, Catalogue, Done, Failure, Heartbeat, Hello, Register, ServedModel
from loopmux.wire import Header, Kind, Message
from loopmux_broker.broker import Broker
from loopmux_broker.config import BrokerConfig
from loopmux_broker.events import ClientSent, ConnectionLost, Event, Send, TimerDue, WorkerSent

NAMES = ("loud", "quiet")
CLIENT = b"client"


@dataclass
class Member:
    """A worker, or the launcher, on one connection to the broker; ``inbox`` is what the broker said to it."""

    name: str
    has: set[str]
    peer: bytes = b""
    boot: bytes = b""
    inbox: deque[Message] = field(default_factory=deque)
    welcomed: bool = False


class House:
    """A broker, a launcher with three workers, a client that loads and unloads; any of them may go at any time."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now, self.born = 100.0, 0
        self.launcher = Member("host", set())
        self.workers = [Member(f"m-{n}", set()) for n in (1, 2, 3)]
        self.asked: dict[bytes, AdapterOrder] = {}
        self.kinds: dict[bytes, Kind] = {}
        self.answered: dict[bytes, Done] = {}
        self.start_broker()

    # --- lives

    def start_broker(self) -> None:
        config = BrokerConfig(settle=3.0)
        self.broker = Broker(config, epoch=self.dice.randbytes(8), now=self.now)
        self.owner: dict[bytes, Member] = {}
        self.handle(
            ClientSent(CLIENT, wire.to_bytes(Message(Header(Kind.HELLO), codec.pack(Hello(wire.VERSIONS, b"c" * 16)))))
        )
        for member in (self.launcher, *self.workers):
            self.connect(member)
        for id_ in self.asked:  # what is not answered is asked again
            self.ask(id_)

    def connect(self, member: Member) -> None:
        """A new connection, over which it introduces itself; what was said over the former one is lost."""
        self.born += 1
        member.peer, member.welcomed = self.born.to_bytes(4), False
        member.inbox.clear()
        member.boot = member.boot or self.dice.randbytes(16)
        self.owner[member.peer] = member
        self.register(member)

    def register(self, member: Member) -> None:
        role = "launcher" if member is self.launcher else "worker"
        served = tuple(ServedModel(name, f"f-{name}", name) for name in sorted(member.has))
        register = Register(
            role, member.name, member.boot, wire.VERSIONS,
            models=(ServedModel("m", "f"), *served) if role == "worker" else (),
            adapters=tuple(sorted(member.has)) if role == "worker" else (), slots=1,
        )  # fmt: skip
        self.say(member, Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({})))

    def lose(self, member: Member) -> None:
        peer, self.owner = member.peer, {p: m for p, m in self.owner.items() if m is not member}
        self.handle(ConnectionLost(peer))

    def restart(self, worker: Member) -> None:
        """Killed; the next one comes with what the launcher remembered when it was started."""
        self.lose(worker)
        worker.boot, worker.has = b"", set(self.launcher.has)

    # --- words

    def handle(self, event: Event) -> None:
        for action in self.broker.handle(event, self.now):
            assert getattr(action, "event", "") != "internal error", action
            if not isinstance(action, Send):
                continue
            if action.peer == CLIENT and action.message.kind is Kind.DONE:
                id_ = action.message.header.request
                self.answered[id_] = codec.unpack(Done, action.message.body, codec.BODY_LIMITS)
                self.asked.pop(id_, None)
            elif (member := self.owner.get(action.peer)) is not None and self.dice.random() < 0.95:
                member.inbox.append(action.message)

    def say(self, member: Member, message: Message) -> None:
        self.handle(WorkerSent(member.peer, wire.to_bytes(message)))

    def ask(self, id_: bytes) -> None:
        order = codec.pack(self.asked[id_])
        self.handle(ClientSent(CLIENT, wire.to_bytes(Message(Header(self.kinds[id_], id_), order))))

    def hear(self, member: Member) -> None:
        """The next thing that the broker said to it, done."""
        if not member.inbox:
            return
        message = member.inbox.popleft()
        if message.kind is Kind.WHO:
            self.register(member)
        elif message.kind is Kind.WELCOME:
            member.welcomed = True
            if member is self.launcher:
                self.declare("m")
                for name in sorted(member.has):
                    self.declare(name)
        elif message.kind in (Kind.LOAD, Kind.UNLOAD) and member.welcomed:
            self.adapt(member, message)

    def adapt(self, member: Member, message: Message) -> None:
        name, load = codec.unpack(AdapterOrder, message.route).name, message.kind is Kind.LOAD
        done = Done()
        if load and self.dice.random() < 0.1:
            done = Done(Failure("config", "it does not fit"))
        elif load:
            member.has.add(name)
            if member is not self.launcher:
                done = Done(content="c", served=ServedModel(name, f"f-{name}", name))
        else:
            member.has.discard(name)
        if member is self.launcher and done.failure is None:
            self.declare(name)
        self.say(member, Message(Header(Kind.DONE, message.header.request), body=codec.pack(done)))

    def declare(self, name: str) -> None:
        there = name == "m" or name in self.launcher.has
        entry = Catalogue(name, "ready") if name == "m" else Catalogue(name, "ready", onto="m", folder=f"/{name}")
        said = entry if there else Catalogue(name, "idle", removed=True)
        self.say(self.launcher, Message(Header(Kind.CATALOGUE), codec.pack(said)))

    # --- time

    def pass_time(self, seconds: float) -> None:
        """All who have a connection say that they live; what is due rings; unanswered REGISTERs and orders again."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.handle(ClientSent(CLIENT, wire.to_bytes(Message(Header(Kind.PING)))))
            for member in list(self.owner.values()):
                if member.welcomed:
                    self.say(member, Message(Header(Kind.HB), codec.pack(Heartbeat())))
                else:
                    self.register(member)
            due = self.broker.next_timer()
            if due is not None and due <= self.now:
                self.handle(TimerDue())
            for id_ in list(self.asked):
                self.ask(id_)

    def storm(self) -> None:
        dice, everybody = self.dice, [self.launcher, *self.workers]
        for _ in range(dice.randint(20, 120)):
            match dice.choices(
                ["hear", "ask", "time", "cut", "kill", "back", "launcher", "broker"], [40, 8, 12, 5, 4, 12, 2, 1]
            )[0]:
                case "hear":
                    self.hear(dice.choice(everybody))
                case "ask":
                    id_ = dice.randbytes(16)
                    name = dice.choice(NAMES)
                    self.kinds[id_] = dice.choice([Kind.LOAD, Kind.LOAD, Kind.UNLOAD])
                    self.asked[id_] = AdapterOrder("m", name, f"/{name}" if self.kinds[id_] is Kind.LOAD else "")
                    self.ask(id_)
                case "time":
                    self.pass_time(dice.choice([0.5, 1.0, 4.0]))
                case "cut":
                    self.lose(dice.choice(everybody))
                case "kill":
                    self.restart(dice.choice(self.workers))
                case "back":
                    gone = [member for member in everybody if member.peer not in self.owner]
                    if gone:
                        self.connect(dice.choice(gone))
                case "launcher":
                    self.lose(self.launcher)
                    self.launcher.boot = b""
                    for worker in self.workers:
                        self.restart(worker)
                case "broker":
                    self.start_broker()

    def calm(self) -> None:
        """Everybody is there and listens, for as long as the broker's patience lasts."""
        for member in (self.launcher, *self.workers):
            if member.peer not in self.owner:
                self.connect(member)
        for _ in range(300):
            self.pass_time(1.0)
            for member in (self.launcher, *self.workers):
                while member.inbox:
                    self.hear(member)


@pytest.mark.parametrize("seed", [*range(60), 1211, 2027])  # those that once found something
def test_after_the_storm_all_have_what_is_remembered_and_all_orders_are_answered(seed: int) -> None:
    house = House(seed)
    house.storm()
    house.calm()
    assert house.asked == {}
    pool = house.broker.tables.pool
    without = {w.name: {one.id for one in w.register.left_out} for w in pool.workers.values()}
    for worker in house.workers:
        assert worker.has == house.launcher.has - without[worker.name]
    for known in pool.workers.values():  # what the broker thinks is so
        [real] = [w for w in house.workers if w.name == known.name]
        assert set(known.register.adapters) == real.has
        assert known.loading == frozenset()
    assert house.broker._adapters._operations == {}
