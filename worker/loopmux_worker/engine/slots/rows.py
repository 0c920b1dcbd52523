"""Which row of the KV memory holds what. Pure: says what to copy, touches no memory.

A row holds the attention state of one token sequence under one *identity* (the content hash of base and adapter): state
computed under one is never used under another. A row is free, running (a request owns it) or parked (kept after a turn,
for the next turn of its session or for any request that begins with the same tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

SHORTEST = 16
"""Tokens; a shorter common beginning is computed faster than found and copied."""
_HALF_LIFE = 60.0
"""Seconds from or to the time at which its session is expected that halve what a parked row is worth: who is overdue
may not come, and for who comes late the room serves others meanwhile.
"""
_UNHEARD, _EXPECTED, _LEFT = 0.5, 1.0, 0.01
"""Chances that a session comes back: nobody said, it waits for a tool, it is done. Not 0: others may begin alike."""


class Copy(NamedTuple):
    """Copy the state of the first ``length`` tokens from one row to another."""

    source: int
    target: int
    length: int


@dataclass(slots=True)
class Row:
    """What one row holds: the state of ``tokens[:filled]``."""

    index: int
    identity: str = ""
    session: str | None = None
    tokens: list[int] = field(default_factory=list)
    filled: int = 0
    running: bool = False
    left: float = 0.0  # when its request ended, or its session is expected back
    worth: float = _UNHEARD  # chance that its session comes back

    @property
    def parked(self) -> bool:
        """Whether it can be taken over, and something is lost by it."""
        return not self.running and self.filled > 0

    def value(self, now: float) -> float:
        """Tokens to compute again if this row is taken, times the chance that somebody asks for them soon."""
        return self.filled * self.worth * float(0.5 ** (abs(now - self.left) / _HALF_LIFE))


class Rows:
    """The rows of one engine.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._rows = [Row(index) for index in range(count)]

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def running(self) -> int:
        """Rows that requests own."""
        return sum(row.running for row in self._rows)

    @property
    def parked(self) -> int:
        """Rows that are kept for a return."""
        return sum(row.parked for row in self._rows)

    def known(self, tokens: list[int], identity: str) -> int:
        """How many tokens at the beginning have their state in some row."""
        return max((common(row, tokens, identity) for row in self._rows), default=0)

    def take(self, tokens: list[int], identity: str, session: str | None, now: float) -> tuple[Row, Copy | None] | None:
        """A row for a request, with as much of its state as is there; None when every row is running.

        The last token is always left to compute: its logits are wanted. The row's ``filled`` counts what is reused, and
        holds only once the copy that is returned has been made.
        """
        open_rows = [row for row in self._rows if not row.running]
        if not open_rows:
            return None
        source: Row | None = max(self._rows, key=lambda row: (common(row, tokens, identity), row.session == session))
        assert source is not None  # there are rows
        length = min(common(source, tokens, identity), len(tokens) - 1)
        if length < SHORTEST:
            source, length = None, 0
        row = self._place(open_rows, source, length, session, now)
        copy = Copy(source.index, row.index, length) if source is not None and source is not row else None
        row.identity, row.session, row.tokens, row.filled = identity, session, tokens[:length], length
        row.running, row.left, row.worth = True, now, _UNHEARD
        return row, copy

    def _place(self, open_rows: list[Row], source: Row | None, length: int, session: str | None, now: float) -> Row:
        """The row to run in: the source itself where nothing is lost by it, else the open row of least value."""
        cheapest = min(open_rows, key=lambda row: (row.value(now), row.index))
        if source is None or source.running:
            return cheapest
        own = source.session is not None and source.session == session
        # What would be overwritten behind the common beginning is worth less than any other row: no need to copy.
        tail = source.value(now) * (source.filled - length) / source.filled
        return source if own or tail <= cheapest.value(now) else cheapest

    def park(self, index: int, now: float) -> None:
        """A request is done with its row; what it holds is kept."""
        row = self._rows[index]
        row.running, row.left = False, now
        row.tokens = row.tokens[: row.filled]

    def drop(self, index: int) -> None:
        """What a row holds is no good, or nobody will ask for it."""
        self._rows[index] = Row(index)

    def forget(self, identity: str) -> None:
        """Drop everything parked under an identity: its adapter is gone."""
        for row in self._rows:
            if row.parked and row.identity == identity:
                self.drop(row.index)

    def expect(self, session: str, when: float, now: float) -> None:
        """A session waits for a tool and comes back about then."""
        for row in self._parked(session):
            row.worth, row.left = _EXPECTED, max(now, when)

    def leave(self, session: str) -> None:
        """A session is done."""
        for row in self._parked(session):
            row.worth = _LEFT

    def _parked(self, session: str) -> list[Row]:
        return [row for row in self._rows if row.parked and row.session == session]


def common(row: Row, tokens: list[int], identity: str) -> int:
    """How many tokens at the beginning have their state in a row."""
    if row.identity != identity:
        return 0
    limit = min(row.filled, len(tokens))
    # Most comparisons end at once or go to the end: lists compare at C speed, a loop over tokens does not.
    if row.tokens[:limit] == tokens[:limit]:
        return limit
    low, high = 0, limit  # tokens[:low] agree, tokens[:high] do not
    while high - low > 1:
        middle = (low + high) // 2
        if row.tokens[low:middle] == tokens[low:middle]:
            low = middle
        else:
            high = middle
    return low
