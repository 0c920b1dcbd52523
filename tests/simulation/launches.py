"""What a launcher does: one process of a name, again after a pause, not for ever; and tells the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmux_launcher.backoff import CRASHES, FIRST_DELAY, WINDOW
from simulation.broken import hold

if TYPE_CHECKING:
    from simulation.launcher import LauncherProcess
    from simulation.promise import Promise


_MOST = 9
"""Ends of one process within ``WINDOW`` seconds, by the shortest that the pauses between them can be."""


class Launches:
    """Watches the launcher and its processes."""

    def __init__(self, promise: Promise) -> None:
        self._world, self._clock = promise.world, promise.world.clock
        self._ends: dict[str, list[float]] = {}
        self._ready: set[str] = set()
        self._failed: dict[str, list[float]] = {}  # ends before it was ready, since it was last

    def started(self, launcher: LauncherProcess, name: str) -> None:
        """A launcher starts a process."""
        hold(name not in launcher.children, "one process of a name", f"{name} runs already")
        self._ready.discard(name)
        recent = [end for end in self._ends.get(name, []) if end > self._clock.now - WINDOW and end > launcher.born]
        if recent:
            pause = self._clock.now - recent[-1]
            hold(pause >= FIRST_DELAY / 2, "a crashed process is not started at once", f"{name} after {pause} s")
        hold(len(recent) <= _MOST, "a crashed process is started ever later", f"{name}: {len(recent)} ends in 60 s")
        failed = sum(end > launcher.born for end in self._failed.get(name, []))
        hold(failed < CRASHES, "a crash loop is given up", f"{failed} starts of {name} failed in a row")

    def ready(self, name: str) -> None:
        """A launcher's child is ready."""
        self._ready.add(name)
        self._failed.pop(name, None)

    def ended(self, name: str) -> None:
        """A launcher's child is gone, and nobody told it to."""
        self._ends.setdefault(name, []).append(self._clock.now)
        if name not in self._ready:
            self._failed.setdefault(name, []).append(self._clock.now)

    def at_rest(self) -> None:
        """What the launcher believes is so, and the broker has heard it."""
        launcher, pool = self._world.launcher, self._world.broker.core.tables.pool
        hold(launcher.link.ready, "everybody is with the broker", "the launcher is not")
        for name, process in launcher.plan.workers.items():
            runs = name in launcher.children
            hold(
                process.runs == runs,
                "a launcher knows its processes",
                lambda: f"{name} is {process.state}, runs: {runs}",
            )
            waits = (
                process.runs
                or process.wake is not None
                or process.backoff.failed_starts
                or (process.dormant and launcher.plan.fleet.crew_of(name).next_to_start() is None)
            )
            hold(waits, "what should run is started again", lambda: f"{name} is {process.state}")
        for told in launcher.plan.catalogue(self._clock.now):
            declared = pool.declared(told.model)
            heard = declared and (declared.entry.phase, declared.entry.workers)
            right = heard == (told.phase, told.workers)
            hold(right, "the broker has heard of every model", lambda: f"{told.model} is {told.phase}, not {declared}")
        known, live = {w.name for w in pool.workers.values()}, {w.name for w in self._world.workers}
        hold(known == live, "the broker knows who is there", f"{known}, there are {live}")
