"""A process: it runs, is stopped for a while (SIGSTOP), dies. An endpoint: one that is connected to the broker."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from loopmux import wire
from simulation.clock import Alarm
from simulation.lines import Line

if TYPE_CHECKING:
    from simulation.world import World

_RECONNECT = (0.01, 2.0)
"""First and longest pause between two tries to connect, seconds: RECONNECT_IVL and its maximum."""
_HAND_OVER = 0.001
"""Seconds until the system has what a socket took."""
_POLLOUT = 0.005
"""Seconds after which a socket that was full is tried again."""


class Process:
    """Does what it is given to do, unless it is frozen (then later) or dead (then never)."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.clock, self.name = world, world.clock, name
        self.alive = True
        self.life = 0
        """Counts its deaths: what was to happen in one life does not happen in the next."""
        self.frozen_since: float | None = None
        self.thawed_at = 0.0
        self._waiting: deque[Callable[[], None]] = deque()
        self._alarms: list[Alarm] = []

    def __repr__(self) -> str:
        return self.name

    @property
    def running(self) -> bool:
        return self.alive and self.frozen_since is None

    def act(self, what: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.frozen_since is None:
            what()
        else:
            self._waiting.append(what)

    def later(self, delay: float, what: Callable[[], None]) -> None:
        """Do something in ``delay`` seconds, or when it thaws."""
        life = self.life
        self.clock.after(delay, lambda: self.act(what) if self.life == life else None)

    def wake_by(self, due: Callable[[], float | None], ring: Callable[[], None]) -> Alarm:
        """An alarm that does not ring while the process is frozen."""
        alarm = Alarm(self.clock, lambda: due() if self.running else None, lambda: ring() if self.running else None)
        self._alarms.append(alarm)
        return alarm

    def look(self) -> None:
        """Something happened in here: timers may have moved."""
        for alarm in self._alarms:
            alarm.look()

    def freeze(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after some time."""
        if self.running:
            self.frozen_since = self.clock.now
            self.clock.after(seconds, self.thaw)

    def thaw(self) -> None:
        if not self.alive or self.frozen_since is None:
            return
        away, self.frozen_since = self.clock.now - self.frozen_since, None
        self.thawed_at = self.clock.now
        self.thawed(away)
        while self._waiting and self.running:
            self._waiting.popleft()()
        self.look()

    def die(self) -> None:
        """kill -9."""
        self.alive, self.frozen_since = False, None
        self.life += 1
        self._waiting.clear()

    def thawed(self, away: float) -> None:
        """It goes on after ``away`` seconds, before it takes what came in meanwhile."""


class Endpoint(Process):
    """Connects to the broker, again whenever that breaks; what the socket does not take waits here."""

    from_worker: ClassVar[bool]
    stranger: ClassVar[bool] = False
    """Whether it is none of ours."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.line: Line | None = None
        self.watches = self.clock.random.random() < 0.5
        """Whether its socket tells it of its connections, as ours do; others may learn by what is said alone."""
        self._unsent: deque[bytes] = deque()
        self._left_behind: list[bytes] = []  # by the last connection, in the socket
        self._unread: Line | None = None  # the last connection, if what had come in on it is read late
        self._tries = 0
        self._flushing = False

    def connect(self) -> None:
        if not self.alive or self.line is not None:
            return
        line = self.world.broker.accept(self)
        if line is None:
            first, longest = _RECONNECT
            pause = min(longest, first * 2**self._tries) * self.clock.random.uniform(0.8, 1.5)
            self._tries = min(self._tries + 1, 8)
            self.later(0.002 if self.world.profile.inherited else pause, self.connect)
            return
        self.line, self._tries = line, 0
        for data in self._left_behind:
            self._send(data)
        self._left_behind = []
        self.later(0.001, lambda: self._stands(line))

    def _stands(self, line: Line) -> None:
        if line is self.line:
            self.connected()
            self.flush()

    def closed(self, line: Line) -> None:
        """The system tells that the connection is gone."""
        if line is self.line:
            self.line = None
            line.near = False
            self._left_behind = line.up.left_behind()
            self._unread = line if self.clock.random.random() < 0.5 else None
            self.disconnected()
            self.later(0.001, self.connect)

    def die(self, news: float = 0.0) -> None:
        """kill -9; or the whole host is gone, and the broker hears of it after ``news`` seconds."""
        super().die()
        self._left_behind, self._unread = [], None
        if self.line is not None:
            self.line.near = False
            # A host that lives delivers what a process had handed to it; ØMQ's own thread takes a moment to do that.
            flushed = -math.inf if news else self.clock.now - _HAND_OVER
            self.world.broker.left(self.line, news, flushed)
            self.line = None

    def heard(self, line: Line, data: bytes) -> None:
        """A message came in. What came by a connection that is gone is read before the next one's, or gone with it."""
        if line is self.line:
            self._unread = None
        elif line is not self._unread:
            return
        self.receive(data)

    def put(self, message: wire.Message, *, lasting: bool = True) -> bool:
        """Send; what does not go now waits in order if it is ``lasting``, else it is dropped and this is False."""
        data = wire.to_bytes(message)
        if not self._unsent and self._send(data):
            return True
        if lasting:
            self._unsent.append(data)
            self._flush_later()
        return lasting

    def unsend(self) -> None:
        """What waits was meant for a connection that is gone."""
        self._unsent.clear()

    def flush(self) -> None:
        while self._unsent and self._send(self._unsent[0]):
            self._unsent.popleft()
        if self._unsent:
            self._flush_later()

    def _send(self, data: bytes) -> bool:
        sent = self.line is not None and self.line.up.send(data)
        if sent and self.world.story.loud:
            self.world.story.message(self, self.world.broker, data)
        return sent

    def _flush_later(self) -> None:
        if self._flushing or self.line is None:  # a new connection flushes by itself
            return

        def again() -> None:
            self._flushing = False
            self.flush()

        self._flushing = True
        self.later(_POLLOUT, again)

    def connected(self) -> None: ...
    def disconnected(self) -> None: ...
    def receive(self, data: bytes) -> None:
        raise NotImplementedError
