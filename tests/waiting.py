"""Waiting in tests for what nobody announces; how long is for each kit to say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, limit: float) -> T:
    """Poll until the condition holds and return its value."""
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {limit:.0f} s: {what}"
        time.sleep(0.005)
    return value
