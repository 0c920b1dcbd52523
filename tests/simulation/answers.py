"""Whoever hears a question answers it: the column "answered by" of docs/protocol.md, for every message that comes in.

Looked at in the moment: between hearing and answering no message can be lost, so no fault excuses a silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loopmux import connection, wire
from loopmux.wire import Header, Kind, Message
from loopmux_broker.requests import State
from loopmux_worker.engine.base import Key
from simulation.broken import hold

if TYPE_CHECKING:
    from simulation.client import ClientProcess
    from simulation.process import Process
    from simulation.promise import Promise
    from simulation.worker import WorkerProcess

Said = list[Message]
Answered = Callable[[Said], bool]
"""Whether what was said, until the core had nothing more to do, answers what was heard."""

_INTRODUCTIONS = frozenset({Kind.HELLO, Kind.REGISTER})
_OF_ATTEMPTS = wire.TERMINALS | {Kind.TOK, Kind.RUNACK, Kind.RESET}


def _says(*kinds: Kind, request: bytes = wire.NO_ID, attempt: int = 0) -> Answered:
    """One of these kinds is said, about this request and attempt."""
    return lambda said: any(
        m.kind in kinds and m.header.request == request and m.header.attempt == attempt for m in said
    )


def _of(request: bytes, *kinds: Kind) -> Answered:
    """One of these kinds is said about this request, whatever the attempt."""
    return lambda said: any(m.kind in kinds and m.header.request == request for m in said)


class Answers:
    """What a process owes for what it hears. Each method is asked before the core is, and returns what to look for."""

    def __init__(self, promise: Promise) -> None:
        self._world = promise.world

    def check(self, who: Process, heard: Header, answered: Answered | None, said: Said) -> None:
        """Hold what was said against what was owed."""
        hold(
            answered is None or answered(said),
            "whoever is asked answers",
            lambda: f"{who} heard {heard}, said {[str(m.header) for m in said] or 'nothing'}",
        )

    # --- the broker

    def of_broker(self, peer: bytes, header: Header, *, from_worker: bool) -> Answered | None:
        """What the broker owes a peer."""
        tables, kind, id_ = self._world.broker.core.tables, header.kind, header.request
        if kind in _INTRODUCTIONS:
            met, line = _says(Kind.WELCOME, Kind.ERROR), self._world.broker.owner[peer].line
            there = line is not None and line.peer == peer  # else it has left that connection, perhaps for another one
            return lambda said: met(said) or peer in tables.rivals or not there
        known = tables.pool.member(peer) if from_worker else tables.clients.by_peer.get(peer)
        if known is None:
            return _says(Kind.WHO)
        if kind in (Kind.PING, Kind.HB):
            return _says(Kind.PONG)
        if kind is Kind.STATUS:
            return _of(id_, Kind.REPORT)
        return self._of_broker_to_worker(peer, header) if from_worker else self._of_broker_to_client(known, header)

    def _of_broker_to_client(self, client: object, header: Header) -> Answered | None:
        requests, id_ = self._world.broker.core.tables.requests, header.request
        owner = requests[id_].client if id_ in requests else None

        def waits() -> bool:
            """An end waits for room in the pipe, or behind what comes before it."""
            request = requests.get(id_)
            return request is not None and request.client is client and request.state is State.DONE

        match header.kind:
            case Kind.SUBMIT | Kind.ATTACH:
                taken, new = _of(id_, Kind.ACCEPTED, *wire.TERMINALS), owner is None

                def given() -> bool:
                    """It went to a worker at once: the answer is that one's first word."""
                    return new and id_ in requests and requests[id_].lease is not None

                return lambda said: taken(said) or waits() or given()
            case Kind.CREDIT if owner is not client:
                return _of(id_, Kind.WHO)
            case Kind.CANCEL:
                over = _of(id_, *wire.TERMINALS)
                return lambda said: over(said) or (waits() and (client.blocked or id_ in client.waiting))
        return None

    def _of_broker_to_worker(self, peer: bytes, header: Header) -> Answered | None:
        tables = self._world.broker.core.tables
        key = (header.request, header.attempt)
        about = {"request": header.request, "attempt": header.attempt}
        lease = tables.pool.leases.get(key)
        mine = lease is not None and lease.worker.peer == peer
        if header.kind is Kind.HELD:
            decided = _says(Kind.REPLAY, Kind.RESET, Kind.STOP, **about)

            def waits() -> bool:
                """Its client has not come yet."""
                taken = tables.pool.leases.get(key)
                return taken is not None and taken.request.state is State.RECOVERING

            return lambda said: decided(said) or waits()
        if header.kind not in _OF_ATTEMPTS:
            return None
        if mine:
            ended = header.kind in wire.TERMINALS and lease.stopping is not None
            return _says(Kind.ENDACK, **about) if ended else None
        request = tables.requests.get(header.request)
        origin = None if request is None else request.origin
        again = origin is not None and origin.key == key and origin.worker.peer == peer
        return None if again else _says(Kind.RESET, **about)

    # --- workers and clients

    def of_worker(self, worker: WorkerProcess, header: Header) -> Answered | None:
        """What a worker owes the broker."""
        core = worker.core
        key, about = Key(header.request, header.attempt), {"request": header.request, "attempt": header.attempt}
        match header.kind:
            case Kind.WHO if core.welcomed:
                return _says(Kind.REGISTER)
            case Kind.DIE:
                return lambda _: not worker.alive
            case Kind.WELCOME if not core.welcomed and header.seq == core._presence.introduction:
                return lambda said: not worker.alive or sum(m.kind is Kind.HELD for m in said) == core.requests
            case Kind.RUN if core.welcomed and (key in core._requests or header.attempt > 1):
                return _says(Kind.RUNACK, Kind.RESET, *wire.TERMINALS, **about)
            case Kind.RUN if core.welcomed:
                over = _says(Kind.RESET, *wire.TERMINALS, **about)
                return lambda said: (
                    over(said) or key in core._requests
                )  # it says RUNACK soon, unless output comes first
            case Kind.STOP if core.welcomed:
                stopped = _says(*wire.TERMINALS, **about)
                return lambda said: stopped(said) or self._stops(worker, key)
            case Kind.REPLAY if core.welcomed:
                absent = _says(Kind.RESET, **about)
                return lambda said: absent(said) or key in core._requests
        return None

    def _stops(self, worker: WorkerProcess, key: Key) -> bool:
        """The engine has not let go of it yet."""
        request = worker.core._requests.get(key)
        return request is not None and request.stream.terminal is None

    def of_client(self, client: ClientProcess, header: Header) -> Answered | None:
        """What a client owes the broker."""
        if client.closing:
            return None
        core, id_ = client.core, header.request
        exchange, call = core._exchanges.get(id_), client.calls.get(id_)
        match header.kind:
            case Kind.WHO if id_ == wire.NO_ID:
                return _says(Kind.HELLO) if core.state is connection.State.READY else None
            case Kind.WHO if call is not None and call.open and call.cancelled > self._world.clock.now:
                return _of(id_, Kind.ATTACH)
            case Kind.WELCOME if core.state is connection.State.GREETING and header.seq == core._presence.introduction:
                asked = [each for each in core._exchanges if client.calls[each].open]
                return lambda said: {m.header.request for m in said}.issuperset(
                    i for i in asked if i in core._exchanges
                )
            case kind if kind in wire.TERMINALS and id_ in client.calls:
                acknowledged = _of(id_, Kind.ENDACK)
                early = exchange is not None and header.seq > exchange.received
                return lambda said: acknowledged(said) or (early and id_ in core._exchanges)
        return None
