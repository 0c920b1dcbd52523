"""Signals and the end of a parent, as descriptors for a poller."""

from __future__ import annotations

import os
import signal
import socket
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Turns signals into bytes on a socket. Main thread only; a context manager that puts everything back.

    Args:
        parent: a process whose end counts as a request to stop. It is watched through a descriptor and not through
            PR_SET_PDEATHSIG, which fires when the *thread* that started us ends.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._parent = parent
        self._before: dict[signal.Signals, object] = {}
        self._process: int | None = None
        self._orphaned = False
        if parent is not None:
            try:
                self._process = os.pidfd_open(parent)
            except ProcessLookupError:
                self._orphaned = True
            except (OSError, AttributeError):
                pass  # not on this system: `take` asks

    def __enter__(self) -> Signals:
        for number in (*_STOPS, signal.SIGCHLD):
            self._before[number] = signal.signal(number, _noted)
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *failure: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave it takes back
        self._ear.close()
        self._mouth.close()
        if self._process is not None:
            os.close(self._process)

    def descriptors(self) -> list[int]:
        """What to poll for reading."""
        return [self._ear.fileno(), *([self._process] if self._process is not None else [])]

    def take(self, readable: set[int]) -> int:
        """How many requests to stop have come since the last time."""
        try:
            stops = sum(number in _STOPS for number in self._ear.recv(4096))
        except BlockingIOError:
            stops = 0
        if self._parent is not None and self._parent_ended(readable):
            self._parent = None
            stops += 1
        return stops

    def _parent_ended(self, readable: set[int]) -> bool:
        if self._process is None:
            return self._orphaned or os.getppid() != self._parent
        if self._process not in readable:
            return False
        os.close(self._process)
        self._process = None
        return True


def _noted(number: int, frame: FrameType | None) -> None:
    """The byte on the socket is the message."""
