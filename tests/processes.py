"""Whether a process is there, asked in a way that stands its disappearing in the middle of the question."""

from __future__ import annotations

import psutil


def running(process: psutil.Process | int) -> bool:
    """Whether it is there and no zombie."""
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        return bool(found.is_running() and found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
