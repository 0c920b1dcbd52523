"""Why the broker should end: a signal, somebody's word from another thread, or the death of a parent."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Collection
from types import FrameType, TracebackType

from loopmux.errors import LoopmuxError
from loopmux.pulse import exists

PARENT_DIED = "parent died"
ENDS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals that ask for the end; the last one says that the terminal is gone."""


def unheard() -> frozenset[signal.Signals]:
    """Those that are passed over: who was started by nohup stays when its terminal goes."""
    return frozenset({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else ())


class Parent:
    """A process whose death is the end of this one.

    It is watched through a descriptor of the process rather than PR_SET_PDEATHSIG: that one fires when the *thread*
    that started us ends, and only for a direct parent. ``descriptor`` is readable once the process has ended, and None
    where the system has no such thing.

    Raises:
        LoopmuxError: there is no such process.
    """

    def __init__(self, process: int) -> None:
        self._process, self.descriptor = process, _process_descriptor(process)

    def dead(self) -> bool:
        """Whether it has ended."""
        if self.descriptor is None:
            return not exists(self._process)
        return bool(select.select([self.descriptor], [], [], 0)[0])


class Lifeline:
    """Descriptors that become readable when it is time to go, for a poller."""

    def __init__(self, *parents: Parent) -> None:
        self.reason: str | None = None
        self._watched = frozenset(parent.descriptor for parent in parents if parent.descriptor is not None)
        self._asked = tuple(parent for parent in parents if parent.descriptor is None)
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def catch_signals(self) -> None:
        """Let SIGTERM, SIGINT and SIGHUP end the broker in good order. Main thread only."""
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in ENDS - unheard():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def stop(self, reason: str) -> None:
        """End the broker; any thread may ask for it."""
        self.reason = self.reason or reason
        self._mouth.send(b"\0")

    def descriptors(self) -> list[int]:
        """What to poll for reading."""
        return [self._ear.fileno(), *self._watched]

    def check(self, readable: Collection[object]) -> str | None:
        """The reason to end, if there is one; ``readable`` is all that the poller found readable."""
        if not self._watched.isdisjoint(readable) or any(parent.dead() for parent in self._asked):
            self.reason = self.reason or PARENT_DIED
        return self.reason

    def close(self) -> None:
        """Give descriptors and signals back."""
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.set_wakeup_fd(-1)
            for number in ENDS - unheard():
                signal.signal(number, signal.SIG_DFL)
        self._ear.close()
        self._mouth.close()


def _process_descriptor(process: int) -> int | None:
    """A descriptor that is readable once the process has ended; None where the system has no such thing."""
    if not exists(process):
        raise LoopmuxError(f"--parent-pid {process}: there is no such process (any more), so nobody needs this broker")
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        raise LoopmuxError(f"--parent-pid {process}: the process has just ended, so nobody needs this broker") from None
    except (OSError, AttributeError):
        return None
