"""Whether clients notice one that never reads: alternating runs without and with it, and how far equal runs differ."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from chaos.callers import Call, crowd
from chaos.house import House
from chaos.nemesis import beside
from chaos.storm import ABUSED, ECHO, NARROW, Load
from loopmux_loadtest.tally import percentile

_LEAST = 0.05
"""Share by which two runs may differ however equal earlier ones were."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Milliseconds between two chunks of a stream, 99th percentile over all streams: alone, and beside the pest."""

    alone: float
    beside: float

    def __str__(self) -> str:
        return f"alone {self.alone:6.1f} ms   beside {self.beside:6.1f} ms   {self.beside / self.alone:.3f}"


async def pairs(load: Load, count: int) -> list[Pair]:
    """So many pairs of runs, one after the other, in one house."""
    found = []
    async with House([ECHO] * load.workers + [ABUSED], NARROW) as house:
        await _run(house, load)
        for _ in range(count):
            alone = await _run(house, load)
            async with beside(house, "stuck"):
                await crowd(house, load.clients, iter([load.tokens] * load.clients), [])  # until all is full
                found.append(Pair(alone, await _run(house, load)))
            print(found[-1], flush=True)
    return found


async def _run(house: House, load: Load) -> float:
    calls: list[Call] = []
    await crowd(house, load.clients, iter([load.tokens] * load.requests), calls)
    errors = [call.error for call in calls if call.error]
    assert not errors, errors
    gaps = [1000 * (b - a) for call in calls for a, b in pairwise(call.seen)]
    return percentile(gaps, 0.99)


def verdict(found: list[Pair]) -> tuple[bool, str]:
    """Whether the others noticed nothing, and the figures."""
    slower = statistics.median(pair.beside / pair.alone for pair in found) - 1
    spread = statistics.median(_differences([pair.alone for pair in found]))
    allowed = max(_LEAST, spread)
    figures = f"p99 {slower:+.1%} beside a client that never reads, at most {allowed:.1%} wanted"
    return slower <= allowed, f"{figures} (two equal runs differ by {spread:.1%}, {len(found)} pairs)"


def _differences(values: list[float]) -> Iterator[float]:
    for a, b in pairwise(values):
        yield abs(b / a - 1)
