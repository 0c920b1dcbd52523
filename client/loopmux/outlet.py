"""Lines for people and for logs, written without waiting for whoever reads them: he may be slow, stopped or gone."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable
from typing import TextIO

_PIECE = select.PIPE_BUF
"""Bytes that are written at once: a pipe that takes anything takes so many."""
_KEPT = 1024 * 1024
"""Bytes that wait for the reader. What comes then is lost, and its lines are counted."""


class Outlet:
    """The way to a text stream for programs that serve others meanwhile. A stream that was closed (None) takes nothing.

    Args:
        lost: makes the line that says how many were lost before it.
    """

    def __init__(self, stream: TextIO | None, lost: Callable[[int], str]) -> None:
        self._stream, self._told = stream, lost
        self._waiting: deque[bytes] = deque()
        self._bytes = self._lost = 0

    def write(self, text: str) -> None:
        """Lines to be read, behind those that wait."""
        self.flush()
        if self._bytes >= _KEPT or self._stream is None:
            self._lost += text.count("\n")
            return
        if self._lost:
            text, self._lost = self._told(self._lost) + text, 0
        data = text.encode(self._stream.encoding or "utf-8", "backslashreplace")
        self._waiting += [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
        self._bytes += len(data)
        self.flush()

    def flush(self) -> None:
        """Pass on what waits, as far as it is taken."""
        try:
            while self._waiting and self._stream is not None and (written := _put(self._stream, self._waiting[0])):
                self._bytes -= written
                self._waiting[0] = self._waiting[0][written:]
                if not self._waiting[0]:
                    self._waiting.popleft()
        except (OSError, ValueError):  # its reader is gone, or the disk is full: to wait for them would be in vain
            self._lost += sum(piece.count(b"\n") for piece in self._waiting)
            self._waiting.clear()
            self._bytes = 0


def _put(stream: TextIO, data: bytes) -> int:
    """Write to a stream's descriptor, past what Python would keep of it, if it takes anything now; how much it took.

    Raises:
        OSError, ValueError: it never will as things are.
    """
    try:
        descriptor = stream.fileno()
    except OSError:  # it has none: it is in this process's own memory
        stream.write(data.decode(stream.encoding or "utf-8"))
        return len(data)
    room = select.poll()
    room.register(descriptor, select.POLLOUT)
    return os.write(descriptor, data) if room.poll(0) else 0
