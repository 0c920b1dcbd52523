"""Which folder a ``base_model`` or an ``adapter_dir`` means, and what must lie in it: one rule book for all programs.

A ``base_model`` is a folder where there is one. Otherwise ``owner/name`` is a model of the hub, unless it looks like a
slip of the pen: ``owner`` is a folder here, or a model's folder of nearly that name is. What is in the hub's cache on
this machine is certainly a hub model.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loopmux.weightfiles import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    Unusable,
    adapter_weights,
    missing,
    model_weights,
    read_json,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_EXPECTED = "an existing directory or a hub id such as org/name"
_TRUE = {"1", "on", "yes", "true"}
"""What huggingface_hub takes for true in HF_HUB_OFFLINE, in any case."""


@dataclass(frozen=True, slots=True)
class Base:
    """What a ``base_model`` means. ``folder`` is None for a model of the hub.

    ``name`` is what to load it by, an absolute folder or a hub id; ``note`` is for people where a model of the hub has
    to be downloaded first.
    """

    name: str
    folder: Path | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Where an ``adapter_dir`` leads: an adapter's folder, or a merged model that stands in for the base.

    ``base`` is what the adapter says it was made for; whatever stands there.
    """

    folder: Path
    merged: bool = False
    base: object = None


def base_model(text: str, root: Path, variables: Mapping[str, str] = os.environ) -> Base:
    """What a ``base_model`` means; a folder is not looked into (``check_model``).

    Args:
        root: what a relative folder is relative to.
        variables: of the process that will load it; some say where the hub's cache is.

    Raises:
        Unusable: neither a folder nor a hub id, or a hub id that looks like a slip of the pen.
    """
    folder = _absolute(text, root)
    if folder.is_dir():
        return Base(str(folder), folder)
    if folder.exists():
        raise Unusable(f"{folder}, which is a file", "a directory with config.json and weights")
    if not is_hub_id(text):
        raise _no_directory(folder, _EXPECTED)
    cache = _hub_cache(variables)
    if (cache / f"models--{text.replace('/', '--')}").is_dir():
        return Base(text)
    nowhere = f"no directory {folder}, and no {text} in the hub's cache {cache}"
    if near := _near(folder):
        hint = f"did you mean {near}? If it is a hub model, download it first: hf download {text}"
        raise Unusable(nowhere, _EXPECTED, hint)
    if folder.parent.is_dir():
        raise _no_directory(folder, _EXPECTED)
    if variables.get("HF_HUB_OFFLINE", "").casefold() in _TRUE:
        raise Unusable(nowhere, "one of them, since HF_HUB_OFFLINE is set", f"hf download {text}, or correct the path")
    return Base(text, note=f"{nowhere}: it is taken for a hub model, and downloaded when its worker starts")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def check_model(folder: Path, *, pickle: bool) -> None:
    """See that a model's folder is complete.

    Raises:
        Unusable: config.json or weights are missing, cut off, or pickles that are not allowed.
    """
    if not (folder / MODEL_CONFIG).is_file():
        raise missing(folder, MODEL_CONFIG, "an adapter belongs in adapter_dir" if _has_adapter(folder) else "")
    read_json(folder / MODEL_CONFIG)
    model_weights(folder, pickle=pickle)


def adapter_folder(text: str, root: Path = Path()) -> Path:
    """The folder that an ``adapter_dir`` means; it is not looked into (``adapter``).

    A ``checkpoint-N`` with neither an adapter nor a model stands for its parent, where trainers leave the final files.

    Raises:
        Unusable: there is no such folder.
    """
    folder = _absolute(text, root)
    if not folder.is_dir():
        raise _no_directory(folder, "an adapter's directory")
    if re.fullmatch(r"checkpoint-\d+", folder.name) and not _has_adapter(folder) and not is_merged(folder):
        return folder.parent
    return folder


def is_merged(folder: Path) -> bool:
    """Whether an adapter's folder holds a whole model instead."""
    return not _has_adapter(folder) and (folder / MODEL_CONFIG).is_file()


def adapter(text: str, root: Path = Path(), *, pickle: bool) -> Adapter:
    """The adapter, or the merged model, that an ``adapter_dir`` means, checked as far as that goes without its base.

    Raises:
        Unusable: missing, incomplete, cut off, or a pickle that is not allowed.
    """
    folder = adapter_folder(text, root)
    if is_merged(folder):
        check_model(folder, pickle=pickle)
        return Adapter(folder, merged=True)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise missing(folder, ADAPTER_CONFIG, "an adapter has it beside its weights, a merged model config.json")
    described = read_json(folder / ADAPTER_CONFIG)
    adapter_weights(folder, pickle=pickle)
    return Adapter(folder, base=described.get("base_model_name_or_path"))


def _absolute(text: str, root: Path) -> Path:
    try:
        return (root / Path(text).expanduser()).resolve()
    except (RuntimeError, ValueError, OSError) as error:  # ~nobody, a NUL, links in a circle
        raise Unusable(repr(text), "the path of a directory", str(error)) from error


def _has_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE))


def _no_directory(folder: Path, expected: str) -> Unusable:
    beside, near = _folders(folder.parent), _near(folder)
    hint = f"{folder.parent} holds {', '.join(beside[:8])}" if beside else f"did you mean {near}?" if near else ""
    return Unusable(f"no directory {folder}", expected, hint)


def _near(folder: Path) -> Path | None:
    """A model's folder whose last two parts are nearly those of one that is not there."""
    above = folder.parent.parent
    for owner in difflib.get_close_matches(folder.parent.name, _folders(above), n=3):
        models = [name for name in _folders(above / owner) if (above / owner / name / MODEL_CONFIG).is_file()]
        for name in difflib.get_close_matches(folder.name, models, n=1):
            return above / owner / name
    return None


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []  # none, or not for us to see: a hint is lost, nothing else


def _hub_cache(variables: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it has downloaded; the variables are its own."""
    if given := variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE"):
        return _expanded(given)
    caches = Path(variables.get("XDG_CACHE_HOME") or "~/.cache")
    return _expanded(variables.get("HF_HOME") or caches / "huggingface") / "hub"


def _expanded(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - raises nothing where nobody has such a home
