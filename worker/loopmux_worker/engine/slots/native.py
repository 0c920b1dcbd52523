"""Attention of single tokens by ``attention.c``, which the system's C compiler makes for a shape when it is first needed.

With 16 streams behind 512 tokens (12 heads on 4 of 64 numbers, bfloat16, 2 threads) it took 7 ms for 12 layers where
storing the keys and ``scaled_dot_product_attention`` took 19: that reads its keys slower than the memory delivers them.

Its threads are torch's own: the library is linked against no OpenMP, so that it finds the one that torch has loaded. A
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
from typing import Any, NamedTuple

import structlog
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopmux_worker import caches

_log = structlog.get_logger(__name__)

_SOURCE = Path(__file__).with_name("attention.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-nostdlib")
_LANES = 16
"""Numbers of a vector in the kernel."""
_TOGETHER = 8
"""Query heads that it computes at once, at most: each takes registers."""
_SUMS = 16
"""Vectors of sums that it keeps in registers."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference from torch's attention, of numbers around 1."""
_PATIENCE = 60.0
"""Seconds for the compiler, which takes less than one."""


class Unavailable(Exception):
    """There is no kernel; the message says why."""


class Step(NamedTuple):
    """What a step is made of, for all its layers.

    Attributes:
        rows: (tokens,), int64: the row of each token.
        positions: (tokens,), int64: its position there.
        places: (any,), int64: the tokens that the kernel computes.
        threads: to compute with.
    """

    rows: Tensor
    positions: Tensor
    places: Tensor
    threads: int


class Kernel:
    """The kernel for one shape.

    Args:
        function: the compiled one.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        function.restype = None
        function.argtypes = [
            ctypes.c_int, pointer, pointer, number, pointer, number, number, number, number, ctypes.c_float,
            *([pointer, number, number] * 3), pointer, pointer, pointer,
        ]  # fmt: skip

    def __call__(
        self,
        step: Step,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        window: int | None,
        scaling: float | None,
    ) -> Tensor:
        """Store the keys and values of all tokens, and compute those at ``places``.

        Args:
            query: (1, heads, tokens, size); key and value: (1, kv heads, tokens, size).
            keys: (rows, kv heads, context, size), contiguous, as are the values.

        Returns:
            (tokens, heads, size); what is not at ``places`` is left as memory was.
        """
        _, heads, tokens, size = query.shape
        new = [each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value)]
        out = query.new_empty(tokens, heads, size)
        self._function(
            step.threads, step.rows.data_ptr(), step.positions.data_ptr(), tokens,
            step.places.data_ptr(), len(step.places), keys.shape[1], keys.shape[2], window or 0,
            size**-0.5 if scaling is None else scaling,
            *(number for each in new for number in (each.data_ptr(), each.stride(1), each.stride(2))),
            keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


@functools.cache
def find(dtype: torch.dtype, size: int, folded: int) -> Kernel | str:
    """The kernel for heads of ``size`` numbers, ``folded`` query heads on each key head; or why there is none."""
    try:
        return _made(dtype, size, folded)
    except Unavailable as error:
        _log.warning("attention is computed by torch, which is slower", reason=str(error))
        return str(error)


def _made(dtype: torch.dtype, size: int, folded: int) -> Kernel:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"it was made for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    if dtype not in _TOLERANCE:
        raise Unavailable(f"the type of the numbers is {dtype}, expected bfloat16 or float32")
    if size % _LANES:
        raise Unavailable(f"heads have {size} numbers, expected a multiple of {_LANES}")
    _check_threads()
    library = _compiled(_shape(dtype, size, folded))
    try:
        kernel = Kernel(ctypes.CDLL(str(library)).attention)
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{library} cannot be loaded: {error}; remove it, then it is made again") from error
    _check(kernel, dtype, size, folded)
    return kernel


def _shape(dtype: torch.dtype, size: int, folded: int) -> list[str]:
    together = max(n for n in range(1, _TOGETHER + 1) if folded % n == 0)
    parts = size // _LANES
    width = max(n for n in range(1, parts + 1) if parts % n == 0 and n * together <= max(_SUMS, together))
    given = {"SIZE": size, "FOLDED": folded, "TOGETHER": together, "WIDTH": width, "BF16": int(dtype == torch.bfloat16)}
    return [f"-D{name}={number}" for name, number in given.items()]


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


def _compiled(shape: list[str]) -> Path:
    """The library, made unless it is there. Of two workers that make it at once the later one's stays."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        version = _output([*compiler, "--version"])
        kept = [_SOURCE.read_text(), *compiler, *_FLAGS, *shape, version, _processor()]
        folder = caches.folder("kernels")
        library = folder / f"attention-{hashlib.sha256(chr(0).join(kept).encode()).hexdigest()[:32]}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / library.name
                _output([*compiler, *_FLAGS, *shape, "-o", str(made), str(_SOURCE)])
                made.replace(library)
    except (OSError, RuntimeError) as error:  # no compiler, no home, a folder that cannot be written to
        raise Unavailable(f"it cannot be compiled: {error}") from error
    return library


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE).stdout
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[-200:])
        raise Unavailable(f"{command[0]} ends with {error.returncode}: {said}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} takes more than {_PATIENCE:.0f} s") from error


def _processor() -> str:
    """What this processor can do: a home may be shared between unlike machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


@torch.inference_mode()
def _check(kernel: Kernel, dtype: torch.dtype, size: int, folded: int) -> None:
    """Compare with torch, on two key heads behind two blocks of keys."""
    past, generator = 100, torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, size, generator=generator).to(dtype)

    keys, values, query, key, value = (
        numbers(2, 2, past + 1), numbers(2, 2, past + 1), numbers(1, 2 * folded, 1), numbers(1, 2, 1), numbers(1, 2, 1)
    )  # fmt: skip
    step = Step(torch.tensor([1]), torch.tensor([past]), torch.tensor([0]), torch.get_num_threads())
    got = kernel(step, query, key, value, keys, values, None, None)
    right = scaled_dot_product_attention(query, keys[1:], values[1:], enable_gqa=True)[0].transpose(0, 1)
    worst = float((got.float() - right.float()).abs().max())
    if not (torch.equal(keys[1:, :, past:], key) and torch.equal(values[1:, :, past:], value)):
        raise Unavailable("it stores keys and values elsewhere")
    if not worst <= _TOLERANCE[dtype]:
        raise Unavailable(f"it differs from torch's attention by {worst:.3g}")
