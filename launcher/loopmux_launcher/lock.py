"""A file lock between processes. The kernel frees it when its holder dies, so it is never stale."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path, waiting: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hold the lock; while another process has it, ``waiting`` is told that one's process id, and this one waits.

    ``waiting`` may raise, for a caller that would rather not wait. The holder may remove the file.
    """
    file = _acquire(path, waiting)
    while not _is_still(path, file):  # its last holder removed it, and others agree on a new one
        file.close()
        file = _acquire(path, waiting)
    with file:
        _sign(file)
        yield
        file.truncate(0)


def _acquire(path: Path, waiting: Callable[[str], None]) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            waiting(file.read().decode(errors="replace").strip() or "?")
            fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException:
        file.close()
        raise
    return file


def _sign(file: IO[bytes]) -> None:
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    except OSError:
        pass  # a full disk: the lock holds all the same, only its holder stays unnamed


def _is_still(path: Path, file: IO[bytes]) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file.fileno()))
