"""Random storms over the core: peers that come, go, change connections, do not read, and a broker that stays right.

One seed replays one storm. After every step the books must balance; after the storm every request that a client still
cares for has exactly one end, its tokens were 0, 1, 2 … without a gap, and nothing is left in any table.
"""

from __future__ import annotations

import random
from collections import deque

import pytest

from brokerkit import Core, end, instance, stopped, tok
from loopmux import codec, wire
from loopmux.messages import Heartbeat
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import Action, Push, PushBlocked, Send, TimerDue, say
from loopmux_broker.requests import State

WINDOW = 16
BEAT = Message(Header(Kind.HB), route=codec.pack(Heartbeat()))


class Storm:
    """A broker among scripted clients (request → tokens received) and workers (attempt → tokens sent)."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.core = Core(window=WINDOW, request_output=20_000)
        self.workers: dict[bytes, dict[tuple[bytes, int], int]] = {}
        self.clients: dict[bytes, dict[bytes, int]] = {}
        self.cancelled: set[bytes] = set()
        self.ended: dict[bytes, Kind] = {}
        self.full: set[bytes] = set()
        self.count = 0
        self._mail: deque[Action] = deque()
        self._delivering = False

    def fresh(self, letter: str) -> bytes:
        self.count += 1
        return f"{letter}{self.count}".encode()

    def act(self, actions: list[Action]) -> None:
        """Deliver what the broker sends, in order, and what the peers answer to it."""
        self._mail.extend(actions)
        if self._delivering:
            return
        self._delivering = True
        while self._mail:
            self._deliver(self._mail.popleft())
        self._delivering = False

    def _deliver(self, action: Action) -> None:
        assert isinstance(action, (Push, Send))
        message, peer = wire.from_bytes(action.data), action.peer
        if isinstance(action, Push) and (peer in self.full or self.dice.random() < 0.03):
            self.full.add(peer)
            self.act(self.core.handle(PushBlocked(peer, action.request, action.seq)))
        elif peer in self.workers:
            self._at_worker(peer, message)
        elif peer in self.clients and message.header.request in self.clients[peer]:
            self._at_client(peer, message)

    def _at_worker(self, peer: bytes, message: Message) -> None:
        key = (message.header.request, message.header.attempt)
        jobs = self.workers[peer]
        if message.kind is Kind.RUN and self.dice.random() < 0.9:
            jobs.setdefault(key, 0)
            self.act(self.core.worker(say(Kind.RUNACK, key[0], attempt=key[1]), peer))
        elif message.kind is Kind.STOP and self.dice.random() < 0.8:
            jobs.pop(key, None)
            self.act(self.core.worker(stopped(key[0], attempt=key[1]), peer))
        elif message.kind is Kind.RESET:
            jobs.pop(key, None)

    def _at_client(self, peer: bytes, message: Message) -> None:
        header, mine = message.header, self.clients[peer]
        received = mine[header.request]
        if message.kind is Kind.TOK:
            assert header.seq <= received, "a gap"
            if header.seq == received:
                mine[header.request] += header.arg
            if self.dice.random() < 0.7:
                self.credit(peer, header.request)
        elif message.kind in wire.TERMINALS and (header.seq == received or header.request in self.cancelled):
            assert header.request not in self.ended, "a second end"
            self.ended[header.request] = message.kind
            del mine[header.request]
            self.act(self.core.client(say(Kind.ENDACK, header.request), peer))

    def credit(self, peer: bytes, request: bytes) -> None:
        received = self.clients[peer][request]
        self.act(self.core.client(say(Kind.CREDIT, request, seq=received + WINDOW, arg=received), peer))

    # --- what happens

    def step(self) -> None:
        self.core.now += self.dice.choice([0, 0.001, 0.05, 0.5])
        self.full.clear()
        happenings = [self.join, self.crash, self.arrive, self.reconnect, self.submit, self.cancel, self.produce]
        self.dice.choices(happenings, weights=[5, 2, 3, 2, 18, 4, 66])[0]()
        self.pass_time()
        self.audit()

    def join(self) -> None:
        if len(self.workers) < 4:
            peer = self.fresh("W")
            self.workers[peer] = {}
            self.act(self.core.register(peer, slots=self.dice.randint(1, 3)))

    def crash(self) -> None:
        if self.workers:
            peer = self.dice.choice(list(self.workers))
            del self.workers[peer]
            self.act(self.core.lose(peer))

    def arrive(self) -> None:
        if len(self.clients) < 3:
            peer = self.fresh("C")
            self.clients[peer] = {}
            self.act(self.core.hello(peer))

    def reconnect(self) -> None:
        if not self.clients:
            return
        old, new = self.dice.choice(list(self.clients)), self.fresh("C")
        known = self.core.tables.clients.by_peer.get(old)
        if self.dice.random() < 0.5:
            self.act(self.core.lose(old))
        self.clients[new] = self.clients.pop(old)
        self.act(self.core.hello(new, known.instance if known else instance(new)))
        for request in list(self.clients[new]):
            if request in self.clients[new]:
                self.credit(new, request)

    def submit(self) -> None:
        if self.clients:
            peer, request = self.dice.choice(list(self.clients)), self.fresh("r").ljust(16, b".")
            self.clients[peer][request] = 0
            self.act(self.core.submit(request, peer, timeout=self.dice.choice([1.0, 5.0, 60.0])))

    def cancel(self) -> None:
        peer = self.dice.choice([*self.clients, b""])
        if self.clients.get(peer):
            request = self.dice.choice(list(self.clients[peer]))
            self.cancelled.add(request)  # from now on any terminal counts: it may have crossed an END
            self.act(self.core.client(say(Kind.CANCEL, request), peer))

    def produce(self) -> None:
        peer = self.dice.choice([*self.workers, b""])
        if not self.workers.get(peer):
            return
        jobs = self.workers[peer]
        key = self.dice.choice(list(jobs))
        if self.dice.random() < 0.2:
            self.finish(peer, key)
            return
        count, start = self.dice.randint(1, 8), jobs[key]
        jobs[key] += count
        self.act(self.core.worker(tok(key[0], start, count, attempt=key[1]), peer))

    def finish(self, peer: bytes, key: tuple[bytes, int]) -> None:
        total = self.workers[peer].pop(key)
        self.act(self.core.worker(end(key[0], total, attempt=key[1]), peer))

    def pass_time(self) -> None:
        for peer in [p for p in self.clients if p in self.core.tables.clients.by_peer]:
            self.core.client(say(Kind.PING), peer)
        for peer in self.workers:
            self.core.worker(BEAT, peer)
        due = self.core.broker.next_timer()
        if due is not None and due <= self.core.now:
            self.act(self.core.handle(TimerDue()))

    # --- what must hold

    def audit(self) -> None:
        tables = self.core.tables
        requests, admission = tables.requests.values(), tables.admission
        assert admission.queued == tables.queues.length == sum(r.state is State.QUEUED for r in requests)
        assert admission.output == sum(r.output.held for r in requests)
        assert admission.held == sum(r.size for r in requests)
        assert set(tables.pool.leases) == {key for w in tables.pool.workers.values() for key in w.leases}
        for worker in tables.pool.workers.values():
            assert worker.free >= 0
            assert worker.free == 0 or tables.queues.next_for(worker) is None, (
                "a slot is free and somebody waits for it"
            )

    def calm(self) -> None:
        """Let workers finish, clients read, and a minute and a half pass."""
        for _ in range(180):
            self.core.now += 0.5
            self.full.clear()
            self.pass_time()
            for peer, mine in self.clients.items():
                for request in list(mine):
                    if request in mine:
                        self.credit(peer, request)
            for peer, jobs in self.workers.items():
                for key in list(jobs):
                    if key in jobs:
                        self.finish(peer, key)


@pytest.mark.parametrize("seed", range(60))
def test_a_storm(seed: int) -> None:
    storm = Storm(seed)
    for _ in range(400):
        storm.step()
    storm.calm()
    assert [mine for mine in storm.clients.values() if mine] == []
    assert storm.ended
    storm.core.assert_empty()
    counted = storm.core.counted
    ended = sum(counted.get(name, 0) for name in ("finished", "failed", "cancelled", "expired"))
    assert counted["submitted"] == ended
