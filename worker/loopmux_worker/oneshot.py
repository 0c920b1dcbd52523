"""One generation in this process, without a broker: what a program that loads a model for every call does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loopmux import modelfolders
from loopmux.messages import Generate, ModelSpec, Run, WorkerSpec
from loopmux.wire import new_id
from loopmux_worker.engine import memory, open_engine
from loopmux_worker.engine.base import Failed, Finished, Job, Key, Produced


def one_shot(spec: WorkerSpec, generate: Generate, write: Callable[[str], None]) -> None:
    """Load, answer one request piece by piece into ``write``, let go.

    Raises:
        LoopmuxError: the model cannot be loaded, or the request not be run.
    """
    with memory.explained("the model was made ready", "it and its threads"):
        engine = open_engine(spec, lambda phase, detail: None)  # noqa: ARG005
    try:
        key = Key(new_id(), 1)
        engine.submit(Job(key, Run(spec.models[0].id), generate))
        while True:
            for output in engine.step():
                match output:
                    case Produced():
                        write(output.text)
                    case Failed():
                        raise output.error
                    case Finished():
                        return
    finally:
        engine.close()


def spec_for(
    base_model: str, adapter_dir: str | None, model_type: str, system_prompt: str | None, threads: int | None
) -> WorkerSpec:
    """The specification of a worker with this one model.

    Raises:
        ConfigError: the base model is neither a folder nor a hub id.
    """
    base = modelfolders.base_model(base_model, Path()).name
    model = ModelSpec("model", adapter_dir, "base" if model_type == "base" else "instruct", system_prompt)
    # one request gains nothing from an engine that runs many
    return WorkerSpec("one-shot", "", (model,), base, torch_threads=threads, engine="plain")
