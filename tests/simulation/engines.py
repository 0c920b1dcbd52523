"""What engines are given and do: what was asked, once, and not for longer than somebody wants it."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from loopmux import codec, messages
from loopmux_broker.requests import Request, State
from loopmux_worker.engine.base import Job
from loopmux_worker.engine.echo import echo_token
from simulation.broken import broken, hold
from simulation.callers import MOST_LOSSES

if TYPE_CHECKING:
    from simulation.client import Call, ClientProcess
    from simulation.promise import Promise
    from simulation.worker import WorkerProcess

STALLED = 6.0
"""Seconds without a token, in calm, after which a request that does not wait for a slot is stuck."""
GHOST = 4.0
"""Seconds after its end, in calm, by which an engine has let a request go: two resends and a while."""
MIGRATING = ("stop", "drain", "kill broker", "kill launcher")
"""Faults after which an attempt counts as nobody's loss."""


class Engines:
    """Watches the engines."""

    def __init__(self, promise: Promise) -> None:
        self._promise, self._world, self._clock = promise, promise.world, promise.world.clock
        self._taken: dict[tuple[bytes, int], tuple[object, str]] = {}
        self._first: dict[object, int] = {}  # attempt, by the broker's record
        self._losses: Counter[object] = Counter()  # by the broker's record: another one counts from the start
        self._sessions: dict[str, tuple[ClientProcess, str | None]] = {}  # by the name that workers know

    def took(self, worker: WorkerProcess, job: Job) -> bool:
        """An engine is given a request; whether it is a plain one, whose text is marked."""
        key = (job.key.request, job.key.attempt)
        call = self._promise.calls.get(job.key.request)
        hold(call is not None, "only what was submitted runs", lambda: f"{worker} was given {job}")
        tables = self._world.broker.core.tables
        lease = tables.pool.leases.get(key)
        # A broker that has forgotten the request counts from the start, and what a former one gave to a worker that was
        # frozen since may have the same number.
        record = lease.request if lease is not None and lease.worker.name == worker.name else None
        known, other = self._taken.get(key, (None, ""))
        again = record is not None and known is record
        hold(not again, "P4 no attempt runs twice", lambda: f"attempt {key[1]} of {call} on {other}, now on {worker}")
        self._taken[key] = (record, worker.name)
        # A broker that meets a request again counts from there. What a worker did not acknowledge before it went is no
        # loss by the request.
        before = 0 if record is None else self._first.setdefault(record, key[1]) - 1
        most = MOST_LOSSES + before + (0 if record is None else record.mishaps)
        few = key[1] <= most or self._promise.hit(call, *MIGRATING, before=15.0)
        hold(key[1] >= 1 and few, "P4 at most three attempts", lambda: f"{call} has attempt {key[1]}")
        lost = self._losses[record]
        hold(
            record is None or lost < MOST_LOSSES + self._spared(call, record),
            "P4 three workers at most are lost with a request",
            lambda: f"{call} ended {lost}",
        )
        call.dealt = self._clock.now
        self._promise.talk.workers.begins(worker, key)
        self._as_asked(call, worker, job)
        return call.plain

    def _spared(self, call: Call, record: Request) -> int:
        """How many losses may not count: whether a worker was lost by a broker that was away, this one cannot know."""
        return record.mishaps if self._promise.hit(call, "freeze broker", before=5.0) else 0

    def _as_asked(self, call: Call, worker: WorkerProcess, job: Job) -> None:
        submit, run = call.submit, job.run
        hold(
            (run.model, run.adapter, run.deterministic) == (submit.model, submit.adapter, submit.deterministic),
            "a request runs as it was asked",
            lambda: f"{call} on {worker}: {run}",
        )
        asked = codec.unpack(messages.Generate, call.body, codec.BODY_LIMITS)
        hold(job.generate == asked, "a request runs as it was asked", lambda: f"{call} on {worker}: {job.generate}")
        right = tuple(echo_token(call.id, i) for i in range(len(job.prefix)))
        hold(job.prefix == right, "P1 a prefix is what was produced", lambda: f"{call} on {worker}")

    def given(self, call: Call, run: messages.Run) -> None:
        """A request goes to a worker, which may be lost before it has it."""
        if run.session is not None:
            owner = self._sessions.setdefault(run.session, (call.client, call.submit.session))
            same = owner == (call.client, call.submit.session)
            hold(same, "P7 a session is one client's", lambda: f"{run.session} of {call} is that of {owner}")

    def killed(self, worker: WorkerProcess) -> None:
        """A worker dies, whatever it runs for the broker with it.

        What one ran that had said it leaves goes on elsewhere as migrated, before anybody knows that it died.
        """
        if worker.core is not None and worker.core._leave_at < math.inf:
            return
        tables = self._world.broker.core.tables
        for key in worker.engine._running:
            lease = tables.pool.leases.get((key.request, key.attempt))
            heard = lease is not None and (lease.acknowledged or lease.attempt == 1)
            if heard and lease.worker.name == worker.name and lease.request.lease is lease:
                self._losses[lease.request] += 1

    def hinted(self, worker: WorkerProcess, hint: messages.SessionHint) -> None:
        """An engine is told of a session."""
        hold(hint.session in self._sessions, "a hint names a session that ran", lambda: f"{worker}: {hint}")

    def audit(self, calm: float) -> None:
        """Look for what runs too long and for what does not get on; ``calm`` are the seconds since the last fault."""
        if calm > GHOST:
            self._no_ghosts()
        if calm > STALLED + self._under_way:
            self._no_stall(calm)

    @property
    def _under_way(self) -> float:
        """Seconds that a few messages to and fro may take."""
        return 4 * self._world.profile.latency[1]

    def _no_ghosts(self) -> None:
        now = self._clock.now
        for worker in self._world.workers:
            for key in worker.engine._running:
                call = self._promise.calls[key.request]
                over = min(call.ended, call.client.gone + 3.0)
                hold(
                    now - over < GHOST + self._under_way,
                    "what ended does not go on running",
                    lambda: f"{call} attempt {key.attempt} on {worker}, {now - over:.1f} s after its end",
                )

    def _no_stall(self, calm: float) -> None:
        now = self._clock.now
        running = {key.request for worker in self._world.workers for key in worker.engine._running}
        queued = {id_ for id_, r in self._world.broker.core.tables.requests.items() if r.state is State.QUEUED}
        for call in self._promise.calls.values():
            quiet = now - max(call.moved, call.submitted, call.dealt)
            if not call.open or call.slow or call.id in queued or min(quiet, calm) < STALLED + self._under_way:
                continue
            if not (call.collect and call.id in running):
                where = "in an engine" if call.id in running else "nowhere"
                broken("what is asked moves on", f"{call} ({call.about}) is {where}, {quiet:.1f} s after the last word")
