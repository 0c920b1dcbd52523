"""What the files of a model or an adapter must hold, read without torch.

A download or a training run that was cut leaves folders that look right; the header of a safetensors file says how long
the file must be, so a half-written one is found by reading a few kilobytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopmux.errors import ConfigError

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
ADAPTER_WEIGHTS, MODEL_WEIGHTS = "adapter_model.safetensors", "model.safetensors"
ADAPTER_PICKLE, _MODEL_PICKLES = "adapter_model.bin", "pytorch_model*.bin"
_HEADER_LIMIT = 100 * 1024 * 1024
"""The format itself allows no larger header, bytes."""
_AGAIN = "was its writing or download cut short? copy or save it again"


class Unusable(ConfigError):
    """A folder or file cannot be used: ``found`` and ``expected`` make the sentence, ``hint`` may say what to do."""

    def __init__(self, found: str, expected: str, hint: str = "") -> None:
        super().__init__(f"found {found}, expected {expected}" + (f": {hint}" if hint else ""))
        self.found, self.expected, self.hint = found, expected, hint


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        Unusable: missing, unreadable, no JSON, or no object.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise missing(file.parent, file.name) from None
    except (OSError, ValueError) as error:
        raise Unusable(f"{file}, which cannot be read ({error})", "a complete JSON file", _AGAIN) from error
    if not isinstance(value, dict):
        raise Unusable(f"{file}, which holds {type(value).__name__}", "a JSON object")
    return value


def missing(folder: Path, name: str, hint: str = "") -> Unusable:
    """The error for a folder that lacks a file, with what is there instead."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    shown = f"it holds {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" if names else "it is empty"
    return Unusable(f"no {name} in {folder} ({shown})", f"{name} there", hint or _AGAIN)


def tensors(file: Path) -> dict[str, Tensor]:
    """Names, dtypes and shapes in a safetensors file, after checking that the file is whole.

    Raises:
        Unusable: cut off, empty, or no safetensors file.
    """
    expected = "complete safetensors weights"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise Unusable(f"{file} of {size} bytes, which is cut off in its header", expected, _AGAIN)
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Unusable(f"{file}, which is no safetensors file ({error})", expected, _AGAIN) from error
    if size != end:
        raise Unusable(f"{file} of {size} bytes", f"{end} bytes, as its header says", _AGAIN)
    if not found:
        # transformers would make every weight up, and take minutes and the whole memory for it
        raise Unusable(f"{file}, which holds no tensors", expected, _AGAIN)
    return found


def model_weights(folder: Path, *, pickle: bool) -> list[Path]:
    """The files of a model's weights, checked to be there and whole.

    Raises:
        Unusable: there are none, some of several are missing, one is cut off, or they are pickles and not allowed.
    """
    index = folder / f"{MODEL_WEIGHTS}.index.json"
    if index.is_file():
        found = _shards(index)
    elif (folder / MODEL_WEIGHTS).is_file():
        found = [folder / MODEL_WEIGHTS]
    else:
        return _pickles(folder, _MODEL_PICKLES, MODEL_WEIGHTS, allowed=pickle)
    for file in found:
        tensors(file)
    return found


def adapter_weights(folder: Path, *, pickle: bool) -> Path:
    """The file of an adapter's weights, checked to be there and whole.

    Raises:
        Unusable: missing, cut off, or a pickle and not allowed.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return _pickles(folder, ADAPTER_PICKLE, ADAPTER_WEIGHTS, allowed=pickle)[0]
    tensors(file)
    return file


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise Unusable(f"no weight_map in {index}", "the list of the model's weight files", _AGAIN)
    files = [index.parent / name for name in sorted(set(map(str, names.values())))]
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        shown = ", ".join(gone[:3])
        raise Unusable(f"{len(gone)} of {len(files)} weight files missing in {index.parent}", f"{shown} there", _AGAIN)
    return files


def _pickles(folder: Path, pattern: str, wanted: str, *, allowed: bool) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise missing(folder, wanted)
    if not allowed:
        raise Unusable(
            f"only pickle weights ({found[0]}), which can run any code when they are loaded",
            wanted,
            "convert them, or set allow_pickle_weights: true if you trust where they are from",
        )
    return found
