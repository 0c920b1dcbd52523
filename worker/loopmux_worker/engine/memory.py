"""What a model takes in memory, what there is, and saying so when it was not enough. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

from loopmux.errors import ConfigError
from loopmux.messages import WorkerSpec
from loopmux.weightfiles import tensors
from loopmux_worker.shortage import in_words, ran_out

MIB = 2**20
STOP_OTHERS = "stop other programs, or raise the limit"
"""What helps where nothing in the configuration does."""


_LIBRARY = ctypes.CDLL(None)
"""The C library: opened here, since opening it takes memory."""
# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_LARGEST_THRESHOLD = 32 * MIB  # that glibc takes
_PAD = 64 * MIB


def keep_freed() -> None:
    """Keep the memory that steps free for the next step; does nothing where the C library is not glibc.

    Otherwise every temporary of some size comes fresh from the system, and each of its pages costs a fault: computing
    512 prompt tokens of a 110 M model took 1.2 times as long. Call it before threads are started.
    """
    mallopt = getattr(_LIBRARY, "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)  # an arena per thread is at most 64 MiB, and keeps nothing that is larger
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _PAD)


def give_back_freed() -> None:
    """Return what is free by now, after loading, say; does nothing where the C library is not glibc."""
    trim = getattr(_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _make_room() -> None:
    """End what ``keep_freed`` began: where little is left, the pad would be asked for with the smallest piece."""
    mallopt = getattr(_LIBRARY, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TOP_PAD, 0)
        give_back_freed()


def needed(weights: list[Path], bytes_per_number: int | None) -> int:
    """Bytes that the weights take in memory; ``bytes_per_number`` None leaves every tensor in its own dtype."""
    if bytes_per_number is None or any(path.suffix != ".safetensors" for path in weights):
        return sum(path.stat().st_size for path in weights)
    return sum(tensor.elements * bytes_per_number for path in weights for tensor in tensors(path).values())


def available() -> int | None:
    """Bytes that a process may still take on this machine and within its control group; None where that is unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            found.append(max(0, int(limit) - used + _reclaimable()))
    except OSError:
        pass  # another system, or no control groups of the second kind: the other figure has to do
    return min(found, default=None)


def _reclaimable() -> int:
    """File pages of the control group, which make room when asked."""
    stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


class OutOfMemory(ConfigError):
    """Memory ran out while something was made ready, and it says what.

    Starting again at once would end the same way, and press the neighbours once more: hence a ConfigError.
    """


@contextlib.contextmanager
def explained(doing: str, expected: str, instead: str = "") -> Iterator[None]:
    """If memory runs out in this block, whatever libraries make of it becomes one clear error.

    Args:
        doing: what happens in the block ("the model was loaded").
        expected: what there should be room for.
        instead: what to change in the configuration, where anything there would help.

    Raises:
        OutOfMemory: memory ran out; of blocks inside each other the innermost one tells.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        cause = ran_out(error)
        if cause is None:
            raise
        _make_room()
        remedy = f"stop other programs, raise the limit, or {instead}" if instead else STOP_OTHERS
        raise OutOfMemory(
            f"out of memory while {doing} ({in_words(cause)}): found {_found()}, expected room for {expected}; {remedy}"
        ) from error


def loading(spec: WorkerSpec) -> contextlib.AbstractContextManager[None]:
    """``explained`` for the weights."""
    instead = "choose a smaller dtype or a smaller model"
    return explained(f"{spec.base_model} was loaded", f"{_weights(spec)} beside torch and its threads", instead)


def loading_adapter(name: str, directory: str) -> contextlib.AbstractContextManager[None]:
    """``explained`` for one adapter."""
    size = _size_of(Path(directory))
    instead = "serve fewer adapters beside each other"
    return explained(f"the adapter {name} was loaded", f"{size / MIB:.1f} MiB of it beside the model", instead)


def _found() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    free = available()
    figures = []
    if limit != resource.RLIM_INFINITY:
        figures.append(f"a limit of {limit / MIB:.0f} MiB for this process (ulimit -v)")
    if free is not None:
        figures.append(f"{free / MIB:.0f} MiB available on this machine")
    return " and ".join(figures) or "no figure for what is free"


def _weights(spec: WorkerSpec) -> str:
    size = _size_of(Path(spec.base_model or ""))
    return f"{size / MIB:.0f} MiB of weights" if spec.base_model and size else "its weights"


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
