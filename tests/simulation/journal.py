"""What was done to the world, and when it was over: an outcome that is no success needs something here to excuse it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One fault: from ``begun`` to ``over`` it was at work."""

    kind: str
    begun: float
    over: float


class Journal:
    """All faults of a run."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def note(self, kind: str, now: float, seconds: float = 0.0) -> None:
        self._entries.append(Entry(kind, now, now + seconds))

    def count(self, kinds: tuple[str, ...], since: float, until: float) -> int:
        """How many faults of these kinds were at work in a time; a kind may be a prefix such as ``kill``."""
        return sum(e.kind.startswith(kinds) and e.over >= since and e.begun <= until for e in self._entries)

    def calm_since(self) -> float:
        """When the last fault was over."""
        return max((entry.over for entry in self._entries), default=0.0)
