"""Saying to workers what concerns one attempt: run it, stop it, send it again, and the end of its slot.

What a worker's engine is told to do is watched: it has to get on, also with stopping.
"""

from __future__ import annotations

from loopmux import codec
from loopmux.messages import Run
from loopmux.wire import Header, Kind, Message, StopReason
from loopmux_broker.dispatch import session_of
from loopmux_broker.events import Send, say
from loopmux_broker.pool import Lease, Worker
from loopmux_broker.requests import Step
from loopmux_broker.stalls import busy
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
        self._t.timers.set((Alarm.RUN, lease.request.id, lease.attempt), now + self._t.config.resend)

    def started(self, lease: Lease) -> bool:
        """The worker has the request: RUNACK, or output came. Returns whether it is the first that is heard of it."""
        if lease.acknowledged:
            return False
        lease.acknowledged = True
        self._t.timers.cancel((Alarm.RUN, lease.request.id, lease.attempt))
        if lease.since > self._t.back_at:  # it was asked after the broker had been away, and answers
            self._t.pardoned.discard(lease.worker.peer)
        if lease.stopping:
            return False
        lease.request.move(Step.STARTED)
        return True

    def stop(self, lease: Lease, reason: StopReason, now: float) -> None:
        """Tell a worker to stop; its slot stays taken until it says that it has."""
        self.begins(lease.worker, now)
        lease.stopping = reason
        self.watch(lease.worker)
        self._t.timers.cancel((Alarm.RUN, lease.request.id, lease.attempt))
        self._t.timers.set((Alarm.STOP, lease.request.id, lease.attempt), now + self._t.config.resend)
        self._t.out.append(Send(lease.worker.peer, say(Kind.STOP, lease.key[0], arg=reason, attempt=lease.attempt)))

    def stop_again(self, lease: Lease, now: float) -> None:
        """STOP was not answered for a while: say it again."""
        assert lease.stopping is not None
        self.stop(lease, lease.stopping, now)

    def begins(self, worker: Worker, now: float) -> None:
        """A worker is about to get something to do: if it had nothing, its standing still until now means nothing."""
        if not busy(worker):
            worker.moved = now

    def went_on(self, worker: Worker, now: float) -> None:
        """A worker has ended an attempt. Where only that one's larger budget let it stand still, others begin anew."""
        stall = self._t.config.stall
        if now > worker.moved + stall.shortest and (due := stall.due(worker)) is not None and due < now:
            worker.moved = now

    def watch(self, worker: Worker) -> None:
        """See to it that somebody looks whether the engine gets on: as soon as any attempt's budget can be used up.

        What the budgets are is looked up then: a worker's attempts are many, and come and go.
        """
        alarm = (Alarm.STALL, worker.peer, 0)
        if alarm not in self._t.timers and busy(worker):
            self._t.timers.set(alarm, worker.moved + self._t.config.stall.shortest)

    def replay(self, lease: Lease) -> None:
        """Ask for everything behind what is here. The worker keeps what the client does not have yet."""
        output = lease.request.output
        replay = say(Kind.REPLAY, lease.key[0], seq=output.total, arg=output.acknowledged, attempt=lease.attempt)
        self._t.out.append(Send(lease.worker.peer, replay))

    def end(self, lease: Lease) -> None:
        """The attempt is over, one way or another: its slot and its timers are free."""
        if lease.stopping is not None:
            self._t.timers.cancel((Alarm.STOP, lease.request.id, lease.attempt))
        elif not lease.acknowledged:
            self._t.timers.cancel((Alarm.RUN, lease.request.id, lease.attempt))
        self._t.pool.release(lease)
        if lease.request.lease in (lease, None):  # else another attempt runs
            self._t.queues.settle(lease.request)
        self._t.vacant[lease.worker] = None
