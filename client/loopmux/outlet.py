"""Lines for people and for logs, written without waiting for whoever reads them: he may be slow, stopped or gone."""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TextIO

_PIECE = select.PIPE_BUF
"""Bytes that are written at once: a pipe that takes anything takes so many."""
_KEPT = 1024 * 1024
"""Bytes that wait for the reader. What comes then is lost, and its lines are counted."""
_PAUSE = 0.01
"""Seconds between two looks whether a reader who is waited for has made room."""


class Outlet:
    """The way to a text stream for programs that serve others meanwhile. A stream that was closed (None) takes nothing.

    Several threads may use one.

    Args:
        tell_lost: makes the line that says how many were lost before it.
    """

    def __init__(self, stream: TextIO | None, tell_lost: Callable[[int], str]) -> None:
        self._stream, self._tell_lost = stream, tell_lost
        self._waiting: deque[tuple[bytes, int]] = deque()  # each with how many lines more than its own are lost with it
        self._bytes = self._lost = 0
        self._gone = False  # nobody read when something was written last
        self._turn = threading.RLock()
        self._terminal = None if stream is None else _own_way(stream)
        if self._terminal is not None:
            weakref.finalize(self, os.close, self._terminal)

    @property
    def behind(self) -> bool:
        """Whether something waits for the reader."""
        return bool(self._waiting)

    def write(self, text: str) -> None:
        """Lines to be read, behind those that wait."""
        with self._turn:
            self._gone = False  # there may be another reader by now
            self.flush()
            if self._bytes >= _KEPT or self._stream is None:
                self._lost += text.count("\n")
                return
            self._tell()
            self._keep(text)
            self._pass_on()

    def flush(self) -> None:
        """Pass on what waits, as far as it is taken."""
        with self._turn:
            self._pass_on()
            if not (self._waiting or self._gone or self._stream is None):
                self._tell()
                self._pass_on()

    def drain(self, limit: float) -> None:
        """Wait for the reader after all: nothing comes behind this. At most ``limit`` seconds."""
        end = time.monotonic() + limit
        self.flush()
        while self._waiting and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _PAUSE))
            self.flush()

    def forget(self) -> None:
        """What waits is somebody else's to pass on: that of the process which this one was forked from."""
        self._waiting.clear()
        self._bytes = self._lost = 0

    def _tell(self) -> None:
        if self._lost:
            self._keep(self._tell_lost(self._lost), self._lost - 1)
            self._lost = 0

    def _pass_on(self) -> None:
        try:
            while self._waiting and (written := self._put(self._waiting[0][0])):
                self._bytes -= written
                data, told = self._waiting.popleft()
                if rest := data[written:]:
                    self._waiting.appendleft((rest, told))
        except (OSError, ValueError):  # its reader is gone, or the disk is full: to wait for them would be in vain
            self._lost += sum(data.count(b"\n") + told for data, told in self._waiting)
            self._waiting.clear()
            self._bytes, self._gone = 0, True

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
        try:
            return os.write(descriptor, data) if room.poll(0) else 0
        except BlockingIOError:  # somebody else has it not wait, and took the room
            return 0


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
