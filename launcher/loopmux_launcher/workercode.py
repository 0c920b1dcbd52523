"""How the workers' own code reaches an environment: a folder with copies of ``loopmux`` and ``loopmux_worker`` alone.

The folder goes on the worker's PYTHONPATH, and nothing else of the launcher's site-packages is visible there. Its name
is the hash of its content, so a running worker keeps the code it began with when the installation is updated.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

from loopmux.folders import unusable
from loopmux_launcher.lock import locked

PACKAGES = ("loopmux", "loopmux_worker")
REQUIREMENTS = ("pyzmq>=27,<28", "msgpack>=1.2.1,<2", "structlog>=25,<27")
"""What these packages import besides torch, transformers and peft; the ranges are those of pyproject.toml."""
_SUFFIXES = (".py", ".c", ".typed", ".json", ".jinja")


def install(folder: Path) -> Path:
    """The folder to put on PYTHONPATH, made below ``folder`` unless it is there and whole.

    Raises:
        ConfigError: it cannot be made.
    """
    files = _collect()
    digest = _digest(files)
    target = folder / digest
    try:
        with locked(folder / ".lock"):
            if not target.is_dir() or _digest(_read(target)) != digest:
                _write(files, target)
    except OSError as error:
        raise unusable(folder, "the workers' code", "set $XDG_DATA_HOME to another", error) from error
    return target


def _write(files: dict[str, bytes], target: Path) -> None:
    beside = target.with_name(".new")
    shutil.rmtree(beside, ignore_errors=True)  # who had the lock before may have been killed
    try:
        for name, content in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_bytes(content)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _collect() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"found no package {package} beside loopmux_launcher: install Loopmux with its extra [server]"
            )
        origin = Path(spec.submodule_search_locations[0])
        files |= {os.path.join(package, name): content for name, content in _read(origin).items()}  # noqa: PTH118
    return files


def _read(folder: Path) -> dict[str, bytes]:
    found = sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
