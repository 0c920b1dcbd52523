"""The table that ``make chaos`` prints, and which of its figures are where they should be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from chaos.storm import Row

_ENOUGH = 200
"""Streams hit in mid-stream from which on a row says something."""
_COUNTS = ("strikes", "requests", "failed", "lost", "repeated", "wrong", "hit")
_TITLES = ("fault", *_COUNTS, "cut p50", "cut p99", "gap p50", "gap p99")
_WIDTHS = (19, 7, 8, 6, 5, 8, 5, 5, 8, 8, 8, 8)


def head() -> str:
    """The titles of the columns."""
    return _line(_TITLES) + "  RSS MiB broker, workers      left open"


def line(row: Row) -> str:
    """One row. Milliseconds: ``cut`` is the pause of the strike itself, ``gap`` the longest one behind it."""
    (broker, workers), (broker_after, workers_after) = row.memory
    memory = f"{broker:.0f} → {broker_after:.0f}, {workers:.0f} → {workers_after:.0f}"
    counts = (row.strikes, row.requests, row.failed, row.lost, row.repeated, row.wrong, row.hit)
    pauses = tuple(_milliseconds(of(share)) for of in (row.cut, row.gap) for share in (0.5, 0.99))
    left = ", ".join(f"{name} {size}" for name, size in row.open.items()) or "nothing"
    return _line((row.fault.name, *map(str, counts), *pauses)) + f"  {memory:27} {left}"


def _milliseconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{1000 * seconds:.0f}"


def _line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, _WIDTHS, strict=True)
    return f"{first[0]:{first[1]}}" + "".join(f" {cell:>{width}}" for cell, width in others)


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[bool, str]]:
    """What is to be reached, one by one, and whether it was."""
    usual = next((row.gap(0.99) for row in rows if row.fault.strike is None and row.fault.pest is None), None)
    for row in rows:
        name = row.fault.name
        errors = "; ".join(f"{len(found)} × {kind}, as in {found[0]!r}" for kind, found in row.errors.items())
        yield row.failed == 0, f"{name}: {row.failed} of {row.requests} failed {errors}".rstrip()
        yield not row.lost + row.repeated + row.wrong, f"{name}: every token once, in order, and right"
        yield not row.open, f"{name}: nothing left in any table"
        yield not row.died, f"{name}: {row.died} processes ended by themselves"
        yield not row.troubles, f"{name}: {len(row.troubles)} errors in logs {' | '.join(row.troubles)}".rstrip()
        if row.fault.strike is not None:
            yield row.hit >= _ENOUGH, f"{name}: {row.hit} streams hit, at least {_ENOUGH} wanted"
        if row.fault.limit is not None:
            yield row.gap(0.99) <= row.fault.limit, f"{name}: {_against(row, usual)}"


def _against(row: Row, usual: float | None) -> str:
    assert row.fault.limit is not None
    beside = "" if usual is None else f"; {1000 * usual:.0f} ms where nothing is wrong"
    gap, cut, limit = (1000 * seconds for seconds in (row.gap(0.99), row.cut(0.99), row.fault.limit))
    return f"gap p99 {gap:.0f} ms, at most {limit:.0f} wanted ({cut:.0f} ms of the strikes themselves{beside})"
