"""What a model or adapter directory must hold, checked without loading it.

A download or a training run that was cut leaves folders that look right; the header of a safetensors file says how long
the file must be, so a half-written one is found by reading a few kilobytes.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HEADER_LIMIT = 100 * 1024 * 1024
"""The safetensors format itself allows no larger header, bytes."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


class Unusable(ValueError):
    """A folder cannot be used: ``found`` and ``expected`` complete the sentence."""

    def __init__(self, found: str, expected: str, hint: str = "") -> None:
        super().__init__(f"found {found}, expected {expected}")
        self.found, self.expected, self.hint = found, expected, hint


@dataclass(frozen=True, slots=True)
class Adapter:
    """Where an ``adapter_dir`` leads: an adapter's folder, or a merged model that stands in for the base.

    ``base`` is what the adapter says it was made for; whatever stands there.
    """

    folder: Path
    merged: bool = False
    base: object = None


def base_model(text: str, root: Path, *, pickle: bool = False) -> str:
    """The absolute directory, or the hub id as it is.

    Raises:
        Unusable: neither, or a directory that is no complete model.
    """
    folder = _absolute(text, root)
    if folder.is_dir():
        _check_model(folder, pickle=pickle)
        return str(folder)
    # `demo/bsae` has the shape of a hub id; beside an existing folder `demo` it is a slip of the pen
    parent = folder.parent
    if folder.exists():
        raise Unusable(f"{folder}, which is a file", "a directory with config.json and weights")
    if _HUB_ID.fullmatch(text) and not parent.is_dir():
        return text
    raise _missing(folder, "an existing directory or a hub id such as org/name")


def adapter(text: str, root: Path, *, pickle: bool = False) -> Adapter:
    """The folder that holds an adapter, or a merged model.

    A ``checkpoint-N`` without adapter files stands for its parent, where trainers leave the final adapter.

    Raises:
        Unusable: missing, incomplete or half-written.
    """
    folder = _absolute(text, root)
    if not folder.is_dir():
        raise _missing(folder, "an adapter's directory")
    if re.fullmatch(r"checkpoint-\d+", folder.name) and not _has_adapter_files(folder):
        folder = folder.parent
    if not _has_adapter_files(folder) and (folder / "config.json").is_file():
        _check_model(folder, pickle=pickle)
        return Adapter(folder, merged=True)
    described = _check_adapter(folder, pickle=pickle)
    return Adapter(folder, base=described.get("base_model_name_or_path"))


def _absolute(text: str, root: Path) -> Path:
    try:
        return (root / Path(text).expanduser()).resolve()
    except (RuntimeError, ValueError, OSError) as error:  # ~nobody, a NUL, links in a circle
        raise Unusable(repr(text), "the path of a directory", str(error)) from error


def _has_adapter_files(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE))


def _missing(folder: Path, expected: str) -> Unusable:
    beside = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
    there = f"{folder.parent} holds {', '.join(beside[:8])}" if beside else ""
    return Unusable(f"no directory {folder}", expected, there)


def _check_adapter(folder: Path, *, pickle: bool) -> dict[str, Any]:
    """Returns what its adapter_config.json says."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise Unusable(f"no {ADAPTER_CONFIG} in {folder}", "a complete adapter, or a merged model with config.json")
    described = _check_json(folder / ADAPTER_CONFIG)
    if (folder / ADAPTER_WEIGHTS).is_file():
        _check_safetensors(folder / ADAPTER_WEIGHTS)
    elif not (folder / ADAPTER_PICKLE).is_file():
        raise Unusable(f"no {ADAPTER_WEIGHTS} in {folder}", "a complete adapter", "was its training cut short?")
    elif not pickle:
        raise _pickle_only(folder / ADAPTER_PICKLE)
    return described


def _check_model(folder: Path, *, pickle: bool) -> None:
    if not (folder / "config.json").is_file():
        hint = "an adapter belongs in adapter_dir" if _has_adapter_files(folder) else ""
        raise Unusable(f"no config.json in {folder}", "a model's directory", hint)
    _check_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    shards = _shards(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    for shard in shards:
        _check_safetensors(shard)
    if shards:
        return
    pickles = sorted(folder.glob("*.bin"))
    if not pickles:
        raise Unusable(f"no weights in {folder}", "model.safetensors")
    if not pickle:
        raise _pickle_only(pickles[0])


def _pickle_only(file: Path) -> Unusable:
    return Unusable(
        f"only pickle weights ({file})",
        "safetensors",
        "or set allow_pickle_weights: true if you trust where they are from",
    )


def _shards(index: Path) -> list[Path]:
    names = _check_json(index).get("weight_map", {})
    if not isinstance(names, dict) or not names:
        raise Unusable(f"no weight_map in {index}", "the list of the model's weight files")
    return [index.parent / name for name in sorted(set(map(str, names.values())))]


def _check_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise Unusable(f"{file}, which cannot be read ({error})", "a complete JSON file") from error
    if not isinstance(value, dict):
        raise Unusable(f"{file}, which holds no JSON object", "a JSON object")
    return value


def _check_safetensors(file: Path) -> None:
    """Compare the file's size with what its header promises (8 bytes length, JSON header, then the tensors)."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise Unusable(f"{file}, which is no safetensors file", "complete safetensors weights")
            header = json.loads(stream.read(length))
        end = 8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"{file}, which is damaged or cut short ({error})", "complete safetensors weights") from error
    if size != end:
        hint = "was its writing or download cut short?"
        raise Unusable(f"{file} of {size} bytes", f"{end} bytes as its header says", hint)
