"""What workers and launchers say, and what comes of it."""

from __future__ import annotations

from loopmux import codec, wire
from loopmux.errors import ProtocolError
from loopmux.messages import Catalogue, Heartbeat, Held
from loopmux.wire import MOST_TOKENS, WORKER_BODY_LIMIT, Header, Kind, Message
from loopmux_broker.adapters import Adapters
from loopmux_broker.attempts import Attempts
from loopmux_broker.dispatch import paced
from loopmux_broker.ends import Ends
from loopmux_broker.entry import Entry
from loopmux_broker.events import Peer, Send, say
from loopmux_broker.leases import Leases
from loopmux_broker.membership import Membership
from loopmux_broker.pool import Launcher, Lease, Worker
from loopmux_broker.recovery import Recovery
from loopmux_broker.report import demand
from loopmux_broker.requests import State
from loopmux_broker.streams import Streams
from loopmux_broker.tables import Tables
from loopmux_broker.waiting import Waiting

_ENDS = wire.TERMINALS - {Kind.EXPIRED}
"""What a worker may end a request with: one that is with a worker does not expire in the queue."""


class WorkerSide:
    """Answers workers and launchers. Whoever has not registered is asked to."""

    def __init__(
        self,
        tables: Tables,
        entry: Entry,
        attempts: Attempts,
        leases: Leases,
        recovery: Recovery,
        ends: Ends,
        waiting: Waiting,
        streams: Streams,
        adapters: Adapters,
        members: Membership,
    ) -> None:
        self._t, self._entry, self._attempts, self._leases, self._recovery = tables, entry, attempts, leases, recovery
        self._ends, self._waiting, self._streams, self._adapters = ends, waiting, streams, adapters
        self._members = members

    def hear(self, peer: Peer, message: Message, data: bytes, key: str, now: float) -> None:
        """Handle one message; ``data`` is what it was made from, for passing on, ``key`` names the key of a REGISTER.

        Raises:
            ProtocolError: it is not one that a worker or launcher may send, is too large, or says what cannot be.
        """
        if len(data) > WORKER_BODY_LIMIT and max(len(message.body), len(message.tokens)) > WORKER_BODY_LIMIT:
            raise ProtocolError(
                f"{message.kind.name} has a BODY of {len(message.body)} bytes and TOKENS of {len(message.tokens)}: "
                f"workers and launchers may send {WORKER_BODY_LIMIT} of each"
            )
        worker, kind = self._t.pool.workers.get(peer), message.header.kind
        if worker is not None:
            worker.heard = now
            if kind is Kind.TOK:
                self._tok(worker, message, data, now)
                return
        if kind is Kind.REGISTER:
            self._members.register(peer, message, key, now)
        elif worker is not None:
            self._from_worker(worker, message, data, now)
        elif (launcher := self._t.pool.launchers.get(peer)) is not None:
            launcher.heard = now
            self._from_launcher(launcher, message, now)
        else:
            self._t.out.append(Send(peer, say(Kind.WHO)))

    def _from_worker(self, worker: Worker, message: Message, data: bytes, now: float) -> None:
        match message.kind:
            case kind if kind in _ENDS:
                self._terminal(worker, message, data, now)
            case Kind.RUNACK:
                lease = self._lease(worker, message)
                if lease is not None and self._leases.started(lease) and not lease.request.output.total:
                    self._entry.accept(lease.request)
            case Kind.HB:
                worker.load = codec.unpack(Heartbeat, message.route)
                if message.header.seq != worker.progress:
                    worker.progress, worker.moved = message.header.seq, now
                self._t.out.append(Send(worker.peer, say(Kind.PONG)))
                self._attempts.tell_evicted(worker, now)
            case Kind.HELD:
                self._recovery.held(worker, message.header, codec.unpack(Held, message.route), now)
            case Kind.RESET:
                lease = self._lease(worker, message)
                if lease is not None:
                    self._attempts.not_there(lease, now)
            case Kind.DONE:
                self._adapters.done(worker, message, now)
            case Kind.DRAIN:
                worker.evicted = None
                self._attempts.drain(worker, message.header.arg / 1000, now)
            case Kind.BYE:
                self._members.lost(worker, "left", now)
            case kind:
                raise ProtocolError(f"a worker may not send {kind.name}")

    def _from_launcher(self, launcher: Launcher, message: Message, now: float) -> None:
        match message.kind:
            case Kind.HB:
                launcher.note = codec.unpack(Heartbeat, message.route).note
                self._t.out.append(Send(launcher.peer, say(Kind.PONG)))
                self._tell_demand(launcher, now)
            case Kind.CATALOGUE:
                entry = codec.unpack(Catalogue, message.route)
                self._t.pool.declare(launcher, entry, now)
                self._waiting.model_withdrawn(entry.model, now)
                if entry.phase == "idle" and self._t.queues.waiting(entry.model):
                    self._t.cold.add(entry.model)  # it was stopped just when somebody came
                self._adapters.declared(entry, now)
            case Kind.DONE:
                self._adapters.done(launcher, message, now)
            case Kind.BYE:
                self._members.lost(launcher, "left", now, stay=message.header.arg / 1000)
            case kind:
                raise ProtocolError(f"a launcher may not send {kind.name}")

    # --- demand

    def tell_cold(self, now: float) -> None:
        """Have models started that somebody waits for, without waiting for their launchers' next heartbeat."""
        cold, self._t.cold = self._t.cold, set()
        for launcher in self._t.pool.launchers.values():
            if not cold.isdisjoint(self._t.pool.scaling(launcher)):
                self._tell_demand(launcher, now)

    def _tell_demand(self, launcher: Launcher, now: float) -> None:
        models = self._t.pool.scaling(launcher)
        if models:
            body = codec.pack(demand(self._t, models, now))
            self._t.out.append(Send(launcher.peer, Message(Header(Kind.SCALE), body=body)))

    # --- output

    def _lease(self, worker: Worker, message: Message) -> Lease | None:
        """The slot that a worker speaks of; one that is not its own is answered with RESET."""
        header = message.header
        lease = self._t.pool.leases.get((header.request, header.attempt))
        if lease is not None and lease.worker is worker:
            return lease
        self._t.counters["fenced"] += 1
        self._t.out.append(Send(worker.peer, say(Kind.RESET, header.request, attempt=header.attempt)))
        return None

    def _tok(self, worker: Worker, message: Message, data: bytes, now: float) -> None:
        header = message.header
        seq, count = header.seq, header.arg
        if count == 0 or len(message.tokens) != 4 * count or seq + count > MOST_TOKENS:
            found = f"TOK announces {count} tokens behind {seq} and has {len(message.tokens)} bytes of them"
            raise ProtocolError(f"{found}: a request has at most {MOST_TOKENS} tokens")
        lease = self._t.pool.leases.get((header.request, header.attempt))
        if lease is None or lease.worker is not worker or lease.stopping:
            if lease is None or not lease.stopping:
                self._lease(worker, message)
            return
        request = lease.request
        output = request.output
        if request.state is State.RECOVERING:
            self._t.counters["fenced"] += 1  # it was not asked for any yet
            return
        if not lease.acknowledged:
            self._leases.started(lease)
        if seq != output.total:
            self._misplaced(lease, seq, now)
            return
        worker.tokens += count
        worker.moved = now
        self._t.admission.output += output.add(seq, seq + count, data, message.tokens)
        lease.produced = True
        if lease.cold:
            paced(lease, now)
        if seq + count > request.foreseen:
            self._t.queues.outgrown(request)
        if output.held > self._t.config.request_output:
            self._ends.slow_client(request, now)
        else:
            self._streams.push(request, now)

    def _misplaced(self, lease: Lease, seq: int, now: float) -> None:
        total = lease.request.output.total
        if seq < total:
            self._t.counters["duplicates"] += 1
            return
        self._attempts.output_broken(lease, f"lost output (tokens {total} to {seq - 1} did not arrive)", now)

    def _terminal(self, worker: Worker, message: Message, data: bytes, now: float) -> None:
        header = message.header
        request = self._t.requests.get(header.request)
        origin = None if request is None else request.origin
        if origin is not None and origin.worker is worker and origin.attempt == header.attempt:
            return  # said again because the client has not acknowledged it yet
        lease = self._lease(worker, message)
        if lease is None:
            return
        if lease.stopping:
            self._t.out.append(Send(worker.peer, say(Kind.ENDACK, header.request, attempt=header.attempt)))
            self._attempts.release(lease, now)
        elif lease.request.state is State.RECOVERING:
            self._t.counters["fenced"] += 1
        else:
            self._leases.started(lease)
            if header.seq == lease.request.output.total:
                self._ends.worker_ended(lease, message.kind, data, now)
            else:
                self._attempts.ended_short(lease, header.seq, now)
            self._attempts.release(lease, now)
