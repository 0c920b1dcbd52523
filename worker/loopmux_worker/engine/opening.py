"""Opening an engine on a real model: load, choose, warm up."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version

from loopmux.errors import ConfigError
from loopmux.messages import Generate, Run, Sampling, WorkerSpec
from loopmux.wire import new_id, pack_tokens
from loopmux_worker.engine import adapterfiles, freed, memory
from loopmux_worker.engine.adapters import Adapters
from loopmux_worker.engine.base import Engine, Failed, Job, Key
from loopmux_worker.engine.loading import Loaded, Progress, load
from loopmux_worker.engine.models import Models
from loopmux_worker.engine.plain import PlainEngine
from loopmux_worker.engine.slots.attention import KVMemory
from loopmux_worker.engine.slots.engine import SlotsEngine
from loopmux_worker.engine.slots.forward import Forward, Trial, positions_by_length, try_rows
from loopmux_worker.engine.slots.linears import alike, pack
from loopmux_worker.engine.slots.lora import MixedAdapters
from loopmux_worker.engine.slots.norms import replace
from loopmux_worker.engine.slots.pairs import CannotMix, pairs_of
from loopmux_worker.engine.slots.sizing import Size, size


def open_on_model(spec: WorkerSpec, progress: Progress) -> Engine:
    """The engine for a specification that names a model, loaded and warm.

    Raises:
        LoopmuxError: something in it cannot be served; it says what was found, what was expected and what to do.
    """
    with memory.loading(spec):
        loaded = load(spec, progress)
        trial = Trial("configured") if spec.engine == "plain" else _try(spec, loaded)
    if spec.engine == "slots" and trial.why_not is not None:
        raise ConfigError(
            f"engine: found slots, but {trial.why_not}; use auto or plain, which takes one request at a time"
        )
    if trial.why_not is None and loaded.device.type == "cpu":
        with memory.loading(spec):
            packed = _try_rows(spec, loaded, trial) if _pack(spec, loaded) else trial
            if packed.why_not is not None:
                del loaded  # packing cannot be undone, and both would need twice the memory
                loaded = load(spec, progress)
                loaded.notes.append(f"its weights are not packed, which is slower: packed, {packed.why_not}")
    with memory.loading(spec):
        loaded.leave_files()
    if trial.why_not is None:
        adapters = MixedAdapters(loaded.model, allow_pickle=spec.allow_pickle_weights)
        why = "configured" if spec.engine == "slots" else "the model and every adapter can share a forward"
        room = _sized(spec, loaded, trial.token_bytes)
        taken = room.rows * room.context * trial.token_bytes / memory.MIB
        state = f"{taken:.0f} MiB of attention state ({room.rows} rows of {room.context} tokens)"
        progress("loading", f"{state} for {room.most} requests at once")
        models = Models(spec, loaded, adapters, progress, why)
        forward = Forward(loaded.model, KVMemory(room.rows, room.context, loaded.device, spec.kernels), adapters)
        engine: Engine = SlotsEngine(models, forward, room.most)
        expected = f"{state} and one step"
    else:
        one = Adapters(loaded.model, allow_pickle=spec.allow_pickle_weights)
        models = Models(spec, loaded, one, progress, trial.why_not)
        engine = PlainEngine(models, one)
        expected = "what one step computes"
    description = engine.describe()
    progress("loading", f"{description.engine} engine: {description.report['why']}")
    progress("warming", "one token")
    with memory.explained("a first token was computed", expected, "set a smaller kv_cache_gib, slots or context"):
        warm_up(engine, models.first)
    return engine


def ruled_out(spec: WorkerSpec, device: str, version: str) -> str | None:
    """Why the slots engine is not tried on a kind of device, with a version of transformers; None where it is."""
    if Version(version).major < 5:
        return f"transformers {version} is older than 5"
    if device not in ("cpu", "cuda"):
        return f"the slots engine was not tried on {device}"
    if spec.use_4bit or spec.use_8bit:
        return "the slots engine was not tried on quantised weights"
    return None


def _try(spec: WorkerSpec, loaded: Loaded) -> Trial:
    """Whether the slots engine can serve this; if only ``generate()`` can, why."""
    if reason := ruled_out(spec, loaded.device.type, transformers.__version__):
        return Trial(reason)
    for model in spec.models:
        if model.adapter_dir is None:
            continue
        try:
            with memory.loading_adapter(model.id, model.adapter_dir):
                found = adapterfiles.read(model.adapter_dir, allow_pickle=spec.allow_pickle_weights)
                pairs_of(loaded.model, found)
        except CannotMix as error:
            return Trial(f"adapter {model.id}: {error.message}")
        except memory.OutOfMemory:
            raise
        except ConfigError:
            continue  # it is left out with this reason, by whichever engine
    if reason := positions_by_length(loaded.model, loaded.context):
        return Trial(reason)
    return _try_rows(spec, loaded)


def _try_rows(spec: WorkerSpec, loaded: Loaded, before: Trial | None = None) -> Trial:
    """Try the model; if it was tried ``before`` it was changed, its logits have to be what they were then."""
    plain = before.plain if before else ()
    adapters = MixedAdapters(loaded.model)
    return try_rows(loaded.model, adapters, loaded.device, loaded.vocabulary, plain, spec.kernels)


def _pack(spec: WorkerSpec, loaded: Loaded) -> bool:
    """Replace what this machine computes faster in other modules; whether that is anything."""
    packed = pack(loaded.model, alike(loaded.model, torch.tensor([[0, 1]], device=loaded.device)))
    return packed + (replace(loaded.model) if spec.kernels != "torch" else 0) > 0


def _sized(spec: WorkerSpec, loaded: Loaded, token_bytes: int) -> Size:
    """Rows for the memory that is there; a context that has to be shorter for it is noted."""
    on_gpu = loaded.device.type == "cuda"
    freed.give_back()  # what loading left behind is free, too
    if on_gpu:
        torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(loaded.device)[0] if on_gpu else memory.available()
    found = size(
        token_bytes,
        free,
        model_context=loaded.context,
        context=spec.context,
        most=spec.slots,
        gib=spec.kv_cache_gib,
        on_gpu=on_gpu,
    )
    if found.context < loaded.context:
        loaded.notes.append(
            f"the context is {found.context} tokens of {loaded.context}, for the memory of {found.rows} KV rows; "
            "set context, slots or kv_cache_gib for another split"
        )
        loaded.context = found.context
    return found


def warm_up(engine: Engine, model: str) -> None:
    """One token through the whole path, so that READY means ready.

    Raises:
        LoopmuxError: it did not come; the engine is closed.
    """
    generate = Generate(prompt_token_ids=pack_tokens([0]), max_new_tokens=1, sampling=Sampling(temperature=0))
    engine.submit(Job(Key(new_id(), 0), Run(model), generate))
    while engine.due() is not None:
        for output in engine.step():
            if isinstance(output, Failed):
                engine.close()
                raise output.error
