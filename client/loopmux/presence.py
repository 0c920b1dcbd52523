"""Whether the broker knows us: introductions until it answers, heartbeats from then on, and when its silence is a loss.

The rules of docs/protocol.md, which are the same for clients, workers and launchers; each has its own words for them.

::

    IDLE ──introduce──▶ GREETING ──WELCOME──▶ READY ──silence, WHO, disconnected──▶ GREETING
      ▲                    │ refused, or nobody waits
      └────────────────────┘
"""

from __future__ import annotations

import math
from enum import Enum, auto

from loopmux.cadence import ABSENT_HEARTBEATS, HEARTBEAT, INTRODUCE_AGAIN, SILENT_HEARTBEATS
from loopmux.codec import BODY_LIMITS, unpack
from loopmux.errors import LoopmuxError, ProtocolError
from loopmux.messages import Failure, Welcome
from loopmux.wire import NO_ID, VERSIONS, Kind, Message

_FASTEST = 0.05
"""Seconds; a broker that wants heartbeats more often is mistaken."""


class State(Enum):
    """What is known about the broker."""

    IDLE = auto()
    GREETING = auto()
    READY = auto()
    CLOSED = auto()


class Presence:
    """What one peer knows of its broker.

    Args:
        broker: what errors call it.

    Attributes:
        ready: whether the broker knows us; ``epoch`` is its own.
        introduction: the number of HELLO or REGISTER: it rises with each connection, and WELCOME has it, too.
        heard: when the broker said anything last.
    """

    def __init__(self, broker: str = "it") -> None:
        self._broker = broker
        self.introduction = 0
        self.heard = 0.0
        self.epoch = b""
        self._heartbeat = HEARTBEAT
        self._seen = math.inf
        self.enter(State.IDLE)

    def enter(self, state: State, speak_at: float = math.inf) -> None:
        """Go over to a state, and say nothing in it before ``speak_at``."""
        self.state, self._speak_at = state, speak_at
        self.ready = state is State.READY
        self._patience = SILENT_HEARTBEATS * self._heartbeat if self.ready else math.inf

    def turn(self, now: float) -> None:
        """It is ``now``. If we were away meanwhile, so was our ear."""
        if now - self._seen > ABSENT_HEARTBEATS * self._heartbeat:
            self.heard += now - self._seen
        self._seen = now

    def introduce(self) -> None:
        """Say who we are at once, unless the broker knows it."""
        if self.state in (State.IDLE, State.GREETING):
            self.enter(State.GREETING, 0.0)

    def disconnected(self) -> bool:
        """Say who we are anew: the answer to what was said before counts no more. Whether the broker knew us."""
        known = self.ready
        self.introduction += 1
        if self.state in (State.GREETING, State.READY):
            self.enter(State.GREETING, 0.0)
        return known

    def answered(self, message: Message, now: float) -> Welcome | LoopmuxError | None:
        """What the broker says of our introduction: WELCOME, or why it refuses it; None if nothing that is new.

        Raises:
            ProtocolError: that is malformed.
        """
        header = message.header
        if header.kind is Kind.ERROR and header.request == NO_ID and self.state is State.GREETING:
            return unpack(Failure, message.body, BODY_LIMITS).error()
        if header.kind is not Kind.WELCOME or header.seq != self.introduction or self.state is State.CLOSED:
            return None
        welcome = unpack(Welcome, message.route)
        if welcome.version not in VERSIONS or not 0 < welcome.heartbeat < math.inf or welcome.window < 1:
            return ProtocolError(f"{self._broker} sent an impossible WELCOME: {welcome}")
        if self.ready and welcome.epoch == self.epoch:
            return None
        self.epoch, self._heartbeat = welcome.epoch, max(welcome.heartbeat, _FASTEST)
        self.enter(State.READY, now + self._heartbeat)
        return welcome

    def silent(self, now: float) -> bool:
        """Whether a broker that knows us has been silent for too long."""
        return now >= self.heard + self._patience

    def speaks(self, now: float) -> bool:
        """Whether it is time to say who we are, or, once the broker knows it, that we are there. Then it is said."""
        if now < self._speak_at:
            return False
        self._speak_at = now + (self._heartbeat if self.ready else INTRODUCE_AGAIN)
        return True

    def next_timer(self) -> float:
        """When one of these is to be asked again."""
        return min(self._speak_at, self.heard + self._patience)
