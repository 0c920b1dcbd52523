"""The engine alone, in this process: ``python -m loopmux_loadtest.bench_decode MODEL [--device cuda]``.

MODEL is a folder as ``make_model`` writes it. Prints JSON lines: the device's own copy bandwidth; what opening the
engine took; then for each batch, with random prompts, greedy and without an end,

- ``prefill_tok_s``: prompt tokens per second until the last request has its first token,
- ``step_ms``: median of the steps in which every request decodes, with handing out the tokens,
- ``outside``: share of such a step that is spent outside the model's forward, ``outside_ms`` the time (a mean; on a GPU
  the model is waited for, which it is not otherwise),
- ``bytes``: what such a step has to read, weights once (of the embedding only rows are looked up) and every request's
  keys and values; ``gb_s`` is that by the step's time, ``of_copy`` its share of the copy bandwidth, which counts bytes
  read and written,
- ``generate_ms``: a step of transformers' own ``generate()`` on the same device, all prompts in one static batch,
  with ``generate_of_copy`` its share,
- ``adapters_ms``: our step with ``--adapters`` of rank 16 mixed in the batch,
- with ``--profile`` a line of its own: the operators and the kernels of our own (``attention.c``, ``norm.c``; with
  ``--kernels torch`` there are none) that such a step spends most of its processor time in, with their shares of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM

from loopmux import weightfiles
from loopmux.messages import Generate, ModelSpec, Run, Sampling, WorkerSpec
from loopmux.wire import new_id, pack_tokens
from loopmux_worker.engine import freed, open_engine
from loopmux_worker.engine.base import Engine, Failed, Job, Key, Produced
from loopmux_worker.engine.slots.engine import SlotsEngine
from loopmux_worker.engine.slots.native import Kernel
from loopmux_worker.engine.slots.norms import Norm

_COPIED = {"cuda": 2**32, "cpu": 2**28}
"""Bytes of the tensor whose copying is timed: more than any cache holds."""
_LARGEST = 8
"""Operators that a profile names."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a decoding step has to read: bytes of the weights, and of one token's keys and values."""

    weights: int
    token: int

    def step(self, batch: int, length: float) -> float:
        """Bytes of a step of so many requests of a mean length."""
        return self.weights + batch * length * self.token


def traffic(model: Path) -> Traffic:
    """Read off a model's files."""
    config = weightfiles.read_json(model / weightfiles.MODEL_CONFIG)
    tensors = {
        name: found
        for path in weightfiles.model_weights(model, pickle=False)
        for name, found in weightfiles.tensors(path).items()
    }
    looked_up = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * size
    return Traffic(2 * (sum(tensor.elements for tensor in tensors.values()) - looked_up), 2 * numbers)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second when the device copies within its own memory."""
    source = torch.zeros(_COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        target.copy_(source)
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * len(source) / min(seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share."""

    model: Path
    device: str
    prompt: int
    new: int
    most: int
    adapters: int
    profiled: bool
    kernels: Literal["auto", "native", "torch"]

    def engine(self) -> SlotsEngine:
        """Ours, warm."""
        models = [ModelSpec("base", model_type="base")]
        models += [
            ModelSpec(f"lora{n}", adapter_dir=f"{self.model}-lora{n}", model_type="base") for n in range(self.adapters)
        ]
        context = self.prompt + 2 * self.new + 64
        spec = WorkerSpec(
            "bench", "", tuple(models), str(self.model), dtype="bfloat16", device=self.device, engine="slots",
            slots=self.most, context=context, kernels=self.kernels,
        )  # fmt: skip
        engine = open_engine(spec, lambda *_: None)
        freed.give_back()
        assert isinstance(engine, SlotsEngine)
        return engine

    def prompts(self, batch: int) -> list[list[int]]:
        """Random prompts, other ones in every call, so that no state is found."""
        return [[random.randrange(10, 15_000) for _ in range(self.prompt)] for _ in range(batch)]  # noqa: S311

    def ours(
        self, engine: Engine, batch: int, adapters: int = 0, around: AbstractContextManager[Any] | None = None
    ) -> dict[str, float]:
        """A batch in our engine: prefill, then steps in which every request decodes, with ``around`` entered."""
        jobs = []
        limit = self.prompt + 2 * self.new  # nobody ends by itself
        for number, prompt in enumerate(self.prompts(batch)):
            generate = Generate(
                prompt_token_ids=pack_tokens(prompt), max_new_tokens=limit, ignore_eos=True,
                sampling=Sampling(temperature=0),
            )  # fmt: skip
            jobs.append(Job(Key(new_id(), 0), Run(f"lora{number % adapters}" if adapters else "base"), generate))
        made = {job.key: 0 for job in jobs}
        started = time.perf_counter()
        for job in jobs:
            engine.submit(job)
        while not all(made.values()):
            _count(engine, made)
        prefilled = time.perf_counter() - started
        seconds = []
        with around or nullcontext():
            for _ in range(self.new):
                began = time.perf_counter()
                _count(engine, made)
                seconds.append(time.perf_counter() - began)
        length = self.prompt + statistics.mean(made.values()) - self.new / 2
        for job in jobs:
            engine.cancel(job.key)
        rate = batch * self.prompt / prefilled
        return {"prefill": rate, "step": statistics.median(seconds), "steps": sum(seconds), "length": length}

    def outside(self, engine: SlotsEngine, batch: int) -> tuple[float, float]:
        """Share of the decoding steps that is spent outside the model's forward, and its mean seconds in a step."""
        model = engine.model
        began, inside = 0.0, [0.0]

        def enter(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def leave(*_: Any) -> None:
            _wait(self.device)
            inside.append(time.perf_counter() - began)

        hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
        found = self.ours(engine, batch)
        for hook in hooks:
            hook.remove()
        model_s, all_s = sum(inside[-self.new :]), found["steps"]
        return 1 - model_s / all_s, (all_s - model_s) / self.new

    def profile(self, engine: SlotsEngine, batch: int) -> dict[str, float]:
        """The operators with the largest shares of the processor time of decoding steps, the largest first."""
        recorded = profile(activities=[ProfilerActivity.CPU])
        with _told(Kernel, "__call__", "attention.c"), _told(Norm, "forward", "norm.c"):
            self.ours(engine, batch, around=recorded)
        found = recorded.key_averages()
        total = sum(event.self_cpu_time_total for event in found)
        largest = sorted(found, key=lambda event: event.self_cpu_time_total, reverse=True)[:_LARGEST]
        return {event.key: round(event.self_cpu_time_total / total, 3) for event in largest}

    def generate(self, model: Any, batch: int) -> float:
        """Seconds of a decoding step of transformers' ``generate()``."""
        ids = torch.tensor(self.prompts(batch), device=self.device)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        taken = []
        for new in (2, self.new + 2):
            _wait(self.device)
            started = time.perf_counter()
            with torch.inference_mode():
                model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
            _wait(self.device)
            taken.append(time.perf_counter() - started)
        return (taken[1] - taken[0]) / self.new


@contextmanager
def _told(kind: type, method: str, name: str) -> Iterator[None]:
    """Tell the profiler about code of our own, which is no operator of torch's."""
    plain = getattr(kind, method)

    def recorded(*given: Any) -> Any:
        with record_function(name):
            return plain(*given)

    setattr(kind, method, recorded)
    try:
        yield
    finally:
        setattr(kind, method, plain)


def _count(engine: Engine, made: dict[Key, int]) -> None:
    for output in engine.step():
        if isinstance(output, Produced):
            made[output.key] += len(output.ids)
        elif isinstance(output, Failed):
            raise output.error


def measure(bench: Bench, batches: Sequence[int], *, beside: bool) -> Iterator[dict[str, Any]]:
    """All measurements, one after the other."""
    copied = copy_bandwidth(bench.device)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield {"case": "device", "name": name, "torch": torch.__version__, "copy_gb_s": round(copied / 1e9, 1)}
    started = time.perf_counter()
    engine = bench.engine()
    report = engine.describe().report
    kept = {
        key: report[key] for key in ("why", "attention", "transformers", "dtype", "kv_rows", "kv_context", "parameters")
    }
    yield {"case": "open", "seconds": round(time.perf_counter() - started, 2), **kept}
    moved = traffic(bench.model)
    lines = []
    for batch in batches:
        bench.ours(engine, batch)  # kernels are chosen and memory is taken when a shape is new
        found = bench.ours(engine, batch)
        size = moved.step(batch, found["length"])
        line = {
            "case": "decode",
            "batch": batch,
            "prompt": bench.prompt,
            "prefill_tok_s": round(found["prefill"]),
            "step_ms": round(found["step"] * 1e3, 3),
            "tok_s": round(batch / found["step"]),
            "bytes": round(size),
            "gb_s": round(size / found["step"] / 1e9, 1),
            "of_copy": round(size / found["step"] / copied, 3),
        }
        share, seconds = bench.outside(engine, batch)
        line |= {"outside": round(share, 3), "outside_ms": round(seconds * 1e3, 3)}
        if bench.adapters:
            bench.ours(engine, batch, bench.adapters)
            line["adapters_ms"] = round(bench.ours(engine, batch, bench.adapters)["step"] * 1e3, 3)
        yield line
        if bench.profiled:
            yield {"case": "profile", "batch": batch, "shares": bench.profile(engine, batch)}
        lines.append((batch, size))
    engine.close()
    if not beside:
        return
    del engine
    gc.collect()
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.bfloat16).eval().to(bench.device)
    for batch, size in lines:
        bench.generate(model, batch)
        step = bench.generate(model, batch)
        share = round(size / step / copied, 3)
        yield {"case": "generate", "batch": batch, "generate_ms": round(step * 1e3, 3), "generate_of_copy": share}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, one JSON line per case."""
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.bench_decode", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="decoding steps that are timed")
    parser.add_argument("--adapters", type=int, default=0, help="adapters to mix, for adapters_ms")
    parser.add_argument(
        "--kernels", choices=("auto", "native", "torch"), default="auto", help="as in the configuration"
    )
    parser.add_argument("--profile", action="store_true", help="say where a step's time goes")
    parser.add_argument("--no-generate", action="store_true", help="ours alone")
    given = parser.parse_args(arguments)
    bench = Bench(
        given.model.resolve(),
        given.device,
        given.prompt,
        given.new,
        max(given.batch),
        given.adapters,
        given.profile,
        given.kernels,
    )
    freed.keep()  # as every worker does
    for line in measure(bench, given.batch, beside=not given.no_generate):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
