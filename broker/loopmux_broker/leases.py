"""Saying to workers what concerns one attempt: run it, stop it, send it again, and the end of its slot."""

from __future__ import annotations

from loopmux import codec
from loopmux.messages import Run
from loopmux.wire import Header, Kind, Message, StopReason
from loopmux_broker.dispatch import session_of
from loopmux_broker.events import Send, say
from loopmux_broker.pool import Lease
from loopmux_broker.requests import Step
from loopmux_broker.tables import Alarm, Tables


class Leases:
    """The broker's side of every attempt that a worker has."""

    def __init__(self, tables: Tables) -> None:
        self._t = tables

    def run(self, lease: Lease, now: float) -> None:
        """Give the request to its worker, with the tokens that it has produced so far."""
        request, submit = lease.request, lease.request.submit
        instance = request.client.instance
        run = Run(
            submit.model,
            submit.adapter,
            None if submit.session is None else session_of(instance, submit.session),
            max(request.deadline - now, 0.0),
            submit.deterministic,
            submit.trace,
            instance,
        )
        header = Header(Kind.RUN, request.id, attempt=lease.attempt)
        message = Message(header, codec.pack(run), request.body, bytes(request.output.ids))
        self._t.out.append(Send(lease.worker.peer, message))
        self._t.timers.set((Alarm.RUN, *lease.key), now + self._t.config.resend)

    def started(self, lease: Lease) -> bool:
        """The worker has the request: RUNACK, or output came. Returns whether it is the first that is heard of it."""
        if lease.acknowledged:
            return False
        lease.acknowledged = True
        self._t.timers.cancel((Alarm.RUN, *lease.key))
        if lease.stopping:
            return False
        lease.request.move(Step.STARTED)
        return True

    def stop(self, lease: Lease, reason: StopReason, now: float) -> None:
        """Tell a worker to stop; its slot stays taken until it says that it has."""
        lease.stopping = reason
        self._t.timers.cancel((Alarm.RUN, *lease.key))
        self._t.timers.set((Alarm.STOP, *lease.key), now + self._t.config.resend)
        self._t.out.append(Send(lease.worker.peer, say(Kind.STOP, lease.key[0], arg=reason, attempt=lease.attempt)))

    def replay(self, lease: Lease) -> None:
        """Ask for everything behind what is here."""
        total = lease.request.output.total
        replay = say(Kind.REPLAY, lease.key[0], seq=total, attempt=lease.attempt)
        self._t.out.append(Send(lease.worker.peer, replay))

    def end(self, lease: Lease) -> None:
        """The attempt is over, one way or another: its slot and its timers are free."""
        self._t.timers.cancel((Alarm.RUN, *lease.key))
        self._t.timers.cancel((Alarm.STOP, *lease.key))
        self._t.pool.release(lease)
        if lease.charged:
            self._t.queues.settle(lease.request, lease.charged, max(lease.request.output.total - lease.prefix, 0))
        self._t.vacant[lease.worker] = None
