"""What a broker that was started again learns of requests from their clients (ATTACH) and their workers (HELD).

Each half waits for the other: the client's for a moment, the worker's until its client has brought all that it has (it
says ATTACH before its first PING), or all clients have had the time to come back.
HELD has the epoch of the broker that last wanted the request, so what this one wanted and does not know any more has
ended. If the halves fit, the worker goes on where the client is; if not, or if only the client comes, the request is
given to a worker anew, with the tokens that the client has. An attempt's number is never given out twice: both say the
highest that they have seen.
"""

from __future__ import annotations

import math

from loopmux.errors import OverloadedError, ProtocolError
from loopmux.messages import Held, Submit
from loopmux.wire import Header, Kind, StopReason
from loopmux_broker.attempts import LAST_ATTEMPT, Attempts
from loopmux_broker.clients import Client
from loopmux_broker.ends import Ends
from loopmux_broker.entry import Entry
from loopmux_broker.events import Send, say
from loopmux_broker.intake import exhausted, objection
from loopmux_broker.leases import Leases
from loopmux_broker.output import Output
from loopmux_broker.pool import Lease, Worker
from loopmux_broker.requests import Request, State, Step
from loopmux_broker.tables import Alarm, Tables
from loopmux_broker.waiting import Waiting

_MOST_LANES = 1_000
"""Lanes of one model, above which what a client calls its weights makes no new one: each dispatch looks at them all."""
_MOST_HELD = 256
"""Attempts that one worker may claim to hold, slots or not: ended ones wait for their client there."""


class Recovery:
    """Puts the halves of requests together."""

    def __init__(
        self, tables: Tables, entry: Entry, attempts: Attempts, leases: Leases, ends: Ends, waiting: Waiting
    ) -> None:
        self._t, self._entry, self._attempts = tables, entry, attempts
        self._leases, self._ends, self._waiting = leases, ends, waiting
        self.until = tables.identity.started + tables.config.orphan_grace
        """When clients have had the time to come with what they had with a former broker."""

    # --- the client's half

    def attach(self, client: Client, header: Header, submit: Submit, body: bytes, ids: bytes, now: float) -> None:
        """A client names a request that is unknown here, with the tokens that it has of it."""
        output = Output(header.arg)
        output.restore(ids)
        request = Request(header.request, client, submit, body, now, now + submit.timeout, output, State.RECOVERING)
        request.given = self._t.abandoned.get(request.id, 0)
        request.attempt = max(_numbered(header), request.given)
        request.brought, request.fingerprint = len(ids), submit.fingerprint
        if self._let_in(request, header.seq):
            self._t.abandoned.pop(request.id, None)
            self._t.counters["attached"] += 1
            self._t.timers.set((Alarm.RECOVERY, request.id, 0), now + self._t.config.claim_wait)
            self._entry.accept(request)

    def join(self, request: Request, header: Header, submit: Submit, body: bytes, ids: bytes, now: float) -> None:
        """The client of a request that only its worker knew."""
        worker_s = request.lease
        assert worker_s is not None
        attempt = _numbered(header)
        request.submit, request.body, request.deadline = submit, body, now + submit.timeout
        request.brought = len(ids)
        if not self._let_in(request, header.seq):
            request.submit, request.body, request.brought = Submit(submit.model), b"", 0
            request.deadline = math.inf
            return
        request.fingerprint = submit.fingerprint
        request.output.credit = header.arg if header.kind is Kind.ATTACH else self._t.config.window
        request.output.restore(ids)
        self._t.timers.cancel((Alarm.RECOVERY, request.id, 0))
        total = request.output.total
        holds = attempt <= worker_s.attempt and worker_s.start <= total <= worker_s.prefix
        if holds and worker_s.worker.serves(*request.lane):
            self._entry.accept(request)
            self._claimed(request, worker_s, now)
            return
        request.lease, request.attempt = None, max(request.attempt, attempt)
        self._leases.stop(worker_s, StopReason.SUPERSEDED, now)
        self._begin_anew(request, now)
        if request.state is not State.DONE:
            self._entry.accept(request)

    def complete(self, client: Client, now: float) -> None:
        """A client said its first PING, after all its ATTACHes: what only workers have of it, it does not want."""
        client.complete = True
        for request in [r for r in client.requests.values() if r.orphan]:
            self._ends.disown(request, now)

    def _let_in(self, request: Request, received: int) -> bool:
        t = self._t
        error = objection(t.pool, request, settled=t.joined(request.submit.model), returning=True)
        error = error or exhausted(t.admission, request, queues=True, returning=True)
        if error is None:
            self._entry.admit(request)
        else:
            self._entry.refuse(request.client, request.id, error, model=request.submit.model, received=received)
        return error is None

    def unclaimed(self, request: Request, now: float) -> None:
        """The other half has not come in time."""
        if request.lease is None:
            self._begin_anew(request, now)
        else:
            self._ends.disown(request, now)

    def _begin_anew(self, request: Request, now: float) -> None:
        worker = self._attempts.worker_for(request)
        if worker is None and request.fingerprint and self._t.queues.lanes(request.submit.model) >= _MOST_LANES:
            text = f"more than {_MOST_LANES} kinds of weights are waited for at this model: try again later"
            self._ends.end(request, Kind.ERROR, OverloadedError(text, retry_after=self._t.admission.retry_after()), now)
            return
        request.move(Step.REQUEUED)
        self._attempts.place(request, worker, now)
        self._waiting.review(request, now)

    # --- the worker's half

    def held(self, worker: Worker, header: Header, held: Held, now: float) -> None:
        """A worker that has just introduced itself names an attempt that it has."""
        _numbered(header)
        lease = self._t.pool.leases.get((header.request, header.attempt))
        request = self._t.requests.get(header.request)
        if lease is not None and lease.worker is worker:
            lease.missing = False
            self._again(lease, now)
        elif lease is not None:  # another worker's: two brokers that did not know of each other gave it the same number
            self._reset(worker, header)
        elif request is None:
            self._orphan(worker, header, held, now)
        elif self._fits(request, worker, header, held):
            self._claim(request, worker, header, now)
        else:
            if held.epoch == self._t.identity.epoch:
                self._acquit(request, worker, header.attempt)
            request.attempt = max(request.attempt, header.attempt)
            self._reset(worker, header)
        worker.expected = max(worker.expected - 1, 0)
        if not worker.expected:
            self.introduced(worker, now)

    def _again(self, lease: Lease, now: float) -> None:
        """It is known to have it, but over an older connection."""
        if lease.stopping is not None:
            self._leases.stop(lease, lease.stopping, now)
        elif lease.request.state is not State.RECOVERING:
            self._leases.started(lease)
            self._leases.replay(lease)

    def _fits(self, request: Request, worker: Worker, header: Header, held: Held) -> bool:
        """Whether the worker can go on where the request stands."""
        waits = request.state is State.QUEUED or (request.state is State.RECOVERING and request.lease is None)
        return (
            waits
            and request.client.instance == held.client
            and header.attempt >= request.attempt
            # Of a number that was given out here another worker's may come from a broker that did not know of this one.
            and (header.attempt != request.given or held.epoch == self._t.identity.epoch)
            and header.seq <= request.output.total <= header.arg
            and worker.serves(*request.lane)
        )

    def _claim(self, request: Request, worker: Worker, header: Header, now: float) -> None:
        if request.state is State.QUEUED:
            self._t.dequeue(request)
        if request.lost.pop(header.attempt, None):  # no worker was: this one has it still, only its connection broke
            request.alone = False
        self._t.timers.cancel((Alarm.RECOVERY, request.id, 0))
        request.attempt = header.attempt
        request.lease = self._t.pool.lease(request, worker, now)
        self._claimed(request, request.lease, now)

    def _acquit(self, request: Request, worker: Worker, attempt: int) -> None:
        """A worker that is back with an attempt by another connection was not lost: the one that it had before was.

        By the same connection comes back who hung, or was stopped, perhaps because of the request. If that was to run
        alone by then it still does: where it waits, or what was emptied for it, depends on that.
        """
        if request.lost.get(attempt, worker.peer) != worker.peer:
            del request.lost[attempt]
            request.mishaps += 1

    def _claimed(self, request: Request, lease: Lease, now: float) -> None:
        request.move(Step.CLAIMED)
        self._t.counters["recovered"] += 1
        lease.acknowledged, lease.prefix = True, request.output.total
        self._t.queues.charge(request)
        self._t.affinity.ran(request, lease.worker.name)
        lease.worker.moved = now
        self._leases.replay(lease)
        self._leases.watch(lease.worker)

    def _orphan(self, worker: Worker, header: Header, held: Held, now: float) -> None:
        """Nothing is known of it here: it ended here, or its client has not come with it yet."""
        full = len(worker.leases) >= max(_MOST_HELD, worker.slots)
        client = self._t.clients.by_instance.get(held.client)
        complete = client is not None and client.complete
        past = complete or held.epoch == self._t.identity.epoch or now >= self.until
        if past or full or not worker.serves(held.model, held.adapter):
            self._reset(worker, header)
            return
        if client is None:
            client = self._t.clients.expect(held.client, now)
            self._t.timers.set((Alarm.CLIENT_GRACE, held.client, 0), self.until)
        submit = Submit(held.model, held.adapter)
        request = Request(header.request, client, submit, b"", now, math.inf, Output(0), State.RECOVERING)
        request.attempt = header.attempt
        request.lease = lease = self._t.pool.lease(request, worker, now)
        lease.start, lease.prefix, lease.acknowledged = header.seq, header.arg, True
        self._t.requests[request.id] = request
        client.add(request)
        self._t.timers.set((Alarm.RECOVERY, request.id, 0), self.until)

    def _reset(self, worker: Worker, header: Header) -> None:
        self._t.counters["fenced"] += 1
        self._t.out.append(Send(worker.peer, say(Kind.RESET, header.request, attempt=header.attempt)))

    def introduced(self, worker: Worker, now: float) -> None:
        """A worker has said what it has, or has had its time to: what it did not name of its own it has no more.

        What it was told to stop since is waited for: its name may be late, and the end of it must not be taken for
        another one's.
        """
        worker.expected = 0
        self._t.vacant[worker] = None
        for lease in [x for x in worker.leases.values() if x.missing and x.stopping is None]:
            self._attempts.not_there(lease, now)


def _numbered(header: Header) -> int:
    """The attempt that a peer says it has seen.

    Raises:
        ProtocolError: no request was ever tried so often.
    """
    if header.attempt > LAST_ATTEMPT:
        found = f"{header.kind.name}: found attempt {header.attempt}, expected at most {LAST_ATTEMPT}"
        raise ProtocolError(found)
    return header.attempt
