"""What goes wrong: strikes at processes of a house, and bad neighbours beside its clients."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from chaos.callers import Call
from chaos.hanging import HANGS
from chaos.house import READY_LIMIT, House, until
from chaos.line import BOTH, Door, Way, Wire

Strike = Callable[[House, int], Awaitable[None]]
"""Does the n-th harm to a house and returns when the processes may recover."""

_FROZEN_WORKER = 6.0
"""Seconds: twice the silence after which a worker counts as lost."""
_FROZEN_BROKER = 2.0
"""Seconds: shorter than the silence after which everybody would look for another one."""
_DEAD = 6.0
"""Seconds for which a connection passes nothing, twice the silence after which both its ends count as lost."""
_CUTS, _BETWEEN = 3, 0.3
"""How often connections are cut in one go, and seconds from one time to the next: everybody is back, and under way."""
_WAYS = ((Way.UP,), (Way.DOWN,), BOTH)
_LATE, _SLOW = 0.1, 4_000
"""Seconds by which a bad line is late, and bytes a second that it carries: no more than one stream's."""
_BAD = 1.5
"""Seconds for which it is bad."""


async def _kill_worker(house: House, n: int) -> None:
    house.workers[n % len(house.workers)].signal(signal.SIGKILL)


async def _kill_broker(house: House, _n: int) -> None:
    house.broker.signal(signal.SIGKILL)


async def _kill_both(house: House, n: int) -> None:
    await _kill_broker(house, n)
    await _kill_worker(house, n)


async def _freeze_worker(house: House, n: int) -> None:
    await _freeze(house.workers[n % len(house.workers)].signal, _FROZEN_WORKER)


async def _hang_worker(house: House, n: int) -> None:
    house.workers[n % len(house.workers)].signal(signal.SIGUSR2)
    await asyncio.sleep(HANGS)


async def _freeze_broker(house: House, _n: int) -> None:
    await _freeze(house.broker.signal, _FROZEN_BROKER)


async def _freeze(send: Callable[[int], None], seconds: float) -> None:
    send(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    send(signal.SIGCONT)


async def _cut(house: House, n: int) -> None:
    """By FIN and RST in turn, in the middle of a frame or between two."""
    for turn in range(_CUTS):
        for wire in [*house.front.wires, *house.back.wires]:
            sever = wire.tear if turn % 2 else wire.cut
            sever(reset=bool((n + turn) % 2))
        await asyncio.sleep(_BETWEEN)


async def _kill_clients_lines(house: House, _n: int) -> None:
    await _go_dead(house.front.wires, BOTH)


async def _kill_one_way(house: House, n: int) -> None:
    await _go_dead(house.front.wires, _WAYS[n % 2])


async def _kill_workers_line(house: House, n: int) -> None:
    await _go_dead([house.back.wires[n % len(house.workers)]], _WAYS[n % 3])


async def _spoil(house: House, n: int) -> None:
    """A line is cut and refuses who comes anew, or does not answer; or everything comes late, or slowly."""
    line = house.lines[n // 4 % 2]
    match n % 4:
        case 0 | 1:
            await line.turn_to((Door.SHUT, Door.MUTE)[n % 4])
            for wire in list(line.wires):
                wire.cut(reset=True)
        case 2:
            line.delay = _LATE
        case _:
            line.rate = _SLOW
    await asyncio.sleep(_BAD)
    await line.go()


async def _go_dead(wires: Sequence[Wire], ways: Sequence[Way]) -> None:
    """What was under way arrives in the end, by connections that were left long ago. New ones are not concerned."""
    struck = list(wires)
    for wire in struck:
        wire.stop(ways)
    await asyncio.sleep(_DEAD)
    for wire in struck:
        wire.go()


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table.

    Attributes:
        strike: what is done now and then, or None.
        far: over lines between hosts, which the strike is at.
        pest: who is beside all the time (``pests``), or None.
        hits: the streams a strike counts for: all, or those of one worker, which show it by a second attempt, or, where
            it may find the way back in time, by a pause, too.
        rounds: how many times the usual number of requests it takes to hit enough of them: a strike at one of three
            workers meets a third of what runs.
        limit: the 99th percentile of the longest pauses that is to be reached, seconds; None for none.
    """

    name: str
    strike: Strike | None = None
    far: bool = False
    pest: str | None = None
    hits: Literal["all", "rerun", "shown"] = "all"
    rounds: int = 1
    limit: float | None = None


FAULTS = (
    Fault("none"),
    Fault("worker killed", _kill_worker, hits="rerun", rounds=3, limit=0.05),
    Fault("broker killed", _kill_broker, limit=0.25),
    Fault("both killed", _kill_both),
    Fault("worker frozen", _freeze_worker, hits="rerun", rounds=3, limit=3.5),
    Fault("worker hung", _hang_worker, hits="rerun", rounds=3, limit=3.5),
    Fault("broker frozen", _freeze_broker),
    Fault("connections cut", _cut, far=True, limit=0.5),
    Fault("clients' lines dead", _kill_clients_lines, far=True, limit=3.5),
    Fault("one way dead", _kill_one_way, far=True, limit=3.5),
    Fault("worker's line dead", _kill_workers_line, far=True, hits="shown", rounds=3, limit=3.5),
    Fault("bad line", _spoil, far=True),
    Fault("client never reads", pest="stuck"),
    Fault("flood", pest="flood"),
    Fault("garbage", pest="garbage"),
)


async def strikes(house: House, strike: Strike, calls: Sequence[Call], moments: list[float]) -> None:
    """Strike again and again, when everything is whole; notes when. Runs until it is cancelled.

    No stream is struck twice, however slow the machine is: one that is hit again waits for a worker to be emptied for
    it, which is another thing than a kill, and three times is what the broker calls poison.
    """
    whole = -math.inf
    while True:
        await until(partial(_ripe, calls, whole), "streams to strike", READY_LIMIT)
        moments.append(time.monotonic())
        await strike(house, len(moments) - 1)
        await house.whole()
        whole = time.monotonic()


async def _ripe(calls: Sequence[Call], whole: float) -> bool:
    """Whether no stream runs that was there before everything was whole again, and most are well under way."""
    running = [call for call in calls if not call.over]
    under_way = sum(4 * call.position > call.wanted for call in running)
    return all(call.began > whole for call in running) and 2 * under_way > len(running)


@contextlib.asynccontextmanager
async def beside(house: House, pest: str | None) -> AsyncIterator[None]:
    """A bad neighbour for as long as the block runs."""
    if pest is None:
        yield
        return
    command = [sys.executable, "-m", "chaos.pests", pest, house.endpoint, house.worker_endpoint]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    try:
        yield
        assert process.poll() is None, f"{pest} ended by itself with {process.returncode}"
    finally:
        process.kill()
        process.communicate()
