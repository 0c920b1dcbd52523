"""Which workers hang for good: the thread that does all their messages has given no sign of life for a minute.

What their engine does meanwhile is no matter of this: it has a thread of its own, and the broker's eye on its progress.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from loopmux import pulse

SILENCE = 60.0
"""Seconds without a sign of life that end a worker."""


def between() -> float:
    """Seconds from one look to the next."""
    return pulse.between(SILENCE)


class Watchdog:
    """Notes for how long each worker has been without a sign of life."""

    def __init__(self) -> None:
        self._silent: dict[str, pulse.Silence] = {}

    def hung(self, watched: Iterable[str], beating: Collection[str], now: float) -> list[str]:
        """Take a look in; returns those that are to be ended, each of them once.

        Args:
            watched: workers that are ready.
            beating: those that gave a sign of life since the last look.
        """
        before = self._silent
        self._silent = {name: before.get(name) or pulse.Silence(SILENCE, now) for name in watched}
        return [name for name, silence in self._silent.items() if silence.look(beat=name in beating, now=now)]
