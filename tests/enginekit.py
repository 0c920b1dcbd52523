"""A real engine in a test: opened on a tiny model, given jobs, run until nothing is left to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loopmux.messages import Generate, ModelSpec, Run, Sampling, WorkerSpec
from loopmux.wire import new_id, pack_tokens
from loopmux_worker.engine import open_engine
from loopmux_worker.engine.base import Engine, Failed, Finished, Job, Key, Output, Produced
from waiting import wait_for

GREEDY = Sampling(temperature=0)
PATIENCE = 30.0
"""Seconds after which something that does not happen is a failure; generous, the machine is shared."""
until = partial(wait_for, limit=PATIENCE)
_STEPS = 10_000
"""After which an engine that still has something to do goes on for ever."""


def opened(base: Path | str, *models: ModelSpec, **settings: Any) -> Any:
    """An engine on a model's folder; the slots engine in float32 if nothing else is said."""
    given = {"engine": "slots", "dtype": "float32", "torch_threads": 1, "device": "cpu"} | settings
    return open_engine(WorkerSpec("w", "", models or (ModelSpec("base"),), str(base), **given), lambda *_: None)


def job(
    prompt: Sequence[int] | None,
    /,
    model: str = "base",
    *,
    adapter: str | None = None,
    session: str | None = None,
    prefix: Sequence[int] = (),
    key: Key | None = None,
    **generate: Any,
) -> Job:
    """A greedy request for token ids; without any, ``generate`` has the prompt."""
    given = {"sampling": GREEDY} | ({} if prompt is None else {"prompt_token_ids": pack_tokens(prompt)}) | generate
    return Job(key or Key(new_id(), 1), Run(model, adapter, session), Generate(**given), tuple(prefix))


def drain(engine: Engine) -> list[Output]:
    """Step until nothing is left to do."""
    outputs: list[Output] = []
    for _ in range(_STEPS):
        if engine.due() is None:
            return outputs
        outputs += engine.step()
    raise AssertionError("it goes on for ever")


def play(engine: Engine, jobs: Sequence[Job], every: int = 0) -> list[Output]:
    """What comes of jobs; one is submitted every ``every`` steps, or all at once."""
    left, outputs = list(jobs), []
    while every and left:
        engine.submit(left.pop(0))
        for _ in range(every):
            outputs += engine.step()
    for one in left:
        engine.submit(one)
    return outputs + drain(engine)


def run(engine: Engine, jobs: Sequence[Job], every: int = 0) -> tuple[list[list[int]], list[Finished | Failed]]:
    """``play`` as tokens and end of each job."""
    outputs = play(engine, jobs, every)
    ends = []
    for one in jobs:
        own = of(one, outputs)
        assert [isinstance(output, Produced) for output in own] == [True] * (len(own) - 1) + [False], "each ends once"
        position = len(one.prefix)
        for output in own[:-1]:
            assert output.position == position
            position += len(output.ids)
        ends.append(own[-1])
    return [ids(of(one, outputs)) for one in jobs], ends


def of(one: Job, outputs: Iterable[Output]) -> list[Any]:
    """What came of one job."""
    return [output for output in outputs if output.key == one.key]


def ids(outputs: Iterable[Output]) -> list[int]:
    """The tokens in outputs."""
    return [token for output in outputs if isinstance(output, Produced) for token in output.ids]


def text(outputs: Iterable[Output]) -> str:
    """The text in outputs."""
    return "".join(output.text for output in outputs if isinstance(output, Produced))
