"""Signals and the end of a parent, as descriptors for a poller."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for since the last look.

    Attributes:
        stops: so many times to stop.
        patiently: the first of them by somebody at the keyboard (Ctrl-C), who sees what is waited for.
        reload: to read the configuration again.
    """

    stops: int = 0
    patiently: bool = False
    reload: bool = False


class Signals:
    """Turns signals into bytes on a socket. Main thread only; a context manager that puts everything back.

    SIGHUP asks to read the configuration again; where a terminal that was there is gone, it is the news of that, and a
    request to stop.

    Args:
        parent: a process whose end counts as a request to stop. It is watched through a descriptor and not through
            PR_SET_PDEATHSIG, which fires when the *thread* that started us ends.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._parent = parent
        self._terminal = _has_terminal()
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
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)  # first: what is noted is not lost
        for number in (*_STOPS, signal.SIGHUP, signal.SIGCHLD):
            self._before[number] = signal.signal(number, _noted)
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

    def take(self, readable: set[int]) -> Asked:
        """What has been asked for since the last time."""
        try:
            numbers = self._ear.recv(4096)
        except BlockingIOError:
            numbers = b""
        asked = [number for number in numbers if number in _STOPS]
        stops, patiently = len(asked), asked[:1] == [signal.SIGINT]
        hung_up = signal.SIGHUP in numbers
        if hung_up and self._terminal and not _has_terminal():
            self._terminal = hung_up = False
            stops += 1
        if self._parent is not None and self._parent_ended(readable):
            self._parent = None
            stops += 1
        return Asked(stops, patiently, hung_up)

    def _parent_ended(self, readable: set[int]) -> bool:
        if self._process is None:
            return self._orphaned or os.getppid() != self._parent
        if self._process not in readable:
            return False
        os.close(self._process)
        self._process = None
        return True


def _has_terminal() -> bool:
    """Whether this process has a terminal that controls it."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _noted(number: int, frame: FrameType | None) -> None:
    """The byte on the socket is the message."""
