"""Signs of life of a process: that it is there, those that cost it no call of the system, and their absence."""

from __future__ import annotations

import mmap
import os


def exists(process: int) -> bool:
    """Whether there is a process of this number, whoever's."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Pulse:
    """A byte that two processes share: one beats, the other looks whether it has since it looked last.

    Args:
        descriptor: of a file of one byte that both have; without it the byte is shared with those that are forked.
    """

    def __init__(self, descriptor: int = -1) -> None:
        self._shared = mmap.mmap(descriptor, 1)

    def beat(self) -> None:
        """This process gets on."""
        self._shared[0] = 1

    def taken(self) -> bool:
        """Whether there was a beat since this was asked last."""
        there, self._shared[0] = self._shared[0], 0
        return there == 1


_LOOKS = 6


def between(limit: float) -> float:
    """Seconds from one look to the next where ``limit`` seconds of silence are too many."""
    return limit / _LOOKS


class Silence:
    """Whether somebody has given no sign of life for too long, as of looks that are ``between(limit)`` seconds apart.

    A look that comes late is that of one who was stopped himself, most likely with all else on the host: it says
    nothing, and the count begins anew.
    """

    def __init__(self, limit: float, now: float) -> None:
        self._late, self._looked, self._missed = 2 * between(limit), now, 0

    def look(self, *, beat: bool, now: float) -> bool:
        """Take a look in, with whether there was a sign since the last; returns True once it is too long."""
        late, self._looked = now - self._looked > self._late, now
        self._missed = 0 if beat or late else self._missed + 1
        return self._missed == _LOOKS
