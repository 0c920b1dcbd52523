"""A sign of life between two processes that costs the one that gives it no call of the system."""

from __future__ import annotations

import mmap


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
