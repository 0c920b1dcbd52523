"""What a model's or an adapter's files are as a whole: their fingerprint, and whether a tokenizer is among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loopmux.weightfiles import ADAPTER_CONFIG, MODEL_CONFIG

_BLOCK = 1024 * 1024
_CONTENT = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", MODEL_CONFIG, ADAPTER_CONFIG, "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model",
)  # fmt: skip
"""Files that decide what a model answers."""


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
