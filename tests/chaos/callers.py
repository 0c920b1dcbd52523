"""Streaming clients that check every token: token i of a request of the echo engine is ``echo_token(request, i)``."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import loopmux
from chaos.house import MODEL, House
from loopmux_worker.engine.echo import echo_text, echo_token

DEADLINE = 90.0
"""Seconds of a request's deadline: far more than any fault may delay it."""
_WAKES = 8.0
"""Seconds after a fault in which a pause is put down to it: processes are started again in that time, and more."""
_ON_ITS_WAY = 0.05
"""Seconds after a fault in which tokens may come that were made before it."""


@dataclass(slots=True)
class Call:
    """One request as its caller saw it; times are ``time.monotonic()``.

    Attributes:
        wanted: tokens asked for.
        seen: when each chunk came.
        position: the next token to come.
        lost, repeated, wrong: tokens that were passed over, came again, or are not what the engine makes.
        attempts: workers that ran it.
        error: what it failed with; empty for a good end.
        over: whether it has ended, well or not.
    """

    wanted: int
    began: float
    seen: list[float] = field(default_factory=list)
    position: int = 0
    lost: int = 0
    repeated: int = 0
    wrong: int = 0
    attempts: int = 1
    error: str = ""
    over: bool = False

    def took(self, request: bytes, delta: loopmux.TextDelta) -> None:
        """Note a piece of output."""
        self.seen.append(time.monotonic())
        for position, token in enumerate(delta.token_ids, delta.position):
            self.lost += max(0, position - self.position)
            self.repeated += position < self.position
            self.wrong += token != echo_token(request, position)
            self.position = max(self.position, position + 1)

    def ended(self, request: bytes, result: loopmux.Result, text: str) -> None:
        """Note a good end."""
        self.attempts = result.attempts
        self.lost += self.wanted - self.position
        ids = tuple(echo_token(request, position) for position in range(self.wanted))
        self.wrong += result.token_ids != ids or text != result.text or text != "".join(map(echo_text, ids))

    def in_midstream(self, moment: float) -> bool:
        """Whether it had begun to receive and had not received everything; one that failed later counts."""
        return bool(self.seen) and self.seen[0] < moment and (bool(self.error) or moment < self.seen[-1])

    def pause(self, moment: float | None = None) -> float:
        """The longest time without a token, seconds: of the whole stream, or of what a fault then can be blamed for."""
        return self._longest(-math.inf, math.inf) if moment is None else self._longest(moment, moment + _WAKES)

    def cut(self, moment: float) -> float:
        """The pause in which a fault found the stream: what it took until tokens came again, and nothing later."""
        return self._longest(moment, moment + _ON_ITS_WAY)

    def _longest(self, begin: float, end: float) -> float:
        return max((b - a for a, b in pairwise(self.seen) if b > begin and a < end), default=0.0)


async def crowd(house: House, clients: int, lengths: Iterator[int], calls: list[Call]) -> None:
    """So many clients, each with a connection of its own, share requests of these lengths; each has one at a time."""

    async def one() -> None:
        async with house.client(model=MODEL, timeout=DEADLINE, connect_timeout=DEADLINE) as client:
            for length in lengths:
                call = Call(length, time.monotonic())
                calls.append(call)
                await _make(client, call)
                call.over = True

    await asyncio.gather(*(one() for _ in range(clients)))


async def _make(client: loopmux.AsyncClient, call: Call) -> None:
    async with client.stream("echo", max_new_tokens=call.wanted, ignore_eos=True) as stream:
        request = bytes.fromhex(stream.request_id)
        try:
            async for event in stream:
                if isinstance(event, loopmux.TextDelta):
                    call.took(request, event)
            call.ended(request, stream.result, stream.text)
        except loopmux.LoopmuxError as error:
            call.error = f"{type(error).__name__}: {error}"
