"""Lines for people and for logs, written without waiting for whoever reads them: he may be slow, stopped or gone."""

from __future__ import annotations

import os
import select
import weakref
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
        tell_lost: makes the line that says how many were lost before it.
    """

    def __init__(self, stream: TextIO | None, tell_lost: Callable[[int], str]) -> None:
        self._stream, self._tell_lost = stream, tell_lost
        self._waiting: deque[tuple[bytes, int]] = deque()  # each with how many lines more than its own are lost with it
        self._bytes = self._lost = 0
        self._terminal = None if stream is None else _own_way(stream)
        if self._terminal is not None:
            weakref.finalize(self, os.close, self._terminal)

    def write(self, text: str) -> None:
        """Lines to be read, behind those that wait."""
        self.flush()
        if self._bytes >= _KEPT or self._stream is None:
            self._lost += text.count("\n")
            return
        if self._lost:
            self._keep(self._tell_lost(self._lost), self._lost - 1)
            self._lost = 0
        self._keep(text)
        self.flush()

    def flush(self) -> None:
        """Pass on what waits, as far as it is taken."""
        try:
            while self._waiting and (written := self._put(self._waiting[0][0])):
                self._bytes -= written
                data, told = self._waiting.popleft()
                if rest := data[written:]:
                    self._waiting.appendleft((rest, told))
        except (OSError, ValueError):  # its reader is gone, or the disk is full: to wait for them would be in vain
            self._lost += sum(data.count(b"\n") + told for data, told in self._waiting)
            self._waiting.clear()
            self._bytes = 0

    def _keep(self, text: str, told: int = 0) -> None:
        assert self._stream is not None
        data = text.encode(self._stream.encoding or "utf-8", "backslashreplace")
        self._waiting += [(data[at : at + _PIECE], told) for at in range(0, len(data), _PIECE)]
        self._bytes += len(data)

    def _put(self, data: bytes) -> int:
        """Write past what Python would keep of it, if anything is taken now; returns how much was.

        Raises:
            OSError, ValueError: nothing ever will be as things are.
        """
        assert self._stream is not None
        if self._terminal is not None:
            try:
                return os.write(self._terminal, data)
            except BlockingIOError:
                return 0
        try:
            descriptor = self._stream.fileno()
        except OSError:  # it has none: it is in this process's own memory
            self._stream.write(data.decode(self._stream.encoding or "utf-8"))
            return len(data)
        room = select.poll()
        room.register(descriptor, select.POLLOUT)
        return os.write(descriptor, data) if room.poll(0) else 0


def _own_way(stream: TextIO) -> int | None:
    """Another descriptor of a terminal, which does not wait; None for what is no terminal, or has no name here.

    A terminal that has room may have less than a piece takes. And the stream's own descriptor is others' as well: they
    would not wait, either.
    """
    try:
        if stream.isatty():
            return os.open(os.ttyname(stream.fileno()), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except (OSError, ValueError):
        pass
    return None
