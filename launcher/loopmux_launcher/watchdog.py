"""Which workers hang for good: the thread that does all their messages has given no sign of life for a minute.

What their engine does meanwhile is no matter of this: it has a thread of its own, and the broker's eye on its progress.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

SILENCE = 60.0
"""Seconds without a sign of life that end a worker."""
_LOOKS = 6
"""How often it is looked for in that time. A look that comes late is that of a launcher which was stopped itself, most
likely with all else on the host, and says nothing."""


def between() -> float:
    """Seconds from one look to the next."""
    return SILENCE / _LOOKS


class Watchdog:
    """Counts how often each worker was found without a sign of life."""

    def __init__(self) -> None:
        self._looked = 0.0
        self._missed: dict[str, int] = {}

    def hung(self, watched: Iterable[str], beating: Collection[str], now: float) -> list[str]:
        """Take a look in; returns those that are to be ended, each of them once.

        Args:
            watched: workers that are ready.
            beating: those that gave a sign of life since the last look.
        """
        late, self._looked = now - self._looked > 2 * between(), now
        self._missed = {name: 0 if late or name in beating else self._missed.get(name, 0) + 1 for name in watched}
        return [name for name, missed in self._missed.items() if missed == _LOOKS]
