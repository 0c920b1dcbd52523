"""What lies in model and adapter folders, read without torch: which files, whole or not, their size and fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopmux.errors import ConfigError

_HEADER_LIMIT = 100 * 1024 * 1024
"""The format's own limit for a safetensors header, bytes."""
_BLOCK = 1024 * 1024
_CONTENT = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "config.json", "adapter_config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model",
)  # fmt: skip
"""Files that decide what a model answers."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: missing, unreadable, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}{_listing(path.parent)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return ": there is no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return f"; it holds {shown}" if names else "; it is empty"


def tensors(path: Path) -> dict[str, Tensor]:
    """Names, dtypes and shapes in a safetensors file, after checking that the file is whole.

    Raises:
        ConfigError: truncated, empty, or no safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise ConfigError(f"{path} has {size} bytes and is cut off in its header: copy or save it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no safetensors file ({type(error).__name__}: {error})") from error
    if size < end:
        raise ConfigError(f"{path} has {size} bytes, its header promises {end}: copy or save it again")
    if not found:
        # transformers would make every weight up, and take minutes and the whole memory for it
        raise ConfigError(f"{path} holds no tensors: copy or save it again")
    return found


def weight_files(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """The files of a model's weights, checked to be there and whole.

    Raises:
        ConfigError: there are none, some of several are missing, one is cut off, or they are pickles and not allowed.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}")
        found = [folder / name for name in names]
    else:
        found = [path for path in [folder / "model.safetensors"] if path.is_file()]
    for path in found:
        tensors(path)
    return found or _pickles(folder, ("pytorch_model*.bin",), "model.safetensors", allow_pickle=allow_pickle)


def adapter_weights(folder: Path, *, allow_pickle: bool) -> Path:
    """The file of an adapter's weights.

    Raises:
        ConfigError: missing, or a pickle and not allowed.
    """
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        return path
    return _pickles(folder, ("adapter_model.bin",), path.name, allow_pickle=allow_pickle)[0]


def _pickles(folder: Path, patterns: tuple[str, ...], wanted: str, *, allow_pickle: bool) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        raise ConfigError(f"{folder} has no {wanted}{_listing(folder)}: it was not saved whole, copy or save it again")
    if not allow_pickle:
        raise ConfigError(
            f"{folder} has {found[0].name} and no {wanted}: a pickle can run any code when it is loaded. Convert it to "
            "safetensors, or set allow_pickle_weights: true if you trust its source"
        )
    return found


def adapter_folder(directory: str) -> Path:
    """The folder that holds an adapter (or a merged model).

    A ``checkpoint-N`` folder without either stands for its parent, where trainers put the final files.

    Raises:
        ConfigError: there is no adapter and no model.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ConfigError(f"adapter_dir {directory!r}: no such folder")
    candidates = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    for candidate in candidates:
        if (candidate / "adapter_config.json").is_file() or (candidate / "config.json").is_file():
            return candidate
    raise ConfigError(
        f"adapter_dir {directory!r} has neither adapter_config.json (an adapter) nor config.json (a merged model)"
        f"{_listing(folder)}"
    )


def check_adapter(folder: Path, *, allow_pickle: bool) -> None:
    """What can be checked of an adapter, or of a merged model in its place, without the base.

    Raises:
        ConfigError: incomplete, cut off, or a pickle that is not allowed.
    """
    if is_merged_model(folder):
        weight_files(folder, allow_pickle=allow_pickle)
        return
    read_json(folder / "adapter_config.json")
    path = adapter_weights(folder, allow_pickle=allow_pickle)
    if path.suffix == ".safetensors":
        tensors(path)


def is_merged_model(folder: Path) -> bool:
    """Whether an adapter folder holds a whole model instead."""
    return not (folder / "adapter_config.json").is_file()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def fingerprint(folder: Path) -> str:
    """BLAKE2b over the names and bytes of all files that decide what the model answers; 16 hexadecimal digits."""
    files = sorted({path for pattern in _CONTENT for path in folder.glob(pattern) if path.is_file()})
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="fingerprint") as pool:  # hashing releases the GIL
        digests = list(pool.map(_digest, files))
    return combined({path.name: digest for path, digest in zip(files, digests, strict=True)})


def combined(parts: Mapping[str, str]) -> str:
    """One fingerprint for several named ones; 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(sorted(parts.items())).encode(), digest_size=8).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
