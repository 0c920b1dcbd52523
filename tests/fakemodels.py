"""Folders that look like models and adapters to whoever does not load them."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_safetensors(path: Path, size: int = 16) -> None:
    """A safetensors file with one tensor of ``size`` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def write_model(folder: Path) -> Path:
    write_safetensors(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_adapter(folder: Path) -> Path:
    write_safetensors(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder
