"""Many tool loops at once: ``python -m loopmux_loadtest.bench_loops`` prints one JSON line per run.

A private stack (broker, launcher, workers on the demo model in float32) and one ``AsyncClient``. Each loop is a sum in
steps, one call a turn, with its own numbers; its tools take 0 to 500 ms. The runs, over the same loops:

- ``alone``: one loop after the other, tools at once: how the transcripts have to be;
- ``together``: all loops at the same time;
- ``killed`` (with ``--kill``): the same, while a worker and later the broker get SIGKILL.

The figures: ``differ`` are transcripts unlike those of ``alone``, ``malformed`` those with a call that has not exactly
one result, ``rerun`` loops whose tools ran other calls than those of the transcript, each once; ``again`` turns that
lost a worker, ``moved`` turns on another worker than the turn before. ``reused`` is the share of the prompt tokens of
second and later turns which the turn before had computed and whose state was found; ``rewritten`` how many tokens of
answers were not read as they were produced. ``stretch`` is the longest loop by the median one, in time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from loopmux import AsyncClient, LoopmuxError, Result
from loopmux.loopevents import LoopEvent, TurnFinished
from loopmux.privatestack import PrivateStack, launcher_command

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"
LONGEST_TOOL = 0.5
"""Seconds."""
_PATIENCE = 600.0
"""Seconds for one turn: a loaded machine is no failure."""


@dataclass(frozen=True, slots=True)
class Sum:
    """What one loop is about: ``steps`` calls, in ``steps + 1`` turns. ``pauses`` are what they take, seconds."""

    prompt: str
    pauses: tuple[float, ...]

    @classmethod
    def make(cls, number: int, steps: int) -> Sum:
        """The loop of a number; the same for the same number."""
        dice = random.Random(number)  # noqa: S311 - no secret: the same loops every time
        ways = ("add the result and {}", "subtract {} from the result", "multiply the result by {}")
        words = [f"Add {dice.randint(2, 60)} and {dice.randint(2, 60)}"]
        for _ in range(steps - 1):
            way = dice.choice(ways)
            words.append(way.format(dice.randint(2, 4) if "multiply" in way else dice.randint(2, 40)))
        return cls(", then ".join(words) + ".", tuple(dice.uniform(0, LONGEST_TOOL) for _ in range(4 * steps)))


@dataclass(slots=True)
class Played:
    """A loop that came to its end; ``called`` are the calls that had a result, ``ran`` those that its tools ran."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: list[Result] = field(default_factory=list)
    called: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ran: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def well_formed(self) -> bool:
        """Whether each call has exactly one result, right behind its turn, and an answer comes last."""
        expected: list[str | None] = []
        for message in self.messages[1:]:
            if message["role"] == "tool":
                if not expected or message["tool_call_id"] != expected.pop(0):
                    return False
            elif expected or message["role"] != "assistant":
                return False
            else:
                expected = [call["id"] for call in message.get("tool_calls", ())]
        return not expected and self.messages[-1]["role"] == "assistant"

    @property
    def said(self) -> list[tuple[str, str, str]]:
        """The transcript without the ids of its calls, which are those of requests."""
        calls = [[call["function"] for call in message.get("tool_calls", ())] for message in self.messages]
        return [(m["role"], m["content"], json.dumps(c)) for m, c in zip(self.messages, calls, strict=True)]


class Loops:
    """All loops of one run.

    Args:
        client: of the stack, with the model set.
        sums: what they are about.
        at_once: loops at the same time.
        pause: how much of their time the tools take.
    """

    def __init__(self, client: AsyncClient, sums: Sequence[Sum], at_once: int, pause: float) -> None:
        self._client, self._sums, self._pause = client, sums, pause
        self._gate = asyncio.Semaphore(at_once)
        self.turns = 0
        """Turns that are over."""

    async def play(self) -> list[Played]:
        """Play them to their ends."""
        return await asyncio.gather(*(self._one(each) for each in self._sums))

    async def _one(self, each: Sum) -> Played:
        async with self._gate:
            played, began = Played(), time.monotonic()
            try:
                tools = self._tools(played, each.pauses)
                out = await self._client.run_tools(each.prompt, tools=tools, on_event=lambda e: self._note(played, e))
                played.messages = out.messages
                played.called = [(e["tool"], e["args"]) for e in out.tool_log if e["status"] == "success"]
            except LoopmuxError as error:
                played.error, played.messages = f"{type(error).__name__}: {error}", error.messages or []
            played.seconds = time.monotonic() - began
            return played

    def _note(self, played: Played, event: LoopEvent) -> None:
        if isinstance(event, TurnFinished):
            played.turns.append(event.result)
            self.turns += 1

    def _tools(self, played: Played, pauses: Sequence[float]) -> list[Callable[..., Awaitable[int]]]:
        async def ran(name: str, a: int, b: int) -> None:
            played.ran.append((name, {"a": a, "b": b}))
            await asyncio.sleep(self._pause * pauses[len(played.ran) % len(pauses)])

        async def add(a: int, b: int) -> int:
            """Add two whole numbers."""
            await ran("add", a, b)
            return a + b

        async def subtract(a: int, b: int) -> int:
            """Subtract b from a."""
            await ran("subtract", a, b)
            return a - b

        async def multiply(a: int, b: int) -> int:
            """Multiply two whole numbers."""
            await ran("multiply", a, b)
            return a * b

        return [add, subtract, multiply]


def reused(played: Sequence[Played]) -> float:
    """Of the prompt tokens that the turn before had computed, the share whose state was found.

    The last token of an answer is never computed: nothing comes behind it.
    """
    pairs = [pair for each in played for pair in pairwise(turn.usage for turn in each.turns)]
    could = [before.prompt_tokens + before.completion_tokens - 1 for before, _ in pairs]
    found = [min(now.cached_tokens, most) for (_, now), most in zip(pairs, could, strict=True)]
    return sum(found) / sum(could)


def figures(run: str, played: Sequence[Played], wanted: Sequence[Played], seconds: float) -> dict[str, Any]:
    """One line of the report; ``wanted`` is the undisturbed run."""
    times = [each.seconds for each in played]
    return {
        "run": run,
        "loops": len(played),
        "turns": sum(len(each.turns) for each in played),
        "seconds": round(seconds, 1),
        "failed": [each.error for each in played if each.error],
        "malformed": sum(not each.well_formed for each in played if not each.error),
        "differ": sum(each.said != other.said for each, other in zip(played, wanted, strict=True)),
        "rerun": sum(each.ran != each.called for each in played if not each.error),
        "again": sum(turn.attempts > 1 for each in played for turn in each.turns),
        "moved": sum(a.worker != b.worker for each in played for a, b in pairwise(each.turns)),
        "reused": round(reused(played), 4),
        "rewritten": sum(turn.usage.rewritten_tokens for each in played for turn in each.turns),
        "stretch": round(max(times) / statistics.median(times), 2),
    }


async def _strike(client: AsyncClient, loops: Loops, turns: int) -> None:
    """Kill a worker that computes when four tenths of the turns are over, and the broker when seven tenths are."""
    for share, victim in ((0.4, _busy), (0.7, _broker)):
        while loops.turns < share * turns:
            await asyncio.sleep(0.005)
        os.kill(await victim(client), signal.SIGKILL)


async def _busy(client: AsyncClient) -> int:
    while not (busy := [worker.pid for worker in (await client.status()).workers if worker.running]):
        await asyncio.sleep(0.005)
    return busy[0]


async def _broker(client: AsyncClient) -> int:
    return (await client.status()).pid


async def bench(endpoint: str, count: int, turns: int, *, kill: bool) -> list[dict[str, Any]]:
    """All runs, each printed when it is over."""
    sums = [Sum.make(number, turns - 1) for number in range(count)]
    report: list[dict[str, Any]] = []
    wanted: list[Played] = []
    for run in ("alone", "together", *(("killed",) if kill else ())):
        async with AsyncClient(
            endpoint, model="tools", temperature=0, timeout=_PATIENCE, idle_timeout=_PATIENCE, connect_timeout=_PATIENCE
        ) as client:
            loops = Loops(client, sums, *((1, 0.0) if run == "alone" else (count, 1.0)))
            began = time.monotonic()
            striking = asyncio.create_task(
                _strike(client, loops, report[0]["turns"]) if run == "killed" else asyncio.sleep(0)
            )
            played = await loops.play()
            await asyncio.wait_for(striking, 1)
        wanted = wanted or played
        report.append(figures(run, played, wanted, time.monotonic() - began))
        print(json.dumps(report[-1]), flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 0 where nobody could tell from the transcripts."""
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.bench_loops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--loops", type=int, default=100, help="loops (%(default)s)")
    parser.add_argument("--turns", type=int, default=6, help="turns of each, if the model does as asked (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes, of one thread each (%(default)s)")
    parser.add_argument("--slots", type=int, default=16, help="requests that a worker runs at once (%(default)s)")
    parser.add_argument("--kill", action="store_true", help="one more run, in which a worker and the broker are killed")
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder of the demo model (%(default)s)")
    given = parser.parse_args(arguments)
    tools = {"base_model": str(given.demo / "base"), "adapter_dir": str(given.demo / "adapters" / "tools")}
    how = {"environment": "own", "workers": given.workers, "dtype": "float32", "torch_threads": 1, "slots": given.slots}
    config = {"environments": {"own": {"path": sys.prefix}}, "models": {"tools": {**tools, **how}}}
    stack = PrivateStack(config, launcher_command())
    try:
        stack.begin()
        stack.wait_ready(None)
        report = asyncio.run(bench(stack.endpoint, given.loops, given.turns, kill=given.kill))
    finally:
        stack.stop()
    return int(any(run["failed"] or run["malformed"] or run["differ"] or run["rerun"] for run in report))


if __name__ == "__main__":
    raise SystemExit(main())
