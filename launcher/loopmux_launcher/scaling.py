"""How many processes of a group should run, as its models are asked for.

Up: the first request that waits starts the first process; the next one follows when requests have waited for a while
although all that run are ready. Down: a process that had nothing to do for ``idle_timeout`` is stopped, and so is one
of several when the others could have done all the work for as long. What starts is never stopped before it was ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loopmux.messages import WorkerLoad

PATIENCE = 2.0
"""Seconds for which requests wait before another process is started for them: a full batch often clears by itself."""
FULL = 0.75
"""Share of the remaining slots that may be taken for one process to be spare: at 1 the next request wants it back."""


@dataclass(slots=True)
class Scaling:
    """The size of one group, between ``fewest`` and ``most``.

    Attributes:
        idle_timeout: seconds.
        wanted: how many processes should run now.
        asked: since when one is wanted that has not been started; who waits longest is served first.
        pressed: since when requests wait although all processes are ready.
        spare: since when one process fewer would do.
    """

    fewest: int
    most: int
    idle_timeout: float
    wanted: int = 0
    asked: float | None = None
    pressed: float | None = None
    spare: float | None = None

    def __post_init__(self) -> None:
        self.wanted = self.fewest

    def resize(self, fewest: int, most: int, idle_timeout: float) -> None:
        """Other limits, by another configuration."""
        self.fewest, self.most, self.idle_timeout = fewest, most, idle_timeout
        self.wanted = min(max(self.wanted, fewest), most)

    def settle(self, alive: int) -> None:
        """Want as many as there are, within the limits: what was wanted besides and not begun is so no more."""
        self.wanted = min(max(alive, self.fewest), self.most)

    def told(self, queued: int, loads: Sequence[WorkerLoad], *, alive: int, ready: int, now: float) -> str | None:
        """Take a report in, and name the process to stop if one is to spare.

        Args:
            queued: requests that wait for the group's models.
            loads: those of its processes that the broker has.
            alive: its processes that run or are about to.
            ready: those of them that are ready.
            now: on any clock.
        """
        steady = alive == ready == self.wanted
        if queued:
            self.wanted = max(self.wanted, 1)
        else:
            self.settle(alive)
        if not (queued and steady and alive):
            self.pressed = None
        elif self.pressed is None:
            self.pressed = now
        elif now - self.pressed >= PATIENCE and self.wanted < self.most:
            self.wanted, self.pressed = self.wanted + 1, None
        if queued or alive != ready:
            self.spare = None
            return None
        return self._to_spare(loads, alive, now)

    def _to_spare(self, loads: Sequence[WorkerLoad], alive: int, now: float) -> str | None:
        idle = [load for load in loads if not load.running]
        slots = [load.slots for load in loads]
        rest = sum(slots) - max(slots, default=0)
        if alive <= self.fewest or sum(load.running for load in loads) > FULL * rest:
            self.spare = None
            return None
        if self.spare is None:
            self.spare = now
        longest = max(idle, key=lambda load: load.idle, default=None)
        if longest is None:
            return None
        # Of the last process only its own word counts: requests may have come and gone between two reports.
        unneeded = len(loads) > 1 and now - self.spare >= self.idle_timeout
        if longest.idle < self.idle_timeout and not unneeded:
            return None
        self.wanted, self.spare = alive - 1, None
        return longest.name
