"""What becomes of memory that steps free: glibc's allocator keeps it, or gives it back. Imports no torch."""

from __future__ import annotations

import ctypes

_LIBRARY = ctypes.CDLL(None)
"""The C library: opened here, since opening it takes memory."""
# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_LARGEST_THRESHOLD = 32 * 2**20  # that glibc takes
_PAD = 64 * 2**20
"""Bytes that the heap grows by beyond what is asked for: twice the largest piece that it serves, so that a step's
temporaries do not make it grow one by one."""


def keep() -> None:
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


def give_back() -> None:
    """Return what is free by now, after loading, say; does nothing where the C library is not glibc."""
    trim = getattr(_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def make_room() -> None:
    """End what ``keep`` began: where little is left, the pad would be asked for with the smallest piece."""
    mallopt = getattr(_LIBRARY, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TOP_PAD, 0)
        give_back()
