"""Connections as ØMQ gives them: in order, late, of limited room.

When one breaks, what went last is lost, but for what the socket has not passed on: the next one begins with that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import islice

from simulation.clock import Clock

Deliver = Callable[[Callable[[], None]], None]


class Pipe:
    """One direction of a connection.

    ``act`` is the receiving process: it is given what to do with a message, and does it when it runs. Messages that it
    has not taken count against ``room``, as they fill a socket's pipe.
    """

    def __init__(self, clock: Clock, latency: tuple[float, float], act: Deliver, hear: Callable[[bytes], None]) -> None:
        self._clock, self._latency, self._act, self._hear = clock, latency, act, hear
        self.room: float = 2_000
        self.held_until = 0.0
        self.last = 0.0
        """When the latest message arrives."""
        self._sent = self._taken = 0
        self._limit: float = math.inf
        self._under_way: deque[tuple[float, bytes]] = deque()  # when it was sent, and what

    @property
    def full(self) -> bool:
        """Whether the sender is told EAGAIN."""
        return self._sent - self._taken >= self.room

    def send(self, data: bytes) -> bool:
        """Put a message in; False if it does not fit."""
        if self.full:
            return False
        clock = self._clock
        self.last = max(self.last, self.held_until, clock.now + clock.random.uniform(*self._latency))
        number, self._sent = self._sent, self._sent + 1
        self._under_way.append((clock.now, data))

        def taken() -> None:
            self._taken += 1
            self._under_way.popleft()
            if number < self._limit:
                self._hear(data)

        clock.at(self.last, lambda: self._act(taken))
        return True

    def cut(self, flushed: float = -math.inf) -> None:
        """It breaks here and now: of what was sent after ``flushed`` and is under way, the last part never arrives."""
        arrives = self._taken + sum(sent <= flushed for sent, _ in self._under_way)
        self._limit = min(self._limit, self._clock.random.randint(arrives, self._sent))

    def left_behind(self) -> list[bytes]:
        """Of a broken one: the last of what never arrives, perhaps, which the sender's socket had not passed on yet.

        It has them still, and its next connection begins with them.
        """
        lost = self._sent - max(self._limit, self._taken)
        first = len(self._under_way) - self._clock.random.randint(0, lost)
        return [data for _, data in islice(self._under_way, first, None)]


class Line:
    """One connection of an endpoint (near) to the broker (far): each end learns by itself that it is gone."""

    def __init__(self, peer: bytes, up: Pipe, down: Pipe) -> None:
        self.peer, self.up, self.down = peer, up, down
        self.near = self.far = True

    def cut(self, flushed: float = -math.inf) -> None:
        """Nothing passes from now on, but up what was sent until ``flushed``; who has not noticed may go on sending."""
        self.up.cut(flushed)
        self.down.cut()
        self.up.room = self.down.room = math.inf

    def hold(self, until: float) -> None:
        """A partition: what is sent arrives when it has healed, if the connection lives to see that."""
        self.up.held_until = self.down.held_until = until
