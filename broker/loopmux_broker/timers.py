"""Timers by key: set, moved and cancelled in O(log n), on whatever clock the caller uses."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
_Timer = tuple[float, int, K]
"""When it rings, its number (of two at the same time the older one rings first), its key."""

_SLACK = 256
"""Dead heap entries tolerated before the heap is rebuilt; small enough not to matter, large enough to be rare."""


class Timers(Generic[K]):
    """At most one timer per key. A cancelled or moved timer leaves a dead heap entry, swept when they outnumber."""

    def __init__(self) -> None:
        self._due: dict[K, _Timer[K]] = {}
        self._heap: list[_Timer[K]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: K) -> bool:
        return key in self._due

    def when(self, key: K) -> float:
        """When ``key`` rings; infinity if it does not."""
        return self._due[key][0] if key in self._due else math.inf

    def set(self, key: K, due: float) -> None:
        """Let ``key`` ring at ``due``, instead of when it was to ring before."""
        self._count += 1
        timer = self._due[key] = (due, self._count, key)
        heapq.heappush(self._heap, timer)
        if len(self._heap) > 2 * len(self._due) + _SLACK:
            self._rebuild()

    def cancel(self, key: K) -> None:
        """Let ``key`` not ring; nothing happens if it was not going to."""
        self._due.pop(key, None)

    def next(self) -> float | None:
        """When the next timer rings, None without timers."""
        heap = self._heap
        while heap and self._due.get(heap[0][2]) is not heap[0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> Iterator[K]:
        """Take out, one by one and earliest first, the keys that ring by ``now``; those set meanwhile count too."""
        while (due := self.next()) is not None and due <= now:
            key = heapq.heappop(self._heap)[2]
            del self._due[key]
            yield key

    def delay(self, concerned: Callable[[K], bool], by: float) -> None:
        """Move every timer whose key is ``concerned`` later by ``by`` seconds."""
        self._due = {key: (one[0] + by, one[1], key) if concerned(key) else one for key, one in self._due.items()}
        self._rebuild()

    def _rebuild(self) -> None:
        self._heap = list(self._due.values())
        heapq.heapify(self._heap)
