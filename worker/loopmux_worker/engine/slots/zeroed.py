"""Memory of zeros that is taken as it is written to."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch


def zeros(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Zeros in the type of another tensor, and on its device.

    On a CPU they are pages that the system makes when they are first written to. torch writes its own zeros at once,
    all of them, though most of a cache is never needed, and none at the start.

    Raises:
        OSError: there is no such room.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
