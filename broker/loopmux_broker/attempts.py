"""The attempts at a request: which worker gets it, and what comes of it when that worker is lost.

A request that has produced tokens goes on elsewhere behind them (its prefix); its client sees a pause. One that has
lost two workers gets the third for itself, so that a request that kills workers takes no others along and is found out.
"""

from __future__ import annotations

from enum import Enum

from loopmux.errors import EngineError, LoopmuxError, WorkerLostError
from loopmux.results import Usage
from loopmux.wire import Kind, StopReason
from loopmux_broker.dispatch import choose, choose_alone
from loopmux_broker.ends import Ends
from loopmux_broker.events import Send, say
from loopmux_broker.leases import Leases
from loopmux_broker.pool import Lease, Worker
from loopmux_broker.requests import Request, State, Step
from loopmux_broker.tables import Alarm, Tables
from loopmux_broker.waiting import Waiting

LAST_ATTEMPT = 60_000
"""The highest number of an attempt: it has to fit into a header, and so has what peers answer. Nobody may claim to have
seen a higher one."""
_MISHAPS = 10
"""Attempts at one request without a token in between that may come to nothing by no fault of its own. Only many workers
that go together, or a fault of a peer or of ours, bring it there; it must not go on until the deadline, as fast as
messages travel."""


class Cause(Enum):
    """Why an attempt is over before the request is; the value is the counter's name."""

    LOST = "requeued"
    """Its worker is gone, or does not answer: perhaps because of the request."""
    LEFT = "migrated"
    """Its worker leaves in good order."""
    MISHAP = "mishaps"
    """Not by the request: its worker lives, but does not have it, or its output has a hole; or the worker was gone, or
    did not answer, before it said that it has it; or it is gone since the broker itself was away."""


def _blame(lease: Lease) -> Cause:
    """Why an attempt is over whose worker is gone or does not answer.

    Workers may go together, when their launcher or host does: then a request is given to one after the other of them
    before it is known. From the second attempt on a worker acknowledges before it begins, so one that did not is not
    lost by the request. One that took the broker for dead, and has not found the way back in time, is not either.
    """
    began = lease.acknowledged or lease.attempt == 1
    return Cause.LOST if began and not lease.worker.away else Cause.MISHAP


class Attempts:
    """Gives requests to workers and takes them away again."""

    def __init__(self, tables: Tables, leases: Leases, ends: Ends, waiting: Waiting) -> None:
        self._t, self._leases, self._ends, self._waiting = tables, leases, ends, waiting

    # --- slots

    def worker_for(self, request: Request) -> Worker | None:
        """A worker with a free slot for the request; then nobody else waits for that slot."""
        if request.alone:
            return None
        return choose(self._t.pool.serving(request.submit.model), request, self._t.affinity)

    def place(self, request: Request, worker: Worker | None, now: float) -> None:
        """To the free worker if there is one, unless its session's is worth a moment's wait; else into the queue.

        Where the queue is full nobody waits in it who could run.
        """
        if worker is not None:
            if self._t.admission.full(request.client.principal) or not self._goes_home(request, worker, now):
                self._dispatch(request, worker, now)
            return
        self._t.enqueue(request)
        if request.alone:
            emptied = choose_alone(self._t.pool.serving(request.submit.model), request)
            if emptied is not None:
                self._hold(emptied, request)

    def _goes_home(self, request: Request, free: Worker, now: float) -> bool:
        """Whether it waits for the worker that ran its session last, though another one is free; then it is queued."""
        home = self._t.affinity.last(request)
        if request.attempt or home is None or home == free.name:
            return False
        left = request.arrived + self._t.affinity.patience(request, free) - now
        if left <= 0:
            return False
        serving = self._t.pool.serving(request.submit.model)
        if not any(w.name == home and w.open and w.serves(*request.lane) for w in serving):
            return False
        request.awaits = home
        self._t.enqueue(request)
        self._t.timers.set((Alarm.HOME, request.id, 0), now + left)
        return True

    def waited(self, request: Request, now: float) -> None:
        """It waits no more for the worker of its session, which has a slot, was busy for too long, or leaves.

        If another turn took the session elsewhere meanwhile, it follows where that is free, and waits no second time.
        """
        self._t.dequeue(request)
        worker = self.worker_for(request)
        if worker is None:
            self._t.enqueue(request)
        else:
            self._dispatch(request, worker, now)

    def fill(self, now: float) -> None:
        """Give free slots to who waits, on every worker that may have got one."""
        while self._t.vacant and self._t.queues.length:
            worker = next(iter(self._t.vacant))
            del self._t.vacant[worker]
            if self._t.pool.workers.get(worker.peer) is worker:
                self._fill(worker, now)
        self._t.vacant.clear()

    def _fill(self, worker: Worker, now: float) -> None:
        if worker.open and (alone := self._t.queues.next_alone(worker)) is not None:
            self._hold(worker, alone)
        if worker.held_for is not None:
            if not (worker.leases or worker.draining or worker.expected or worker.away):
                alone = worker.held_for
                self._t.dequeue(alone)
                self._dispatch(alone, worker, now)
            return
        while worker.free > 0 and (request := self._t.queues.next_for(worker)) is not None:
            if request.awaits:
                self.waited(request, now)
                continue
            self._t.dequeue(request)
            if not self._goes_home(request, worker, now):
                self._dispatch(request, worker, now)

    def _hold(self, worker: Worker, request: Request) -> None:
        """Empty a worker for a request: it gets nothing new until then."""
        worker.held_for, request.held_by = request, worker
        self._t.vacant[worker] = None

    def _dispatch(self, request: Request, worker: Worker, now: float) -> None:
        number = request.attempt + 1
        while (request.id, number) in self._t.pool.leases:
            number += 1  # one that is still being stopped, of which the client has heard nothing
        request.move(Step.DISPATCHED)
        if number > LAST_ATTEMPT:
            self._used_up(request, now)
            return
        request.attempt = request.given = number
        self._leases.begins(worker, now)
        cold = self._t.affinity.cold(request, worker)
        lease = request.lease = self._t.pool.lease(request, worker, now)
        lease.cold = cold
        self._t.queues.charge(request)
        self._t.affinity.ran(request, worker.name)
        self._leases.run(lease, now)
        self._leases.watch(worker)
        if self._t.traced:
            self._t.trace("attempt begins", request.id, attempt=number, worker=worker.name, tokens=request.output.total)

    def run_unanswered(self, lease: Lease, now: float) -> None:
        """RUN was not answered for a while: say it again, or give the attempt up."""
        if lease.worker.away:
            lease.since = now  # it cannot hear it: its time to answer begins when it is back
        if now - lease.since < self._t.config.run_timeout:
            self._leases.run(lease, now)
            return
        self._leases.stop(lease, StopReason.SUPERSEDED, now)
        self._lost(lease, f"did not answer within {self._t.config.run_timeout:g} s", now, _blame(lease))

    def release(self, lease: Lease, now: float) -> None:
        """A worker gives a slot back."""
        lease.worker.served += 1
        self._leases.end(lease)
        self._leases.went_on(lease.worker, now)

    # --- losses

    def worker_lost(self, worker: Worker, why: str, now: float, *, planned: bool = False) -> None:
        """A worker is gone: what it ran goes on elsewhere. A ``planned`` leaving is no request's fault."""
        self._t.timers.cancel((Alarm.STALL, worker.peer, 0))
        self._t.timers.cancel((Alarm.DRAIN, worker.peer, 0))
        self._t.timers.cancel((Alarm.HELD, worker.peer, 0))
        if worker.held_for is not None:
            worker.held_for.held_by = None
            worker.held_for = None
        for request in self._t.queues.awaiting(worker):
            self.waited(request, now)
        leases = list(worker.leases.values())
        for lease in leases:
            self._leases.end(lease)
        for lease in leases:
            if not lease.stopping:
                self._lost(lease, why, now, Cause.LEFT if planned else _blame(lease))
        for other in self._t.pool.workers.values():
            self._t.vacant[other] = None  # whoever waited to run alone on the lost one needs another

    def not_there(self, lease: Lease, now: float) -> None:
        """A worker does not have an attempt that it was thought to have."""
        self._leases.end(lease)
        if not lease.stopping:
            self._lost(lease, "does not have it", now, Cause.MISHAP)

    def output_broken(self, lease: Lease, why: str, now: float) -> None:
        """A worker's output for a request has a hole: nothing after it can be used."""
        self._t.counters["gaps"] += 1
        self._leases.stop(lease, StopReason.SUPERSEDED, now)
        self._lost(lease, why, now, Cause.MISHAP)

    def ended_short(self, lease: Lease, total: int, now: float) -> None:
        """A worker ended a request, but not all of its output arrived."""
        self._t.counters["gaps"] += 1
        why = f"ended at {total} tokens of which {lease.request.output.total} arrived"
        self._lost(lease, why, now, Cause.MISHAP)

    def _lost(self, lease: Lease, why: str, now: float, cause: Cause) -> None:
        request, worker = lease.request, lease.worker
        if self._t.traced:
            self._t.trace("attempt lost", request.id, attempt=lease.attempt, worker=worker.name, why=why)
        request.lease, request.avoid = None, worker.name
        if request.state is State.RECOVERING:
            self._ends.disown(request, now)  # its client, if it lives, will submit it with its prefix
            return
        if lease.produced:
            request.excused = request.mishaps
        if request.output.total and request.fingerprint is None:
            request.fingerprint = worker.register.fingerprint(request.submit.model, request.submit.adapter)
        if cause is Cause.LOST:
            request.lost[lease.attempt] = worker.peer
        request.mishaps += cause is Cause.MISHAP
        if len(request.lost) >= self._t.config.max_attempts or request.fruitless >= _MISHAPS:
            self._give_up(request, worker.name, why, now)
            return
        self._t.counters[cause.value] += 1
        request.alone = len(request.lost) >= max(self._t.config.max_attempts - 1, 1)
        request.move(Step.REQUEUED)
        self.place(request, self.worker_for(request), now)
        self._waiting.review(request, now)

    def _give_up(self, request: Request, worker: str, why: str, now: float) -> None:
        found = f"worker {worker!r} {why} after {request.output.total} tokens"
        error: LoopmuxError
        if request.fruitless >= _MISHAPS:
            error = EngineError(
                f"{found}; {request.fruitless} attempts came to nothing, and not by the request: workers did not "
                "answer, or did not have it, or lost output of it. Submit it again when they run",
                retryable=True,
            )
        else:
            self._t.counters["poisoned"] += 1
            error = WorkerLostError(
                f"{found}; it ran this request alone and is the {len(request.lost)}. worker lost with it: the request "
                "itself may be what ends workers (poison), so it is not tried again",
                retryable=False,
            )
        self._ends.end(request, Kind.ERROR, error, now, worker=worker, usage=Usage(0, request.output.total))

    def _used_up(self, request: Request, now: float) -> None:
        """There is no number for another attempt. A client or worker that names a high one brings a request there."""
        error = EngineError(
            f"no attempt may have a number above {LAST_ATTEMPT}, and the last one at this request has "
            f"{request.attempt}: submit it again under another id",
            retryable=True,
        )
        self._ends.end(request, Kind.ERROR, error, now, usage=Usage(0, request.output.total))

    # --- leaving in good order

    def drain(self, worker: Worker, within: float, now: float) -> None:
        """A worker is about to leave: it gets nothing new, and what it runs has half of its time to end there."""
        worker.draining = True
        for request in self._t.queues.awaiting(worker):
            self.waited(request, now)
        if worker.held_for is not None:
            alone, worker.held_for = worker.held_for, None
            alone.held_by = None
            for other in self._t.pool.serving(alone.submit.model):
                self._t.vacant[other] = None
        alarm = (Alarm.DRAIN, worker.peer, 0)
        if now + within / 2 < self._t.timers.when(alarm):  # it says DRAIN again and again, perhaps more urgently
            self._t.timers.set(alarm, now + within / 2)
        for model in worker.models:
            self._waiting.model_left(model, now)

    def evict(self, worker: Worker, within: float, now: float) -> None:
        """An administrator wants a worker to leave."""
        worker.evicted = now + within
        self.drain(worker, within, now)
        self.tell_evicted(worker, now)

    def tell_evicted(self, worker: Worker, now: float) -> None:
        """Ask it to leave, with its every heartbeat until it says DRAIN."""
        if worker.evicted is not None:
            left = round(1000 * max(worker.evicted - now, 0.0))
            self._t.out.append(Send(worker.peer, say(Kind.DRAIN, arg=left)))

    def hand_over(self, worker: Worker, now: float) -> None:
        """What a leaving worker still runs goes on elsewhere."""
        for lease in list(worker.leases.values()):
            if not lease.stopping and lease.request.state is not State.RECOVERING:
                self._leases.stop(lease, StopReason.SUPERSEDED, now)
                self._lost(lease, "leaves", now, Cause.LEFT)
