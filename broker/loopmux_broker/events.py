"""What happens to the broker (events, past tense) and what it wants done (actions, imperative).

The shell turns sockets and the clock into events and carries out actions; tests write both down and compare lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from loopmux import wire
from loopmux.wire import Header, Kind, Message

Level = Literal["debug", "info", "warning", "error"]
Peer = bytes
"""One connection, opaque to the core: unique among all sockets, never used again once it is lost."""

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ClientSent:
    """A message came in on a client socket, unchecked. Of a HELLO over CURVE ``key`` is the name of the peer's key."""

    peer: Peer
    data: bytes
    key: str = ""


@dataclass(slots=True)
class WorkerSent:
    """A message came in on a worker socket, from a worker or a launcher, unchecked; ``key`` as REGISTER's."""

    peer: Peer
    data: bytes
    key: str = ""


@dataclass(slots=True)
class AdminSent:
    """A message came in on the socket for administrators, unchecked."""

    peer: Peer
    data: bytes


@dataclass(slots=True)
class FramesSent:
    """What came in has more frames than the one of a message, wherever that was; ``data`` is the first of them."""

    peer: Peer
    data: bytes


@dataclass(frozen=True, slots=True)
class KeyRefused:
    """A connection was not let in: its key (Z85) is not listed for the side that it came to."""

    side: str
    address: str
    key: str


@dataclass(frozen=True, slots=True)
class ConnectionsRefused:
    """So many connections to a side were closed at once: there are no more descriptors for them."""

    side: str
    count: int


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """A connection closed, and everything that had come in on it was handed over before."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PushBlocked:
    """The last pushes to a peer, whose pipe is full, were not sent; ``seq`` is the lowest among those of a request."""

    peer: Peer
    request: bytes
    seq: int


@dataclass(frozen=True, slots=True)
class SendFailed:
    """What the core said to a peer does not fit into a message, which is a bug; nothing of that turn was sent to it."""

    error: Exception


@dataclass(frozen=True, slots=True)
class TimerDue:
    """The time that ``Broker.next_timer`` named has come."""


@dataclass(frozen=True, slots=True)
class LoopStalled:
    """The process itself was away for ``gap`` seconds (stopped, or out of processor time): nobody else was silent."""

    gap: float


Sent = ClientSent | WorkerSent | AdminSent | FramesSent
Event = Sent | KeyRefused | ConnectionsRefused | ConnectionLost | PushBlocked | SendFailed | TimerDue | LoopStalled

# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Send:
    """Send a message that its receiver, or a timer, asks for again when it gets lost."""

    peer: Peer
    message: Message

    @property
    def data(self) -> bytes:
        """The message on the wire."""
        return wire.to_bytes(self.message)


@dataclass(slots=True)
class Push:
    """Send a piece of a stream, as it came; if the pipe is full, say so with ``PushBlocked``."""

    peer: Peer
    data: bytes
    request: bytes
    seq: int


@dataclass(frozen=True, slots=True)
class Log:
    """Write a line to the log. Never holds a prompt, an output or anything else that a client wrote."""

    level: Level
    event: str
    fields: dict[str, object] = field(default_factory=dict)


Action = Send | Push | Log


def say(kind: Kind, request: bytes = wire.NO_ID, *, seq: int = 0, arg: int = 0, attempt: int = 0) -> Message:
    """A message that is all header."""
    return Message(Header(kind, request, seq, arg, attempt))
