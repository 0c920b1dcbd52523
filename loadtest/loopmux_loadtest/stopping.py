"""When a run begins no more requests: after so many, or so much time."""

from __future__ import annotations

import time
from collections.abc import Callable

Again = Callable[[], bool]
"""Asked before each request: whether there is to be another one."""


def times(count: int) -> Again:
    """So many requests in all."""
    left = iter(range(count))
    return lambda: next(left, None) is not None


def lasting(seconds: float) -> Again:
    """Requests for that long."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end
