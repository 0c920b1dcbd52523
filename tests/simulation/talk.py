"""What processes say to each other, by the rules of docs/protocol.md, whatever becomes of the requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmux import codec, messages, wire
from loopmux.wire import Kind, Message
from simulation.broken import broken, hold
from simulation.dispatches import Dispatches
from simulation.workertalk import WorkerTalk

if TYPE_CHECKING:
    from simulation.client import ClientProcess
    from simulation.process import Endpoint
    from simulation.promise import Promise
    from simulation.worker import WorkerProcess

IDLE = frozenset({Kind.PING, Kind.PONG, Kind.HB, Kind.REGISTER, Kind.WELCOME, Kind.CATALOGUE, Kind.STATUS, Kind.REPORT})
"""What is said where nothing runs; processes may still be started again."""
RIVALS = ("kill launcher", "stop launcher", "hold", "freeze", "snap")
"""Faults after which a process may meet another one of its name."""


class Talk:
    """Watches every message of ours."""

    def __init__(self, promise: Promise) -> None:
        self._promise, self._world = promise, promise.world
        self.workers = WorkerTalk(promise.world)
        self.dispatches = Dispatches(promise.world)

    def _rested(self, who: object, message: Message) -> None:
        hold(
            not self._promise.resting or message.kind in IDLE,
            "who has nothing to say is silent",
            lambda: f"{who}: {message.header}",
        )

    def client_heard(self, client: ClientProcess, message: Message) -> None:
        """A message came to a client."""
        header = message.header
        if header.kind is Kind.ERROR:
            failure = codec.unpack(messages.Failure, message.body, codec.BODY_LIMITS)
            hold(failure.code != "protocol", "no peer of ours breaks the protocol", lambda: f"{client}: {failure}")
        if header.request == wire.NO_ID or header.request in client.questions:
            return
        call = client.calls.get(header.request)
        hold(
            call is not None or header.kind in (Kind.REPORT, Kind.DONE),
            "P7 nobody sees another's traffic",
            lambda: f"{client} got {header}",
        )
        if header.kind is Kind.TOK:
            hold(header.seq < call.granted, "credit is kept", lambda: f"{call} may have {call.granted}, got {header}")

    def client_said(self, client: ClientProcess, message: Message) -> None:
        """A client sends a message."""
        self._rested(client, message)
        header = message.header
        call = client.calls.get(header.request)
        if message.kind is Kind.CREDIT:
            call.granted, call.acknowledged = max(call.granted, header.seq), max(call.acknowledged, header.arg)
            window = self._world.profile.config.window
            if call.collect:
                if header.arg > call.read:
                    call.read, call.dealt = header.arg, self._world.clock.now
            else:
                hold(
                    header.arg == len(call.tokens),
                    "what came is acknowledged",
                    lambda: f"{call}: {header}, {len(call.tokens)} came",
                )
                hold(
                    header.seq <= call.read + window,
                    "credit is what a reader has room for",
                    lambda: f"{call}: {header}, read {call.read}",
                )
        elif message.kind is Kind.ATTACH:
            call.attached, call.granted = True, max(call.granted, header.arg)
            call.acknowledged = max(call.acknowledged, header.seq)
            hold(
                call.collect or header.seq == len(call.tokens), "what came is acknowledged", lambda: f"{call}: {header}"
            )
        elif message.kind is Kind.SUBMIT:
            call.granted = max(call.granted, self._world.profile.config.window)

    def broker_said(self, owner: Endpoint, peer: bytes, message: Message) -> None:
        """The broker sends a message."""
        self._rested("broker", message)
        if message.kind in wire.TERMINALS:
            self.dispatches.over(owner, message.header.request)
        match message.kind:
            case Kind.RUN:
                self.dispatches.run(owner, peer, message)
            case Kind.TOKACK:
                self._relayed(message.header)
            case Kind.REPLAY:
                self.dispatches.claimed(message.header.request)
            case Kind.ACCEPTED:
                self.dispatches.accepted(message)
            case Kind.ERROR:
                self.dispatches.refused(owner, peer, message)

    def _relayed(self, header: wire.Header) -> None:
        call = self._promise.calls[header.request]
        right = header.seq == header.arg <= call.acknowledged
        hold(right, "acknowledgements are the client's", lambda: f"{call}: {header}, it said {call.acknowledged}")

    def worker_heard(self, worker: WorkerProcess, message: Message) -> None:
        """A message came to a worker."""
        if message.kind in (Kind.WELCOME, Kind.REPLAY, Kind.RUN):
            self.workers.asked(worker)
        elif message.kind is Kind.TOKACK:
            self.workers.acknowledged(worker, message.header)
        elif message.kind is Kind.STOP:
            self.workers.stopped(worker, message.header)
        if message.kind is Kind.ERROR and not self.may_be_refused(worker):
            failure = codec.unpack(messages.Failure, message.body)
            broken("no peer of ours breaks the protocol", f"{worker}: {failure}")

    def worker_said(self, worker: WorkerProcess, message: Message) -> None:
        """A worker sends a message."""
        self._rested(worker, message)
        call = self._promise.calls.get(message.header.request)
        if message.kind is Kind.TOK and call is not None and call.collect:  # whose caller hears nothing until the end
            call.dealt = self._world.clock.now
        self.workers.said(worker, message)

    def may_be_refused(self, worker: WorkerProcess) -> bool:
        """Whether another process of the name may still be around: that of a launcher that was killed."""
        now = self._world.clock.now
        return self._promise.journal.count(RIVALS, now - 8.0, now) > 0
