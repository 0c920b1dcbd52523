"""Fingerprints of a model's or an adapter's files, and whether somebody writes to them meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loopmux.errors import ConfigError
from loopmux.weightfiles import ADAPTER_CONFIG, MODEL_CONFIG

_BLOCK = 1024 * 1024
_CONTENT = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", MODEL_CONFIG, ADAPTER_CONFIG, "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model",
    "generation_config.json",  # for its end tokens
    "*.py",  # code of a model's own
)  # fmt: skip
"""Files that decide what a model answers."""

State = tuple[tuple[str, int, int, int], ...]
"""See ``state``."""


def of(folder: Path) -> str:
    """BLAKE2b over the names and bytes of all files that decide what the model answers; 16 hexadecimal digits."""
    files = _deciding(folder)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="fingerprint") as pool:  # hashing releases the GIL
        digests = list(pool.map(_digest, files))
    return combined({path.name: digest for path, digest in zip(files, digests, strict=True)})


def state(folder: Path) -> State:
    """What tells whether somebody writes the files that ``of`` reads: their names, sizes, times and inodes."""
    stats = [(path.name, path.stat()) for path in _deciding(folder)]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def check_unchanged(folder: Path, before: State) -> None:
    """See that what was read of a folder since ``before`` is what its fingerprint says.

    Raises:
        ConfigError: a file has changed meanwhile.
    """
    if changed := sorted({entry[0] for entry in set(before) ^ set(state(folder))}):
        raise ConfigError(
            f"{folder}: {changed[0]} changed while it was loaded, expected files that nobody writes to: load it again "
            "when they are whole"
        )


def _deciding(folder: Path) -> list[Path]:
    return sorted({path for pattern in _CONTENT for path in folder.glob(pattern) if path.is_file()})


def combined(parts: Mapping[str, str]) -> str:
    """One fingerprint for several named ones; 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(sorted(parts.items())).encode(), digest_size=8).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
