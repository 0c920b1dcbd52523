"""The broker's core: one event in, a list of actions out. No input or output, no clock.

``ClientSide``, ``WorkerSide`` and ``AdminSide`` say what follows from a message, and ``Membership`` from who comes and
goes of workers and launchers. ``Entry`` lets requests in,
``Recovery`` takes up those of a former broker, ``Attempts`` gives them to workers, ``Ends`` ends them, ``Streams``
sends output on; they share ``Tables``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from loopmux import wire
from loopmux.errors import ProtocolError
from loopmux_broker.adapters import Adapters
from loopmux_broker.admin_side import AdminSide
from loopmux_broker.attempts import Attempts
from loopmux_broker.client_side import ClientSide
from loopmux_broker.config import BrokerConfig
from loopmux_broker.ends import Ends, error_to
from loopmux_broker.entry import Entry
from loopmux_broker.events import (
    Action,
    AdminSent,
    ClientSent,
    ConnectionLost,
    ConnectionsRefused,
    Event,
    FramesSent,
    KeyRefused,
    Log,
    LoopStalled,
    Peer,
    PushBlocked,
    SendFailed,
    Sent,
    TimerDue,
    WorkerSent,
)
from loopmux_broker.leases import Leases
from loopmux_broker.membership import Membership
from loopmux_broker.recovery import Recovery
from loopmux_broker.streams import Streams
from loopmux_broker.strikes import WINDOW
from loopmux_broker.tables import LIVENESS, PLENTY, SLICE, Alarm, Identity, Tables, TimerKey
from loopmux_broker.waiting import Waiting
from loopmux_broker.worker_side import WorkerSide

_IN_SLICES = frozenset({Alarm.ROUND, Alarm.CLIENT_LOST, Alarm.CLIENT_GRACE})
"""Timers that deal with many requests each."""
_MEMORY = "more memory, or lower `limits` in the file of settings"
_Find = Callable[[Any], Any]
_Ring = Callable[[Any, float], None]


class Broker:
    """What the broker does, as a function of what happens to it."""

    def __init__(
        self,
        config: BrokerConfig,
        *,
        epoch: bytes,
        now: float,
        pid: int = 0,
        software: str = "loopmux",
        traced: bool = False,
    ) -> None:
        """``epoch`` is 8 random bytes per process; ``now`` is on the same clock as that of every event.

        ``traced`` has each request's steps logged.
        """
        self.tables = Tables.empty(config, Identity(epoch, pid, software, now))
        t = self.tables
        t.traced = traced
        self._streams, self._leases = Streams(t), Leases(t)
        self._ends = Ends(t, self._streams, self._leases)
        self._waiting = Waiting(t, self._ends)
        self._attempts = Attempts(t, self._leases, self._ends, self._waiting)
        entry = Entry(t, self._attempts, self._waiting)
        self._recovery = Recovery(t, entry, self._attempts, self._leases, self._ends, self._waiting)
        self._adapters = Adapters(t, self._waiting)
        self._clients = ClientSide(t, entry, self._recovery, self._ends, self._streams, self._adapters)
        self._members = Membership(t, self._attempts, self._leases, self._recovery, self._waiting, self._adapters)
        self._workers = WorkerSide(
            t,
            entry,
            self._attempts,
            self._leases,
            self._recovery,
            self._ends,
            self._waiting,
            self._streams,
            self._adapters,
            self._members,
        )
        self._admins = AdminSide(t, self._attempts)
        self._warn_again_at: dict[str, float] = {}
        self._handlers: dict[type[Event], Callable[[Any, float], None]] = {
            WorkerSent: self._hear,
            ClientSent: self._hear,
            AdminSent: self._hear,
            FramesSent: self._hear,
            KeyRefused: self._key_refused,
            ConnectionsRefused: self._connections_refused,
            PushBlocked: self._blocked,
            SendFailed: self._send_failed,
            TimerDue: self._timer_due,
            ConnectionLost: self._connection_lost,
            LoopStalled: self._stalled,
        }
        self._alarms = self._by_alarm()
        if config.settle > 0:
            self.tables.timers.set((Alarm.SETTLED, b"", 0), now + config.settle)
        else:
            self._waiting.settled(now)

    def next_timer(self) -> float | None:
        """When ``TimerDue`` should be said at the latest, None if there is nothing to wait for.

        Where very many timers are due it stays in the past: they ring some at a time, others are heard in between.
        """
        return self.tables.timers.next()

    def handle(self, event: Event, now: float) -> list[Action]:
        """What is to be done about an event, in order. Raises nothing, whatever a peer sent."""
        try:
            self._handlers[type(event)](event, now)
            if self.tables.vacant:
                self._attempts.fill(now)
            if self.tables.cold:
                self._workers.tell_cold(now)
        except MemoryError:  # no bug; what was not answered for it is said again by whoever waits
            self._warn("out of memory", "out_of_memory", 1, {"handled": type(event).__name__, "remedy": _MEMORY}, now)
        except Exception:  # noqa: BLE001 - the one choke point: a bug met by one message must not stop all others
            self.tables.counters["internal_errors"] += 1
            fields: dict[str, object] = {"handled": type(event).__name__, "traceback": traceback.format_exc()}
            self.tables.out.append(Log("error", "internal error", fields))
        actions, self.tables.out = self.tables.out, []
        return actions

    def _hear(self, event: Sent, now: float) -> None:
        peer, data = event.peer, event.data
        strikes = self.tables.strikes
        if strikes.records and strikes.ignored(peer, now):
            return
        try:
            message = wire.from_bytes(data)
            if isinstance(event, WorkerSent):
                self._workers.hear(peer, message, data, event.key, now)
            elif isinstance(event, ClientSent):
                self._clients.hear(peer, message, event.key, now)
            elif isinstance(event, AdminSent):
                self._admins.hear(peer, message, now)
            else:
                several = ProtocolError(f"{message.kind.name} came in several frames, expected one")
                self._strike(peer, data, several, now)
        except ProtocolError as error:
            self._strike(peer, data, error, now)

    def _strike(self, peer: Peer, data: bytes, error: ProtocolError, now: float) -> None:
        tables = self.tables
        tables.counters["strikes"] += 1
        # Told under the request's id where the header can be read, so that the sender knows which one failed.
        request_id = data[6:22] if len(data) >= wire.HEADER_SIZE else wire.NO_ID
        tables.out.append(error_to(peer, error, request_id))
        if tables.strikes.strike(peer, now):
            fields: dict[str, object] = {"peer": peer.hex()}
            if wire.foreign(data):
                fields["reason"] = error.message  # it cannot read the answer
            self._warn(f"a peer is ignored for {WINDOW:g} s", "ignored", 1, fields, now)
        tables.timers.set((Alarm.STRIKES, peer, 0), now + WINDOW)

    def _key_refused(self, event: KeyRefused, now: float) -> None:
        fields: dict[str, object] = {"side": event.side, "address": event.address, "key": event.key}
        self._warn("a key was refused", "keys_refused", 1, fields, now)

    def _connections_refused(self, event: ConnectionsRefused, now: float) -> None:
        fields: dict[str, object] = {"side": event.side, "remedy": "a higher hard limit for open files (LimitNOFILE=)"}
        self._warn("too many connections", "connections_refused", event.count, fields, now)

    def _warn(self, what: str, counter: str, count: int, fields: dict[str, object], now: float) -> None:
        """Count it, and say so once in a while: whoever can reach a door could else fill the disk."""
        counters = self.tables.counters
        counters[counter] += count
        if now >= self._warn_again_at.get(what, now):
            self._warn_again_at[what] = now + WINDOW
            self.tables.out.append(Log("warning", what, fields | {"so_far": counters[counter]}))

    def _blocked(self, event: PushBlocked, now: float) -> None:
        client = self.tables.clients.by_peer.get(event.peer)
        request = self.tables.requests.get(event.request)
        if client is not None and request is not None and request.client is client:
            self._streams.block(client, request, event.seq, now)

    def _send_failed(self, event: SendFailed, _: float) -> None:
        raise event.error  # where a bug is counted and logged, whoever meets it

    def _timer_due(self, _: TimerDue, now: float) -> None:
        left, out = PLENTY, self.tables.out
        for key in self.tables.timers.due(now):
            self._ring(key, now)
            left -= SLICE if key[0] in _IN_SLICES else 1
            if left <= 0 or len(out) >= PLENTY:
                return

    def _connection_lost(self, event: ConnectionLost, now: float) -> None:
        tables, peer = self.tables, event.peer
        tables.strikes.forget(peer)
        tables.timers.cancel((Alarm.STRIKES, peer, 0))
        tables.rivals.pop(peer, None)
        client, member = tables.clients.by_peer.get(peer), tables.pool.member(peer)
        pardoned = peer in tables.pardoned and now < tables.back_at + tables.patience
        if client is not None and not pardoned:
            self._clients.lost(client, now)
        if member is not None:
            self._members.cut(member) if pardoned else self._members.lost(member, "lost its connection", now)

    def _stalled(self, event: LoopStalled, now: float) -> None:
        """Nobody was silent while the broker itself was away; whoever took it for dead has the time to come back."""
        tables, gap = self.tables, event.gap
        tables.counters["stalls"] += 1
        tables.pardoned = {*tables.clients.by_peer, *tables.pool.workers, *tables.pool.launchers}
        tables.back_at = now
        # what was read between the sleep and this word of it is not moved into the future
        for client in tables.clients.by_peer.values():
            client.heard = min(client.heard + gap, now)
        for member in (*tables.pool.workers.values(), *tables.pool.launchers.values()):
            member.heard = min(member.heard + gap, now)
        for worker in tables.pool.workers.values():
            worker.moved = min(worker.moved + gap, now)
        for lease in tables.pool.leases.values():
            lease.since = min(lease.since + gap, now)
        self._recovery.until += gap
        self._adapters.delay(gap)
        tables.timers.delay(lambda key: key[0] in LIVENESS, gap)

    def _ring(self, key: TimerKey, now: float) -> None:
        """Do what a timer was set for, if whoever it is about is still there."""
        find, ring = self._alarms[key[0]]
        about = find(key)
        if about is not None:
            ring(about, now)

    def _by_alarm(self) -> dict[Alarm, tuple[_Find, _Ring]]:
        """What timers are for: who each is about, by its key, and what is done about that one."""
        t, clients, pool = self.tables, self.tables.clients, self.tables.pool
        about: list[tuple[_Find, dict[Alarm, _Ring]]] = [
            (
                lambda key: pool.leases.get(key[1:]),
                {Alarm.RUN: self._attempts.run_unanswered, Alarm.STOP: self._leases.stop_again},
            ),
            (
                lambda key: t.requests.get(key[1]),
                {
                    Alarm.DEADLINE: self._ends.deadline,
                    Alarm.TERMINAL: self._streams.repeat_terminal,
                    Alarm.TOMBSTONE: lambda request, _: self._ends.forget(request),
                    Alarm.RECOVERY: self._recovery.unclaimed,
                    Alarm.HOME: self._attempts.waited,
                },
            ),
            (
                lambda key: clients.by_instance.get(key[1]),
                {
                    Alarm.CLIENT_BLOCKED: self._streams.unblock,
                    Alarm.CLIENT_LOST: self._ends.detach,
                    Alarm.CLIENT_GRACE: self._ends.abandon,
                },
            ),
            (lambda key: clients.by_peer.get(key[1]), {Alarm.CLIENT_SILENT: self._clients.silent}),
            (lambda key: pool.member(key[1]), {Alarm.MEMBER_SILENT: self._members.silent}),
            (
                lambda key: pool.workers.get(key[1]),
                {
                    Alarm.STALL: self._members.stalled,
                    Alarm.DRAIN: self._attempts.hand_over,
                    Alarm.HELD: self._recovery.introduced,
                },
            ),
            (
                lambda key: key[1],
                {
                    Alarm.STRIKES: self._strikes_age,
                    Alarm.LAUNCHER: self._members.redeclared,
                    Alarm.ROUND: self._waiting.go_on,
                    Alarm.MISSED: self._waiting.missed,
                    Alarm.ADAPTER: self._adapters.ring,
                    Alarm.SETTLED: self._settled,
                },
            ),
        ]
        return {alarm: (find, ring) for find, rings in about for alarm, ring in rings.items()}

    def _settled(self, _: bytes, now: float) -> None:
        self._waiting.settled(now)
        self._adapters.settled(now)

    def _strikes_age(self, peer: Peer, now: float) -> None:
        if not self.tables.strikes.expired(peer, now):
            self.tables.timers.set((Alarm.STRIKES, peer, 0), now + WINDOW)
