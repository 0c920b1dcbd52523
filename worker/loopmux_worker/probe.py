"""What an interpreter offers a worker: versions, devices, and for what is missing the remedy."""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from typing import Any

from loopmux_worker.causes import in_words, ran_out

_ALWAYS = {"msgpack": "msgpack>=1.2.1,<2", "zmq": "pyzmq>=27,<28", "structlog": "structlog>=25,<27"}
_FOR_MODELS = {
    "torch": "torch==2.13.0",
    "transformers": "transformers>=4.57,<6",
    "peft": "peft>=0.18,<1",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
}
_OLDEST = {"transformers": (4, 57), "peft": (0, 18)}
"""Older ones lack what the engine calls."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package as it was found; ``error`` says why it cannot be used, ``short`` that memory ran out."""

    name: str
    version: str | None
    error: str | None
    short: bool = False


def probe(*, models: bool = True) -> dict[str, Any]:
    """A report for the launcher, fit for JSON.

    ``ok`` says whether a worker can run here; ``missing`` lists what is wrong with the command that helps;
    ``out_of_memory`` is what was said if memory ran out, which no command helps against.

    Args:
        models: whether weights are to be served; the echo engine needs no torch.
    """
    wanted = _ALWAYS | (_FOR_MODELS if models else {})
    packages = [_look_at(name) for name in wanted]
    packages.append(_look_at("loopmux"))
    short = next((package.error for package in packages if package.short), None)
    missing = [_remedy(package, wanted) for package in packages if package.error and not short]
    return {
        "ok": not missing and not short,
        "python": platform.python_version(),
        "executable": sys.executable,
        "prefix": sys.prefix,
        "platform": platform.platform(),
        "packages": {_distribution(p.name): p.version for p in packages},
        "devices": _devices() if models and not missing and not short else [],
        "missing": missing,
        "out_of_memory": short,
    }


def _distribution(module: str) -> str:
    return "pyzmq" if module == "zmq" else module


def _look_at(name: str) -> Package:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a broken package raises anything, and the report is to say so
        return Package(name, None, in_words(error), ran_out(error) is not None)
    version = str(getattr(module, "__version__", "unknown"))
    oldest = _OLDEST.get(name)
    if oldest and _numbers(version) < oldest:
        return Package(name, version, f"version {version} is too old, expected {'.'.join(map(str, oldest))} or newer")
    return Package(name, version, None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _remedy(package: Package, wanted: dict[str, str]) -> dict[str, str]:
    """Name, reason, and the command; a module missing *inside* a package is the one to install."""
    inner = re.search(r"No module named '([A-Za-z0-9_]+)", package.error or "")
    absent = inner.group(1) if inner else package.name
    requirement = wanted.get(absent) or wanted.get(package.name, absent)
    if inner and absent not in wanted and absent != package.name:
        requirement = absent
    remedy = f"{sys.executable} -m pip install '{requirement}'"
    return {"name": _distribution(absent), "reason": package.error or "", "remedy": remedy}


def _devices() -> list[str]:
    torch = importlib.import_module("torch")  # by name: only the engine depends on it
    found = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
