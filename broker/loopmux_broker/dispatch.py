"""Where a request runs: with its session's worker, else with the least loaded that knows most of its prompt."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from loopmux_broker.pool import Lease, Worker
from loopmux_broker.requests import Request

_SESSIONS = 10_000
"""Sessions whose last worker is remembered; the longest unused are forgotten (that costs one prefill, no more)."""
_MODELS = 64
"""The same for the models of one session: adapters that come and go are models, too."""
_BEGINNINGS = 50_000
"""The same for beginnings of prompts, of which a request names as many as its prompt has messages, 64 at most."""

_LONG = 2_000
"""Characters of a prompt (some 500 tokens) from which on computing it takes most of the time to the first token."""
_LONGEST_WAIT = 2.0
"""Seconds; beyond that a queue in front of free workers looks like a fault, whatever it saves."""
_RECENT = 0.2
"""Weight of the latest prompt in what a worker takes."""


def session_of(instance: bytes, session: str) -> str:
    """A client's session as workers know it: sessions that two clients call the same are two, and names stay here."""
    return hashlib.blake2b(session.encode(), key=instance, digest_size=12).hexdigest()


class Affinity:
    """Which worker ran a session last, or a prompt that begins alike, and so may still hold its attention state."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[bytes, str], dict[str, str]] = OrderedDict()
        self._began: OrderedDict[tuple[str, str | None, bytes], str] = OrderedDict()

    def ran(self, request: Request, worker: str) -> None:
        """A request goes to a worker."""
        self._note_beginnings(request, worker)
        session = request.submit.session
        if session is None:
            return
        key = (request.client.instance, session)
        last = self._last.setdefault(key, {})
        last.pop(request.submit.model, None)
        last[request.submit.model] = worker  # behind those that were used before
        if len(last) > _MODELS:
            del last[next(iter(last))]
        self._last.move_to_end(key)
        if len(self._last) > _SESSIONS:
            self._last.popitem(last=False)

    def _note_beginnings(self, request: Request, worker: str) -> None:
        submit = request.submit
        for known in submit.hashes:
            key = (submit.model, submit.adapter, known)
            self._began[key] = worker
            self._began.move_to_end(key)
        while len(self._began) > _BEGINNINGS:
            self._began.popitem(last=False)

    def shared(self, request: Request) -> dict[str, int]:
        """By worker: the place, among its beginnings, of the longest one that was given to this worker last."""
        submit = request.submit
        places: dict[str, int] = {}
        for place, known in enumerate(submit.hashes, 1):
            worker = self._began.get((submit.model, submit.adapter, known))
            if worker is not None:
                places[worker] = place
        return places

    def last(self, request: Request) -> str | None:
        """The worker that ran the request's session last."""
        session = request.submit.session
        if session is None:
            return None
        return self._last.get((request.client.instance, session), {}).get(request.submit.model)

    def cold(self, request: Request, worker: Worker) -> bool:
        """Whether a worker has to compute the whole of a prompt, as far as is known here."""
        name = worker.name
        return self.last(request) != name and name not in self.shared(request)

    def patience(self, request: Request, worker: Worker) -> float:
        """For how long a request may wait for the worker of its session where another one is free, seconds.

        Not longer than the other one takes to compute the prompt. Of short ones only those wait that continue a loop:
        their state is there, and tools may make them longer than they look.
        """
        submit = request.submit
        if submit.prompt_size >= _LONG:
            return min(worker.pace * submit.prompt_size, _LONGEST_WAIT)
        return min(worker.short, _LONGEST_WAIT) if submit.continues else 0.0

    def workers(self, instance: bytes, session: str) -> set[str]:
        """The workers that ran a session last, one for each of its models."""
        return set(self._last.get((instance, session), {}).values())

    def forget(self, instance: bytes, session: str) -> None:
        """A session is done."""
        self._last.pop((instance, session), None)


def choose(workers: Iterable[Worker], request: Request, affinity: Affinity) -> Worker | None:
    """The worker for a request: its session's if that has a free slot, else the least loaded relative to its slots.

    The worker that just failed the request comes last. Among equals the one that knows most of the prompt is next, then
    the one that has served least. More load is not made up for by what a worker knows: most conversations with a model
    begin alike, and would all be with one worker while others idle.
    """
    lane, preferred, shared = request.lane, affinity.last(request), affinity.shared(request)
    best: Worker | None = None
    best_load: tuple[bool, float, int, int] | None = None
    for worker in workers:
        if worker.free <= 0 or not worker.serves(*lane):
            continue
        name = worker.name
        if name == preferred:
            return worker
        load = (name == request.avoid, len(worker.leases) / worker.slots, -shared.get(name, 0), worker.served)
        if best_load is None or load < best_load:
            best, best_load = worker, load
    return best


def paced(lease: Lease, now: float) -> None:
    """The first output of an attempt came: where the prompt was computed, that is how long it takes there."""
    worker, size, took = lease.worker, lease.request.submit.prompt_size, now - lease.since
    if size >= _LONG:
        worker.pace = _recent(worker.pace, took / size)
    else:
        worker.short = _recent(worker.short, took)
    lease.cold = False


def _recent(mean: float, value: float) -> float:
    return mean + (value - mean) * (_RECENT if mean else 1.0)


def choose_alone(workers: Iterable[Worker], request: Request) -> Worker | None:
    """The worker to empty for a request that is to run alone: the one with the least to wait for."""
    fit = [w for w in workers if w.open and w.serves(*request.lane)]
    return min(fit, key=lambda w: (w.name == request.avoid, len(w.leases)), default=None)
