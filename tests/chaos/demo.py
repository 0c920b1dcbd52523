"""The same strikes under the demo model on the real engine: in fp32, deterministic, nobody can tell from the text.

A deterministic request is computed alone, token by token, and again where its worker was lost: so there are few workers
and short streams, which two cores compute six times in two minutes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loopmux
from chaos.house import READY_LIMIT, House, until
from chaos.nemesis import FAULTS, Fault
from e2e.loops import scripted_tools

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"
_ADAPTERS = ("tools", "shout")
SPEC = {
    "base_model": str(DEMO / "base"),
    "models": [{"id": "default"}, *({"id": a, "adapter_dir": str(DEMO / "adapters" / a)} for a in _ADAPTERS)],
    "dtype": "float32",
    "torch_threads": 1,
}
STRIKES = tuple(fault for fault in FAULTS if fault.strike is not None and not fault.far)


@dataclass
class Asked:
    """One stream: what was asked, and what came."""

    prompt: str
    options: dict[str, Any]
    ids: list[int] = field(default_factory=list)
    result: loopmux.Result | None = None
    error: str = ""

    @property
    def in_midstream(self) -> bool:
        """Whether a quarter of it is here, and not all."""
        wanted = self.options["max_new_tokens"]
        return wanted <= 4 * len(self.ids) < 4 * wanted

    async def run(self, client: loopmux.AsyncClient) -> None:
        """Ask and read to the end."""
        async with client.stream(self.prompt, **self.options) as stream:
            try:
                async for event in stream:
                    if isinstance(event, loopmux.TextDelta):
                        self.ids += event.token_ids
                self.result = stream.result
            except loopmux.LoopmuxError as error:
                self.error = f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a strike did: streams, those hit in mid-stream, that failed, whose output differs, that a second worker ran.

    ``loops`` are tool loops that ran meanwhile, ``broken`` those that failed or ran a call twice or not at all.
    """

    fault: Fault
    streams: int
    hit: int
    errors: tuple[str, ...]
    differing: int
    rerun: int
    loops: int
    broken: tuple[str, ...]
    open: dict[str, int]

    @property
    def good(self) -> bool:
        """Whether streams were hit and nobody could tell."""
        hit = self.rerun if self.fault.hits == "rerun" else self.hit
        return hit > 0 and not (self.errors or self.differing or self.broken or self.open)

    def __str__(self) -> str:
        ran = f"{self.streams} streams, {self.hit} hit, {len(self.errors)} failed, {self.differing} differ"
        loops = f"{self.loops} tool loops, {len(self.broken)} broken"
        return f"{self.fault.name:19} {ran}, {self.rerun} run again; {loops}; left open: {self.open or 'nothing'}"


async def demo(workers: int, streams: int, tokens: int, faults: Sequence[Fault] = STRIKES) -> list[Outcome]:
    """Each fault once, in mid-stream."""
    examples = json.loads((DEMO / "train" / "examples.json").read_text())
    async with House([SPEC] * workers) as house:
        wanted = _questions(examples, streams, tokens)
        async with _client(house) as client:
            await asyncio.gather(*(asked.run(client) for asked in wanted))
        assert not any(asked.error for asked in wanted), [asked.error for asked in wanted]
        outcomes = []
        for n, fault in enumerate(faults):
            outcome = await _struck(house, n, fault, wanted, examples)
            print(outcome, *outcome.errors[:3], *outcome.broken[:3], sep="\n  ", flush=True)
            outcomes.append(outcome)
        return outcomes


def _client(house: House) -> loopmux.AsyncClient:
    return house.client(timeout=300, connect_timeout=60, deterministic=True)


def _questions(examples: dict[str, Any], streams: int, tokens: int) -> list[Asked]:
    """Base and adapters, greedy and drawn, longer than the model would talk by itself."""
    asked = []
    for n, chat in zip(range(streams), examples["chats"], strict=False):
        drawn = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": n}
        how = drawn if n % 2 else {"temperature": 0.0}
        options = {"model": chat["adapter"] or "default", "max_new_tokens": tokens, "ignore_eos": True, **how}
        asked.append(Asked(chat["question"], options))
    return asked


async def _struck(house: House, n: int, fault: Fault, wanted: list[Asked], examples: dict[str, Any]) -> Outcome:
    again = [Asked(asked.prompt, asked.options) for asked in wanted]
    broken: list[str] = []
    ran: list[str] = []
    async with _client(house) as client:
        running = asyncio.gather(*(asked.run(client) for asked in again))
        loops = asyncio.create_task(_loops(client, examples["loops"], running, ran, broken))

        async def under_way() -> bool:
            return 2 * sum(asked.in_midstream for asked in again) > len(again)

        await until(under_way, "most streams are well under way", READY_LIMIT)
        hit = sum(asked.in_midstream for asked in again)
        assert fault.strike is not None
        await fault.strike(house, n)
        await running
        await loops
    await house.whole()
    pairs = zip(wanted, again, strict=True)
    return Outcome(
        fault=fault,
        streams=len(again),
        hit=hit,
        errors=tuple(asked.error for asked in again if asked.error),
        differing=sum(not b.error and not _equal(a, b) for a, b in pairs),
        rerun=sum(asked.result is not None and asked.result.attempts > 1 for asked in again),
        loops=len(ran),
        broken=tuple(broken),
        open=await house.left_open(),
    )


def _equal(a: Asked, b: Asked) -> bool:
    assert a.result is not None
    assert b.result is not None
    return a.ids == b.ids and a.result.text == b.result.text and tuple(b.ids) == b.result.token_ids


async def _loops(
    client: loopmux.AsyncClient,
    examples: list[dict[str, Any]],
    running: asyncio.Future[Any],
    ran: list[str],
    broken: list[str],
) -> None:
    """Tool loops, one after the other, while the streams run; the tools insist on every call exactly once."""
    for example in examples:
        ran.append(example["name"])
        try:
            out = await client.run_tools(
                example["prompt"],
                model=example["adapter"],
                tools=scripted_tools(example),
                temperature=0,
                concurrency=1,
            )
            good = example["answer_contains"] in out.text and out.turns == len(example["turns"]) + 1
            if not good or any(entry["status"] != "success" for entry in out.tool_log):
                broken.append(f"{example['name']}: {out.text!r} {out.tool_log}")
        except loopmux.LoopmuxError as error:
            broken.append(f"{example['name']}: {type(error).__name__}: {error}")
        if running.done():
            return
