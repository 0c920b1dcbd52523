"""Attention of single tokens on a CPU by ``attention.c``, which is compiled for the shape of a model's heads.

With 16 streams behind 512 tokens (12 heads on 4 of 64 numbers, bfloat16, 2 threads) it took 7 ms for 12 layers where
storing the keys and ``scaled_dot_product_attention`` took 19: that reads its keys slower than the memory delivers them.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopmux_worker import logs
from loopmux_worker.engine.slots.compiling import Unavailable, library

_LANES = 16
"""Numbers of a vector in the kernel."""
_TOGETHER = 8
"""Query heads that it computes at once, at most: each takes registers."""
_SUMS = 16
"""Vectors of sums that it keeps in registers."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference from torch's attention, of numbers around 1."""


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
        logs.warning("attention is computed by torch", reason=str(error))
        return str(error)


def _made(dtype: torch.dtype, size: int, folded: int) -> Kernel:
    if dtype not in _TOLERANCE:
        raise Unavailable(f"found {dtype}, expected torch.bfloat16 or torch.float32")
    if size % _LANES:
        raise Unavailable(f"found heads of {size} numbers, expected a multiple of {_LANES}")
    together = max(n for n in range(1, _TOGETHER + 1) if folded % n == 0)
    parts = size // _LANES
    width = max(n for n in range(1, parts + 1) if parts % n == 0 and n * together <= max(_SUMS, together))
    shape = {"SIZE": size, "FOLDED": folded, "TOGETHER": together, "WIDTH": width, "BF16": int(dtype == torch.bfloat16)}
    kernel = Kernel(library("attention.c", **shape).attention)
    _check(kernel, dtype, size, folded)
    return kernel


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
