"""Workers and launchers come, are lost, and leave."""

from __future__ import annotations

from typing import Any

from loopmux import codec
from loopmux.errors import BadRequestError, ProtocolError
from loopmux.messages import Register
from loopmux.wire import ID_SIZE, WORKER_BODY_LIMIT, Kind, Message
from loopmux_broker.adapters import Adapters
from loopmux_broker.attempts import Attempts
from loopmux_broker.ends import error_to
from loopmux_broker.events import Log, Peer, Send, say
from loopmux_broker.introductions import agree, another_key, no_common_version, welcome
from loopmux_broker.leases import Leases
from loopmux_broker.pool import Launcher, Registration, Worker
from loopmux_broker.recovery import Recovery
from loopmux_broker.tables import Alarm, Tables
from loopmux_broker.waiting import Waiting

_REPORT_LIMITS = codec.Limits(array=256, map=256, size=16 * 1024)
"""A worker's report is for people; the broker decodes it, so it takes no more than a page of text in one field."""
_LONGEST_REPORT = 32 * 1024
"""Bytes of it: the broker keeps it, and whoever asks for STATUS gets those of all workers in one message."""
_REDECLARE = 5.0
"""Seconds for which a new launcher process may repeat what the last one declared, before the rest is taken out."""
_LOST_LAUNCHERS = 100
"""Launchers that are gone and waited for: what they declared stays. Of more the first ones are given up: a launcher
is named after its host, and a container may be another one with each start."""


class Membership:
    """Who is there, under which name and over which connection, and what follows when that changes."""

    def __init__(
        self,
        tables: Tables,
        attempts: Attempts,
        leases: Leases,
        recovery: Recovery,
        waiting: Waiting,
        adapters: Adapters,
    ) -> None:
        self._t, self._attempts, self._leases, self._recovery = tables, attempts, leases, recovery
        self._waiting, self._adapters = waiting, adapters
        self._lost_launchers: dict[str, None] = {}  # launchers that are waited for, by name, the longest gone first

    def register(self, peer: Peer, message: Message, key: str, now: float) -> None:
        """REGISTER: a worker or a launcher introduces itself.

        Raises:
            ProtocolError: malformed, or says what cannot be.
        """
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
            self._t.out.append(error_to(peer, BadRequestError(text)))
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
        """A launcher has had its time to declare its models: what it has not named since it registered is taken out.

        Of one that left, and that nobody has followed, that is all.
        """
        launcher = next((x for x in self._t.pool.launchers.values() if x.name == name), None)
        if launcher is None:
            self._lost_launchers.pop(name, None)
            self._withdraw(name, None, now)
        else:
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

    def lost(self, member: Worker | Launcher, why: str, now: float, stay: float = 0.0) -> None:
        """A worker or launcher is gone. What a launcher declared stays until it is back or given up.

        Args:
            stay: and after its BYE for so many seconds at most.
        """
        role, left = member.register.role, why == "left"
        self._t.out.append(Log("info" if left else "warning", f"{role} {why}", {"name": member.name}))
        self._t.counters[f"{role}s_left" if left else f"{role}s_lost"] += 1
        self._t.timers.cancel((Alarm.MEMBER_SILENT, member.peer, 0))
        self._t.pool.leave(member)
        if isinstance(member, Worker):
            for model in member.models:
                self._waiting.model_changed(model, now)
            self._attempts.worker_lost(member, why, now, planned=left)
            for model in member.models:
                self._waiting.model_left(model, now) if left else self._waiting.worker_lost(model, now)
            self._adapters.lost(member, why, now)
        elif left and not stay:
            self._withdraw(member.name, None, now)
        else:
            self._t.timers.cancel((Alarm.LAUNCHER, member.name, 0))
            if left:
                self._t.timers.set((Alarm.LAUNCHER, member.name, 0), now + stay)
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
