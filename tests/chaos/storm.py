"""One storm: a crowd of streaming clients, one kind of fault, and what came of it as a row of the table."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from dataclasses import dataclass

from chaos.callers import Call, crowd
from chaos.house import FAST, MODEL, House
from chaos.nemesis import Fault, beside, strikes
from loopmux_loadtest.tally import percentile

ECHO = {"engine": "echo", "models": [{"id": MODEL}], "slots": 64, "echo": {"rate": 50}}
"""A worker: one chunk of one token each 20 ms and stream, as often as a worker sends at all."""
ABUSED = {"engine": "echo", "models": [{"id": FAST}], "slots": 64, "echo": {"rate": 200}}
"""The worker of a client that never reads: fills every buffer on the way in seconds, and does not take a core."""
NARROW = {"window": 128, "request_output": 65_536}
"""Settings of the broker under which a client that never reads is noticed within seconds."""
SHORT = {"grace": 3.0}
"""Settings under which one that left by a dead line, so that nobody heard of it, is forgotten within seconds."""
_SHOWS = 1.0
"""Seconds of a pause that a strike at a worker's line is the reason for."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much a storm has: clients at once, requests in all, tokens of the shortest, workers; over what.

    ``keyed``: over tcp with keys, else over ipc.
    """

    clients: int = 64
    requests: int = 800
    tokens: int = 150
    workers: int = 3
    keyed: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one storm.

    ``hit`` streams were in mid-stream at a strike that concerned them (all streams, where nothing strikes). ``gaps``
    are their longest pauses in seconds, endless for one that failed: within the seconds behind the strike, in which
    what was killed is started again on the cores that all share. ``cuts`` are the pauses of the strikes themselves,
    none where nothing strikes.
    ``memory`` is resident MiB of the broker and of all workers, before and after.
    """

    fault: Fault
    requests: int
    errors: dict[str, list[str]]
    lost: int
    repeated: int
    wrong: int
    strikes: int
    hit: int
    gaps: tuple[float, ...]
    cuts: tuple[float, ...]
    memory: tuple[tuple[float, float], tuple[float, float]]
    open: dict[str, int]
    died: int
    troubles: tuple[str, ...]

    @property
    def failed(self) -> int:
        """Requests that did not end well; ``errors`` has their messages by kind."""
        return sum(map(len, self.errors.values()))

    @property
    def exact(self) -> bool:
        """Whether the promise was kept: what has nothing to do with time."""
        flaws = self.failed + self.lost + self.repeated + self.wrong + len(self.open) + self.died + len(self.troubles)
        return flaws == 0

    def gap(self, share: float) -> float:
        """A percentile of the gaps."""
        return percentile(self.gaps, share)

    def cut(self, share: float) -> float:
        """A percentile of the cuts."""
        return percentile(self.cuts, share)


async def storm(fault: Fault, load: Load) -> Row:
    """Run it."""
    abused = fault.pest == "stuck"
    specs = [ECHO] * load.workers + [ABUSED] * abused
    settings = NARROW if abused else SHORT if fault.far else None
    async with House(specs, settings, keyed=load.keyed, far=fault.far) as house:
        await crowd(house, load.clients, iter([8] * load.clients), [])  # memory as it is in use
        before = house.memory()
        calls: list[Call] = []
        moments: list[float] = []
        lengths = iter(  # so that ends and strikes meet in every way
            [load.tokens + n % 37 for n in range(load.requests * fault.rounds)]
        )
        async with beside(house, fault.pest):
            striking = None
            if fault.strike is not None:
                striking = asyncio.create_task(strikes(house, fault.strike, calls, moments))
            await crowd(house, load.clients, lengths, calls)
            if striking is not None:
                await _finish(striking, house)
        left = await house.left_open()
        return _row(fault, calls, moments, (before, house.memory()), left, house)


async def _finish(striking: asyncio.Task[None], house: House) -> None:
    """No more strikes; what a last one has left stopped or gone comes back."""
    striking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await striking
    for part in house.parts:
        part.thaw()
    for line in house.lines:
        await line.go()
    await house.whole()


def _row(
    fault: Fault,
    calls: list[Call],
    moments: list[float],
    memory: tuple[tuple[float, float], tuple[float, float]],
    left: dict[str, int],
    house: House,
) -> Row:
    pauses = [found for call in calls if (found := _pauses(fault, call, moments)) is not None]
    return Row(
        fault=fault,
        requests=len(calls),
        errors=_by_kind([call.error for call in calls if call.error]),
        lost=sum(call.lost for call in calls),
        repeated=sum(call.repeated for call in calls),
        wrong=sum(call.wrong for call in calls),
        strikes=len(moments),
        hit=len(pauses),
        gaps=tuple(gap for gap, _ in pauses),
        cuts=tuple(cut for _, cut in pauses if fault.strike is not None),
        memory=memory,
        open=left,
        died=house.unasked_deaths(),
        troubles=tuple(itertools.islice(house.troubles(), 5)),
    )


def _by_kind(errors: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for error in errors:
        kind, _, message = error.partition(": ")
        found.setdefault(kind, []).append(message)
    return found


def _pauses(fault: Fault, call: Call, moments: list[float]) -> tuple[float, float] | None:
    """The longest pause that a fault cost a call, and that of the strike itself; None where no strike concerned it."""
    if fault.strike is None:
        return call.pause(), 0.0
    if call.error:
        return math.inf, math.inf
    if fault.hits == "rerun" and call.attempts == 1:
        return None
    hits = [moment for moment in moments if call.in_midstream(moment)]
    gap, cut = (max(map(of, hits), default=0.0) for of in (call.pause, call.cut))
    unharmed = fault.hits == "shown" and call.attempts == 1 and cut < _SHOWS
    return None if unharmed or not hits else (gap, cut)
