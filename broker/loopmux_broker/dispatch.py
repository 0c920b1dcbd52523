"""Who runs next, and where.

A request's rank is the time it arrived less a head start for its priority and for continuing a tool loop. Ranks never
change, so a queue is a sorted list, and waiting ages a request by itself: whoever comes later by more than the head
start comes second.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loopmux_broker.pool import Worker
from loopmux_broker.requests import Request

Lane = tuple[str, str | None]
"""Model id and adapter: requests that the same workers can run."""

_SESSIONS = 10_000
"""Sessions whose last worker is remembered; the longest unused are forgotten (that costs one prefill, no more)."""


@dataclass(frozen=True, slots=True)
class HeadStart:
    """How many seconds earlier a request counts as arrived: per step of priority, and for continuing a loop."""

    priority: float = 30.0
    continuing: float = 10.0


class Queues:
    """One queue per lane that has anybody waiting, with O(log n) comparisons for each operation.

    The lists are sorted backwards so that the next one is popped off the end. Inserting moves pointers: 3 µs at 10 000.
    """

    def __init__(self, head_start: HeadStart) -> None:
        self._head_start = head_start
        self._lanes: dict[Lane, list[tuple[float, int, Request]]] = {}
        self._count = 0
        self.length = 0

    def push(self, request: Request) -> None:
        """Queue a request; one that was queued before gets its old place."""
        if request.rank == (0.0, 0):
            self._count += 1
            submit, start = request.submit, self._head_start
            ahead = submit.priority * start.priority + (start.continuing if submit.continues else 0.0)
            request.rank = (ahead - request.arrived, -self._count)
        bisect.insort(self._lanes.setdefault(request.lane, []), (*request.rank, request))
        self.length += 1

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands."""
        lane = self._lanes[request.lane]
        del lane[bisect.bisect_left(lane, request.rank, key=_rank)]
        self.length -= 1
        if not lane:
            del self._lanes[request.lane]

    def position(self, request: Request) -> int:
        """Its place in its queue; the next one has 1."""
        lane = self._lanes[request.lane]
        return len(lane) - bisect.bisect_left(lane, request.rank, key=_rank)

    def next_for(self, worker: Worker) -> Request | None:
        """Who runs next on a worker with a free slot, over all the lanes it serves. It is left in the queue."""
        heads = (lane[-1] for (model, adapter), lane in self._lanes.items() if worker.serves(model, adapter))
        best = max(heads, key=_rank, default=None)
        return best[2] if best else None

    def waiting(self, lane: Lane) -> bool:
        """Whether anybody waits in a lane."""
        return lane in self._lanes

    def of_model(self, model: str) -> list[Request]:
        """Everybody who waits for a model, whatever the adapter, the next one first in each lane."""
        lanes = (lane for (name, _), lane in self._lanes.items() if name == model)
        return [entry[2] for lane in lanes for entry in reversed(lane)]

    def models(self) -> Iterator[str]:
        """The models that anybody waits for."""
        return iter({model for model, _ in self._lanes})


def _rank(entry: tuple[float, int, Request]) -> tuple[float, int]:
    return entry[0], entry[1]


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
    model, adapter = request.lane
    best: Worker | None = None
    best_load: tuple[bool, float, int] | None = None
    for worker in workers:
        if worker.free <= 0 or not worker.serves(model, adapter):
            continue
        if worker.name == preferred:
            return worker
        load = (worker.name == request.avoid, len(worker.leases) / worker.slots, worker.served)
        if best_load is None or load < best_load:
            best, best_load = worker, load
    return best
