"""A worker that hangs for a while upon SIGUSR2, with its interpreter locked: no thread gets on but ØMQ's own.

``python -m chaos.hanging`` takes what ``python -m loopmux_worker`` takes.
"""

from __future__ import annotations

import ctypes
import signal
import sys

from loopmux_worker.__main__ import main

HANGS = 6.0
"""Seconds: twice the silence after which a worker counts as lost."""


def serve(hangs: float = HANGS) -> int:
    """Be such a worker, that hangs for so many seconds; returns its exit code."""

    def hang(*_: object) -> None:
        ctypes.PyDLL(None).poll(None, 0, round(1000 * hangs))  # of a PyDLL: the lock of the interpreter is kept

    signal.signal(signal.SIGUSR2, hang)
    return main()


if __name__ == "__main__":
    sys.exit(serve())
