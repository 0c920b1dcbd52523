"""Simulated time: what is to happen at which moment, in an order that the seed alone decides."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable

_MOST_AT_ONCE = 10_000
"""Events at one instant; more are a core that asks to be woken and does nothing about it."""
_AUDIT = 64
"""Events between two looks at the books: a wrong one stays wrong, and looking costs more than an event."""


class Clock:
    """The time, the seed's dice, and the agenda. ``events`` counts what has happened."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.events = 0
        self.audit: Callable[[], None] = lambda: None
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something at a time, or now if that has passed."""
        heapq.heappush(self._agenda, (max(when, self.now), next(self._order), what))

    def after(self, delay: float, what: Callable[[], None]) -> None:
        """Do something in ``delay`` seconds."""
        self.at(self.now + delay, what)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end, instant, same = self.now + seconds, self.now, 0
        while self._agenda and self._agenda[0][0] <= end:
            self.now, _, what = heapq.heappop(self._agenda)
            same = same + 1 if self.now == instant else 0
            instant = self.now
            assert same < _MOST_AT_ONCE, "time stands still: a core asks to be woken and does nothing about it"
            what()
            self.events += 1
            if self.events % _AUDIT == 0:
                self.audit()
        self.now = end


class Alarm:
    """Wakes a core at its ``next_timer``; one that moved its timer is woken at the new time."""

    def __init__(self, clock: Clock, due: Callable[[], float | None], ring: Callable[[], None]) -> None:
        self._clock, self._due, self._ring = clock, due, ring
        self._set = math.inf

    def look(self) -> None:
        """The core may have moved its timer."""
        due = self._due()
        if due is not None and due < self._set:
            self._set = due
            self._clock.at(due, lambda: self._fire(due))

    def _fire(self, due: float) -> None:
        if due == self._set:
            self._set = math.inf
            self._ring()
            self.look()
