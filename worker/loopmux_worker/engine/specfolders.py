"""Which folders a specification means, and whether they are whole; known without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loopmux import modelfolders
from loopmux.errors import ConfigError, LoopmuxError
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_worker.causes import in_words


def check_folders(spec: WorkerSpec) -> None:
    """Refuse a specification of which nothing could be served.

    An adapter that is wrong beside models that are not is left to the engine, which serves the others.

    Raises:
        ConfigError: the base's folder, or every adapter's, is missing, incomplete, cut off, or holds pickles that are
            not allowed.
    """
    modelfolders.check_model(base_folder(spec), pickle=spec.allow_pickle_weights)
    wrong = {model.id: error for model in spec.models if (error := _wrong_adapter(model, spec)) is not None}
    if len(wrong) == len(spec.models):
        raise nothing_left(wrong)


def nothing_left(reasons: Mapping[str, LoopmuxError]) -> LoopmuxError:
    """The error of a worker none of whose models can be served."""
    if len(reasons) == 1:
        return next(iter(reasons.values()))
    said = "; ".join(f"{model}: {error.message}" for model, error in reasons.items())
    return ConfigError(f"none of its {len(reasons)} models can be served: {said}")


def _wrong_adapter(model: ModelSpec, spec: WorkerSpec) -> ConfigError | None:
    try:
        if model.adapter_dir:
            modelfolders.adapter(model.adapter_dir, pickle=spec.allow_pickle_weights)
    except ConfigError as error:
        return error
    return None


def base_folder(spec: WorkerSpec) -> Path:
    """The folder of the base model; a merged model in ``adapter_dir`` is a base of its own.

    Raises:
        ConfigError: no such folder, or a merged model next to other models.
    """
    merged = [m for m in spec.models if m.adapter_dir and _is_merged(m.adapter_dir)]
    if merged:
        if len(spec.models) > 1:
            raise ConfigError(
                f"model {merged[0].id!r}: adapter_dir {merged[0].adapter_dir!r} holds a merged model, which cannot "
                "share a worker with other models: give it as base_model"
            )
        return modelfolders.adapter_folder(str(merged[0].adapter_dir))
    if spec.base_model is None:
        raise ConfigError(f"worker {spec.name!r}: base_model is missing; only the echo engine does without")
    folder = Path(spec.base_model)
    return folder if folder.is_dir() else _from_hub(spec.base_model)


def _is_merged(directory: str) -> bool:
    try:
        return modelfolders.is_merged(modelfolders.adapter_folder(directory))
    except ConfigError:
        return False  # no folder; whoever loads it says so


def _from_hub(name: str) -> Path:
    if not modelfolders.is_hub_id(name):
        raise ConfigError(f"base_model {name!r}: found no such folder, expected one, or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ConfigError(
            f"base_model {name!r}: found no such folder, and the hub does not give it ({in_words(error)}); correct the "
            f"path, or download it where there is a network: hf download {name}"
        ) from error
