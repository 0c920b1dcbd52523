"""What workers and launchers say, and what comes of it."""

from __future__ import annotations

from typing import Any

from loopmux import codec, wire
from loopmux.errors import BadRequestError, ProtocolError
from loopmux.messages import Catalogue, Heartbeat, Held, Register
from loopmux.wire import ID_SIZE, MOST_TOKENS, WORKER_BODY_LIMIT, Header, Kind, Message
from loopmux_broker.adapters import Adapters
from loopmux_broker.attempts import Attempts
from loopmux_broker.dispatch import paced
from loopmux_broker.ends import Ends, protocol_failure
from loopmux_broker.entry import Entry
from loopmux_broker.events import Log, Peer, Send, say
from loopmux_broker.introductions import agree, another_key, no_common_version, welcome
from loopmux_broker.leases import Leases
from loopmux_broker.pool import Launcher, Lease, Registration, Worker
from loopmux_broker.recovery import Recovery
from loopmux_broker.report import demand
from loopmux_broker.requests import State
from loopmux_broker.streams import Streams
from loopmux_broker.tables import Alarm, Tables
from loopmux_broker.waiting import Waiting

_REPORT_LIMITS = codec.Limits(array=256, map=256, size=16 * 1024)
"""A worker's report is for people; the broker decodes it, so it takes no more than a page of text in one field."""
_LONGEST_REPORT = 32 * 1024
"""Bytes of it: the broker keeps it, and whoever asks for STATUS gets those of all workers in one message."""
_REDECLARE = 5.0
"""Seconds for which a new launcher process may repeat what the last one declared, before the rest is taken out."""
_LOST_LAUNCHERS = 100
"""Lost launchers that are waited for: what they declared stays. Of more the longest lost ones are given up: a launcher
is named after its host, and a container may be another one with each start."""
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
    ) -> None:
        self._t, self._entry, self._attempts, self._leases, self._recovery = tables, entry, attempts, leases, recovery
        self._ends, self._waiting, self._streams, self._adapters = ends, waiting, streams, adapters
        self._lost_launchers: dict[str, None] = {}  # launchers that are lost, by name, the longest lost first

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
            self._register(peer, message, key, now)
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
                self.lost(worker, "left", now)
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
                self.lost(launcher, "left", now)
                self._withdraw(launcher.name, None, now)
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

    # --- membership

    def _register(self, peer: Peer, message: Message, key: str, now: float) -> None:
        register = codec.unpack(Register, message.route)
        report = _report(message.body)
        if len(register.boot) != ID_SIZE or not register.name:
            raise ProtocolError(f"REGISTER: expected a name and a boot id of {ID_SIZE} bytes")
        if register.role == "worker" and (register.slots < 1 or not register.models):
            raise ProtocolError("REGISTER: a worker needs at least one slot and one model")
        version = agree(register.versions)
        if version is None:
            self._t.out.append(no_common_version(peer, register.versions))
        elif (holder := self._t.pool.named(register)) is not None and holder.key != key:
            self._t.out += another_key(self._t, peer, register.role, register.name, key, holder.key)
        elif self._may_join(peer, register, message.header.seq, now):
            self._join(peer, register, report, message.header.seq, key, now)
            self._t.out.append(welcome(self._t, peer, version, WORKER_BODY_LIMIT, message.header.seq))
            self._joined(peer, now)

    def _may_join(self, peer: Peer, register: Register, introduction: int, now: float) -> bool:
        """Whether the name is free, or will not be freed (then the newcomer is told), or is still to be seen."""
        holder = self._t.pool.named(register)
        if holder is None or holder.peer == peer or holder.register.boot == register.boot:
            self._t.rivals.pop(peer, None)
            if holder is not None and holder.peer != peer and introduction < holder.introduction:
                self._t.counters["outdated"] += 1  # read late: the process has left that connection for the present one
                return False
            return True
        first = self._t.rivals.setdefault(peer, now)
        if holder.heard >= first + self._t.config.heartbeat / 2:
            del self._t.rivals[peer]
            text = (
                f"the {register.role} name {register.name!r} is taken by a living process "
                f"(pid {holder.register.pid} on {holder.register.host or 'this host'}): stop it or choose another name"
            )
            self._t.out.append(protocol_failure(peer, BadRequestError(text)))
        return False

    def _join(
        self, peer: Peer, register: Register, report: dict[str, Any], introduction: int, key: str, now: float
    ) -> None:
        pool = self._t.pool
        there = pool.member(peer)
        if there is not None and (there.register.boot, there.name) != (register.boot, register.name):
            self.lost(there, "was replaced", now)
        member = pool.named(register)
        if member is None:
            common = (peer, register, now, now, introduction, key)
            member = Worker(*common, report) if register.role == "worker" else Launcher(*common)
            self._t.out.append(Log("info", f"{register.role} joined", {"name": register.name, "pid": register.pid}))
        else:
            pool.leave(member)
            for alarm in (Alarm.MEMBER_SILENT, Alarm.HELD, Alarm.STALL, Alarm.DRAIN):
                self._t.timers.cancel((alarm, member.peer, 0))
            member.renew(peer, register, introduction, now)
            if isinstance(member, Worker):
                member.report = report
        if isinstance(member, Worker):
            member.expected = register.held
            for lease in member.leases.values():
                # RUN and STOP are said again until they are answered: they may have been sent after this REGISTER was.
                lease.missing = lease.acknowledged and lease.stopping is None
            if register.held:
                self._t.timers.set((Alarm.HELD, peer, 0), now + self._t.config.claim_wait)
        pool.join(member)
        if isinstance(member, Worker):
            self._t.queues.unite(member.models)
        self._t.timers.set((Alarm.MEMBER_SILENT, peer, 0), now + self._t.patience)

    def _joined(self, peer: Peer, now: float) -> None:
        member = self._t.pool.member(peer)
        if isinstance(member, Worker):
            for model in (*member.models, *(one.id for one in member.register.left_out)):
                self._waiting.model_changed(model, now)
            if not member.expected:
                self._recovery.introduced(member, now)
            self._leases.watch(member)
            self._adapters.joined(member, now)
        elif isinstance(member, Launcher):
            self._lost_launchers.pop(member.name, None)
            self._t.timers.set((Alarm.LAUNCHER, member.name, 0), now + _REDECLARE)

    def redeclared(self, name: str, now: float) -> None:
        """A launcher has had its time to declare its models: what it has not named since it registered is taken out."""
        launcher = next((x for x in self._t.pool.launchers.values() if x.name == name), None)
        if launcher is not None:
            launcher.declared = True
            self._withdraw(name, launcher.registration, now)
            self._adapters.settled(now)

    def _withdraw(self, name: str, keep: Registration | None, now: float) -> None:
        for model in self._t.pool.withdraw(name, keep=keep):
            self._waiting.model_withdrawn(model, now)

    def silent(self, member: Worker | Launcher, now: float) -> None:
        """The time has come to see whether a worker or launcher was silent for too long."""
        due = member.heard + self._t.patience
        if now < due:
            self._t.timers.set((Alarm.MEMBER_SILENT, member.peer, 0), due)
        else:
            self.lost(member, f"was silent for {now - member.heard:.1f} s", now)

    def cut(self, member: Worker | Launcher) -> None:
        """A connection closed because the broker was away, perhaps: who comes back in time was never gone."""
        member.away = True
        self._t.timers.cancel((Alarm.HELD, member.peer, 0))  # it has not had its time to say what it has

    def lost(self, member: Worker | Launcher, why: str, now: float) -> None:
        """A worker or launcher is gone. What a launcher declared stays until it says BYE, is back or is given up."""
        role = member.register.role
        self._t.out.append(Log("info" if why == "left" else "warning", f"{role} {why}", {"name": member.name}))
        self._t.counters[f"{role}s_left" if why == "left" else f"{role}s_lost"] += 1
        self._t.timers.cancel((Alarm.MEMBER_SILENT, member.peer, 0))
        self._t.pool.leave(member)
        if isinstance(member, Worker):
            for model in member.models:
                self._waiting.model_changed(model, now)
            self._attempts.worker_lost(member, why, now, planned=why == "left")
            if why == "left":
                for model in member.models:
                    self._waiting.model_left(model, now)
            else:
                for model in member.models:
                    self._waiting.worker_lost(model, now)
            self._adapters.lost(member, why, now)
        elif why != "left":
            self._lost_launchers[member.name] = None
            if len(self._lost_launchers) > _LOST_LAUNCHERS:
                name = next(iter(self._lost_launchers))
                del self._lost_launchers[name]
                self._withdraw(name, None, now)

    def stalled(self, worker: Worker, now: float) -> None:
        """The time has come to see whether a worker's engine stands still."""
        due = self._t.config.stall.due(worker)
        if due is None:
            return
        if now < due:
            self._t.timers.set((Alarm.STALL, worker.peer, 0), min(due, now + self._t.config.stall.shortest))
            return
        self._t.counters["stalled"] += 1
        # Its own thread lives and can end the process, which no signal to the engine could.
        self._t.out.append(Send(worker.peer, say(Kind.DIE)))
        self.lost(worker, f"made no progress for {now - worker.moved:.0f} s", now)


def _report(body: bytes) -> dict[str, Any]:
    if len(body) > _LONGEST_REPORT:
        raise ProtocolError(f"REGISTER has a report of {len(body)} bytes, at most {_LONGEST_REPORT} are accepted")
    try:
        return codec.build(dict[str, Any], codec.decode(body, _REPORT_LIMITS) if body else {}, "report")
    except codec.FieldError as error:
        raise ProtocolError(f"REGISTER: {error}") from error
