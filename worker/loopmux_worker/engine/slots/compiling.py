"""Libraries of our own in C, made by the system's compiler when they are first needed and kept (``caches``).

Their threads are torch's: a library is linked against no OpenMP, so that it finds the one that torch has loaded. A
second pool of threads, each waiting in a loop for work as they do, would take the cores from the first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from loopmux_worker import caches

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-nostdlib")
_PATIENCE = 60.0
"""Seconds for the compiler, which takes less than one."""


class Unavailable(Exception):
    """There is no such library; the message says why."""


@functools.cache
def library(source: str, **shape: int) -> ctypes.CDLL:
    """The library of a C file beside this one, made for a shape: numbers by the names that it has for them.

    Raises:
        Unavailable: it cannot be made or loaded here.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"found {sys.platform} on {platform.machine()}, expected Linux on x86_64")
    _check_threads()
    made = _compiled(Path(__file__).with_name(source), [f"-D{name}={number}" for name, number in shape.items()])
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        raise Unavailable(f"{made} cannot be loaded: {error}; remove it if it is damaged") from error


def _check_threads() -> None:
    """See that OpenMP's names, as the library will find them, are those that torch uses."""
    torchs = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = [_address(ctypes.CDLL(path).GOMP_parallel) for path in (None, str(torchs))]
    except (OSError, AttributeError) as error:
        raise Unavailable(f"torch's threads are not those of GNU OpenMP ({error})") from error
    if found[0] != found[1]:
        raise Unavailable("another OpenMP than torch's was loaded before it")


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _compiled(source: Path, shape: list[str]) -> Path:
    """The library's file, made unless it is there. Of two workers that make it at once the later one's stays."""
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
        version = _output([*compiler, "--version"])
        kept = [source.read_text(), *compiler, *_FLAGS, *shape, version, _processor()]
        folder = caches.folder("kernels")
        library = folder / f"{source.stem}-{hashlib.sha256(chr(0).join(kept).encode()).hexdigest()[:32]}.so"
        if not (library.exists() and caches.trusted(library)):
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / library.name
                _output([*compiler, *_FLAGS, *shape, "-o", str(made), str(source)])
                made.replace(library)
    except (OSError, RuntimeError, ValueError) as error:  # no compiler, folder or home; a quote in $CC without an end
        raise Unavailable(f"it cannot be compiled: {error}") from error
    return library


def _output(command: list[str]) -> str:
    try:
        told = subprocess.run(command, capture_output=True, errors="replace", check=True, timeout=_PATIENCE)
        return told.stdout
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[-200:])
        raise Unavailable(f"{command[0]} ends with {error.returncode}: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} takes more than {_PATIENCE:.0f} s") from error


def _processor() -> str:
    """What this processor can do: a home may be shared between unlike machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
