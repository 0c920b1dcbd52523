"""Where a request runs: the worker that holds its session, else the least loaded."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from loopmux_broker.pool import Worker
from loopmux_broker.requests import Request

_SESSIONS = 10_000
"""Sessions whose last worker is remembered; the longest unused are forgotten (that costs one prefill, no more)."""


def session_of(instance: bytes, session: str) -> str:
    """A client's session as workers know it: sessions that two clients call the same are two, and names stay here."""
    return hashlib.blake2b(session.encode(), key=instance, digest_size=12).hexdigest()


class Affinity:
    """Which worker ran a session last, and so may still hold its attention state."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[bytes, str], dict[str, str]] = OrderedDict()

    def ran(self, request: Request, worker: str) -> None:
        """A session's request goes to a worker."""
        session = request.submit.session
        if session is None:
            return
        key = (request.client.instance, session)
        self._last.setdefault(key, {})[request.submit.model] = worker
        self._last.move_to_end(key)
        if len(self._last) > _SESSIONS:
            self._last.popitem(last=False)

    def last(self, request: Request) -> str | None:
        """The worker that ran the request's session last."""
        session = request.submit.session
        if session is None:
            return None
        return self._last.get((request.client.instance, session), {}).get(request.submit.model)

    def workers(self, instance: bytes, session: str) -> set[str]:
        """The workers that ran a session last, one for each of its models."""
        return set(self._last.get((instance, session), {}).values())

    def forget(self, instance: bytes, session: str) -> None:
        """A session is done."""
        self._last.pop((instance, session), None)


def choose(workers: Iterable[Worker], request: Request, preferred: str | None) -> Worker | None:
    """The worker for a request: the preferred one if it has a free slot, else the least loaded relative to its slots.

    The worker that just failed the request comes last; among equals the one that has served least is next.
    """
    best: Worker | None = None
    best_load: tuple[bool, float, int] | None = None
    for worker in workers:
        if worker.free <= 0 or not worker.serves(*request.lane):
            continue
        if worker.name == preferred:
            return worker
        load = (worker.name == request.avoid, len(worker.leases) / worker.slots, worker.served)
        if best_load is None or load < best_load:
            best, best_load = worker, load
    return best


def choose_alone(workers: Iterable[Worker], request: Request) -> Worker | None:
    """The worker to empty for a request that is to run alone: the one with the least to wait for."""
    fit = [w for w in workers if w.open and w.serves(*request.lane)]
    return min(fit, key=lambda w: (w.name == request.avoid, len(w.leases)), default=None)
