"""What a model takes in memory, what there is, and saying so when it was not enough. Imports no torch."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

from loopmux.errors import ConfigError
from loopmux.messages import WorkerSpec
from loopmux.modelfolders import adapter_folder
from loopmux.weightfiles import tensors
from loopmux_worker.causes import in_words, ran_out
from loopmux_worker.engine import freed

MIB = 2**20
STOP_OTHERS = "stop other programs, or raise the limit"
"""What helps where nothing in the configuration does."""


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
        freed.make_room()
        remedy = f"stop other programs, raise the limit, or {instead}" if instead else STOP_OTHERS
        raise OutOfMemory(
            f"out of memory while {doing} ({in_words(cause)}): found {_found()}, expected room for {expected}; {remedy}"
        ) from error


def loading(spec: WorkerSpec) -> contextlib.AbstractContextManager[None]:
    """``explained`` for the weights."""
    instead = "choose a smaller dtype or a smaller model"
    return explained(f"{spec.base_model} was loaded", f"{_weights(spec)} beside torch and its threads", instead)


def loading_adapter(name: str, directory: str) -> contextlib.AbstractContextManager[None]:
    """``explained`` for one adapter.

    Raises:
        Unusable: there is no such folder.
    """
    size = _size_of(adapter_folder(directory))
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
