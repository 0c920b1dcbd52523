"""Finding the interpreter that an environment asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loopmux.errors import LoopmuxError

OLDEST = (3, 11)
"""The workers' code uses the language of this version."""
_LIMIT = 20.0
"""Seconds for an interpreter to print its version; a cold disk can take several."""
_QUESTION = (
    "import json, platform, sys, sysconfig; print(json.dumps([platform.python_version(), sys.implementation.name,"
    " getattr(sys, '_base_executable', None) or sys.executable, sysconfig.get_platform()]))"
)
# What would let the application's modules or settings into another interpreter. The installers' own settings stay.
# uv compiles nothing: with the last one every start of a worker would, for ten seconds.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONSAFEPATH", "PYTHONPLATLIBDIR",
            "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_PYTHON", "UV_PYTHON",
            "UV_SYSTEM_PYTHON", "UV_PROJECT_ENVIRONMENT",
            "PYTHONDONTWRITEBYTECODE")  # fmt: skip


class EnvironmentUnusable(LoopmuxError):
    """An environment cannot be built or used; the message says why and what to do."""

    code = "environment"


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that was asked what it is; ``executable`` is never that of a virtual environment."""

    executable: Path
    version: str
    implementation: str
    platform: str


def clean_variables() -> dict[str, str]:
    """This process's variables without those that would lead another interpreter to our modules."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}


def find(wanted: str) -> Interpreter:
    """The interpreter for a version (``3.11``, looked for on PATH) or a path.

    Raises:
        EnvironmentUnusable: none, or one that is too old.
    """
    if os.sep in wanted:
        found = _ask(Path(wanted))
        if found is None:
            raise EnvironmentUnusable(f"found {wanted}, which does not run as Python, expected an interpreter")
        return _check_age(found)
    seen: dict[str, Path] = {}
    for candidate in _candidates(wanted):
        found = _ask(candidate)
        if found is not None and _fits(found.version, wanted):
            return _check_age(found)
        seen.setdefault(found.version if found else f"one that does not run ({candidate})", candidate)
    raise EnvironmentUnusable(
        f"Python {wanted}: found only {', '.join(seen)} on PATH, expected {wanted}: install it, or set `python:` to "
        "another version or to the path of an interpreter"
    )


def has_pip(python: Path, oldest: tuple[int, int]) -> bool:
    """Whether an interpreter has pip of its own, of some version at least."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", "import pip; print(pip.__version__)"], capture_output=True, timeout=_LIMIT,
            env=clean_variables(), check=True, text=True,
        )  # fmt: skip
        major, minor = done.stdout.split(".")[:2]
        return (int(major), int(minor)) >= oldest
    except (OSError, subprocess.SubprocessError, ValueError):
        return False


def _candidates(wanted: str) -> Iterator[Path]:
    """Executables that may be it, in PATH's order, the exact names first; then the one this program was made with."""
    minor = ".".join(wanted.split(".")[:2])
    folders = [Path(f) for f in os.environ.get("PATH", os.defpath).split(os.pathsep) if f]
    seen: set[Path] = set()
    for name in (f"python{minor}", "python3", "python"):
        for folder in folders:
            path = folder / name
            if path not in seen and path.is_file() and os.access(path, os.X_OK):
                seen.add(path)
                yield path
    yield Path(getattr(sys, "_base_executable", sys.executable))


def _ask(python: Path) -> Interpreter | None:
    try:
        done = subprocess.run(
            [python, "-I", "-c", _QUESTION], capture_output=True, timeout=_LIMIT, env=clean_variables(), check=True
        )
        version, implementation, base, platform = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Interpreter(Path(base).resolve(), version, implementation, platform)


def _fits(version: str, wanted: str) -> bool:
    parts = wanted.split(".")
    return version.split(".")[: len(parts)] == parts


def _check_age(found: Interpreter) -> Interpreter:
    if tuple(int(part) for part in found.version.split(".")[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise EnvironmentUnusable(f"{found.executable} is Python {found.version}, expected {needed} or newer")
    return found
