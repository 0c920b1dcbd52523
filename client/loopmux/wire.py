"""The wire: message kinds, the fixed header, and which frames follow it.

A message is ``HDR [ROUTE] [BODY] [TOKENS]``. Which frames a kind has is fixed in ``FRAMES``, so a message of the wrong
length is malformed whatever it says. ``ROUTE`` is what the broker reads, ``BODY`` is for the endpoints alone, and
``TOKENS`` (packed unsigned 32-bit token ids) is the one part of the output that the broker understands.

This module does no I/O and decodes no MessagePack; ``codec`` does the latter. ``docs/protocol.md`` is the document of
record.
"""

from __future__ import annotations

import array
import os
import struct
import sys
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from loopmux.errors import ProtocolError

MAGIC: Final = b"LM"
VERSIONS: Final = (1,)
"""Protocol versions this code speaks, the best first."""
VERSION: Final = VERSIONS[0]

ROUTE_LIMIT: Final = 4 * 1024
"""Largest ROUTE frame, bytes: it is decoded by the broker for every message that has one."""
CLIENT_MESSAGE_LIMIT: Final = 4 * 1024 * 1024
"""Largest frame a client may send, bytes (``ZMQ_MAXMSGSIZE`` of the client side)."""
WORKER_MESSAGE_LIMIT: Final = 1024 * 1024
"""Largest frame a worker may send, bytes."""

_HEADER = struct.Struct(">2sBBH16sIIHH")
HEADER_SIZE: Final = _HEADER.size
ID_SIZE: Final = 16
"""Bytes of a request, instance or boot id."""
NO_ID: Final = bytes(ID_SIZE)
"""Request id of messages that are about no request."""


class Kind(IntEnum):
    """What a message is. Numbers are part of the protocol and never reused."""

    # client <-> broker: the connection
    HELLO = 1
    WELCOME = 2
    PING = 3
    PONG = 4
    BYE = 5
    # client -> broker: requests
    SUBMIT = 16
    ATTACH = 17
    CREDIT = 18
    CANCEL = 19
    SESSION = 20
    # broker -> client: the life of a request
    ACCEPTED = 32
    PHASE = 33
    # output, worker -> broker -> client
    TOK = 48
    END = 49
    ERROR = 50
    CANCELLED = 51
    EXPIRED = 52
    ENDACK = 53
    TOKACK = 54
    # broker <-> worker, broker <-> launcher: membership
    REGISTER = 64
    HB = 65
    WHO = 66
    RESET = 67
    DRAIN = 68
    DIE = 69
    HELD = 70
    # broker -> worker: work
    RUN = 80
    RUNACK = 81
    STOP = 82
    REPLAY = 83
    # client -> broker -> worker, launcher: adapters at run time
    LOAD = 84
    UNLOAD = 85
    DONE = 86
    # broker <-> launcher
    CATALOGUE = 96
    SCALE = 97
    FAILED = 98
    # questions anyone may ask
    STATUS = 112
    REPORT = 113
    # administrator -> broker
    EVICT = 114


class StopReason(IntEnum):
    """``arg`` of STOP."""

    CANCELLED = 1
    DEADLINE = 2
    SUPERSEDED = 3


class Frame(IntFlag):
    """The frames that may follow the header, in this order."""

    NONE = 0
    ROUTE = 1
    BODY = 2
    TOKENS = 4


FRAMES: Final[dict[Kind, Frame]] = {
    Kind.HELLO: Frame.ROUTE,
    Kind.WELCOME: Frame.ROUTE,
    Kind.PING: Frame.NONE,
    Kind.PONG: Frame.NONE,
    Kind.BYE: Frame.NONE,
    Kind.SUBMIT: Frame.ROUTE | Frame.BODY,
    Kind.ATTACH: Frame.ROUTE | Frame.BODY | Frame.TOKENS,
    Kind.CREDIT: Frame.NONE,
    Kind.CANCEL: Frame.NONE,
    Kind.SESSION: Frame.ROUTE,
    Kind.ACCEPTED: Frame.NONE,
    Kind.PHASE: Frame.ROUTE,
    Kind.TOK: Frame.BODY | Frame.TOKENS,
    Kind.END: Frame.BODY,
    Kind.ERROR: Frame.BODY,
    Kind.CANCELLED: Frame.BODY,
    Kind.EXPIRED: Frame.BODY,
    Kind.ENDACK: Frame.NONE,
    Kind.TOKACK: Frame.NONE,
    Kind.REGISTER: Frame.ROUTE | Frame.BODY,
    Kind.HB: Frame.ROUTE,
    Kind.WHO: Frame.NONE,
    Kind.RESET: Frame.NONE,
    Kind.DRAIN: Frame.NONE,
    Kind.DIE: Frame.NONE,
    Kind.HELD: Frame.ROUTE,
    Kind.RUN: Frame.ROUTE | Frame.BODY | Frame.TOKENS,
    Kind.RUNACK: Frame.NONE,
    Kind.STOP: Frame.NONE,
    Kind.REPLAY: Frame.NONE,
    Kind.LOAD: Frame.ROUTE,
    Kind.UNLOAD: Frame.ROUTE,
    Kind.DONE: Frame.BODY,
    Kind.CATALOGUE: Frame.ROUTE,
    Kind.SCALE: Frame.BODY,
    Kind.FAILED: Frame.ROUTE,
    Kind.STATUS: Frame.NONE,
    Kind.REPORT: Frame.BODY,
    Kind.EVICT: Frame.ROUTE,
}

TERMINALS: Final = frozenset({Kind.END, Kind.ERROR, Kind.CANCELLED, Kind.EXPIRED})
"""The kinds that end a request; each request gets exactly one."""


@dataclass(slots=True)
class Header:
    """The 34 bytes in front of every message.

    ``seq`` and ``arg`` mean what the kind says: in TOK the absolute index of the first token and the number of tokens,
    in a terminal the total number of tokens, in HELLO, REGISTER and the WELCOME that answers them the number of the
    introduction (seq), in CREDIT the first token index that may *not* be sent yet and the number received so far, in
    ATTACH the same the other way round, in ACCEPTED the queue position (arg), in HB the progress counter (seq), in HELD
    the first token that can be sent and the number produced, in REPLAY the first one to send and the number that the
    client has, in DRAIN milliseconds until the worker leaves (arg). Big-endian on the wire.
    """

    kind: Kind
    request: bytes = NO_ID
    seq: int = 0
    arg: int = 0
    attempt: int = 0
    flags: int = 0
    version: int = VERSION


@dataclass(slots=True)
class Message:
    """One message, header decoded and the other frames as they came (empty where the kind has none)."""

    header: Header
    route: bytes = b""
    body: bytes = b""
    tokens: bytes = b""

    @property
    def kind(self) -> Kind:
        """The header's kind."""
        return self.header.kind


def pack_header(header: Header) -> bytes:
    """Encode a header into its 34 bytes."""
    return _HEADER.pack(
        MAGIC, header.version, header.kind, header.flags, header.request, header.seq, header.arg, header.attempt, 0
    )


def unpack_header(frame: bytes) -> Header:
    """Decode a header.

    Raises:
        ProtocolError: wrong length or magic, a version this code does not speak, or an unknown kind.
    """
    if len(frame) != HEADER_SIZE:
        raise ProtocolError(f"header frame has {len(frame)} bytes, expected {HEADER_SIZE}")
    magic, version, kind, flags, request, seq, arg, attempt, _ = _HEADER.unpack(frame)
    if magic != MAGIC:
        raise ProtocolError(f"header starts with {magic!r}, expected {MAGIC!r}: the peer does not speak Loopmux")
    if version not in VERSIONS:
        spoken = ", ".join(map(str, VERSIONS))
        raise ProtocolError(
            f"protocol version {version} is not spoken here (spoken: {spoken}): install one release everywhere"
        )
    known = _KINDS.get(kind)
    if known is None:
        raise ProtocolError(f"unknown message kind {kind}")
    return Header(known, request, seq, arg, attempt, flags, version)


_KINDS: Final = {int(kind): kind for kind in Kind}


def _places(shape: Frame) -> tuple[int, int, int, int]:
    """How many frames a message has, and where ROUTE, BODY and TOKENS are among them (0: nowhere)."""
    count = 1
    places = []
    for frame in (Frame.ROUTE, Frame.BODY, Frame.TOKENS):
        places.append(count if shape & frame else 0)
        count += bool(shape & frame)
    return count, places[0], places[1], places[2]


# Worked out once: asking a Flag anew for every message costs as much as all the rest of taking it apart.
_PLACES: Final = {kind: _places(shape) for kind, shape in FRAMES.items()}


def to_frames(message: Message) -> list[bytes]:
    """The frames of a message, header first."""
    _, route, body, tokens = _PLACES[message.header.kind]
    frames = [pack_header(message.header)]
    if route:
        frames.append(message.route)
    if body:
        frames.append(message.body)
    if tokens:
        frames.append(message.tokens)
    return frames


def from_frames(frames: list[bytes]) -> Message:
    """Check and take apart the frames of a message (without any routing id in front).

    Raises:
        ProtocolError: malformed header, wrong number of frames for the kind, oversized ROUTE, or TOKENS that are not
            whole 32-bit numbers.
    """
    if not frames:
        raise ProtocolError("a message without frames")
    header = unpack_header(frames[0])
    count, route_at, body_at, tokens_at = _PLACES[header.kind]
    if len(frames) != count:
        raise ProtocolError(f"{header.kind.name} has {len(frames)} frames, expected {count}")
    route = frames[route_at] if route_at else b""
    body = frames[body_at] if body_at else b""
    tokens = frames[tokens_at] if tokens_at else b""
    if len(route) > ROUTE_LIMIT:
        raise ProtocolError(f"{header.kind.name} has a ROUTE of {len(route)} bytes, at most {ROUTE_LIMIT} are accepted")
    if len(tokens) % 4:
        raise ProtocolError(f"{header.kind.name} has a TOKENS frame of {len(tokens)} bytes, expected a multiple of 4")
    return Message(header, route, body, tokens)


def pack_tokens(ids: list[int] | tuple[int, ...]) -> bytes:
    """Token ids as packed big-endian unsigned 32-bit numbers.

    Raises:
        ProtocolError: an id is negative or does not fit in 32 bits.
    """
    try:
        packed = array.array("I", ids)
    except (OverflowError, TypeError) as error:
        raise ProtocolError(f"token ids must be whole numbers from 0 to 2**32 - 1: {error}") from error
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(frame: bytes) -> list[int]:
    """The inverse of ``pack_tokens``; the length must be a multiple of 4."""
    unpacked = array.array("I", frame)
    if sys.byteorder == "little":
        unpacked.byteswap()
    return unpacked.tolist()


def new_id() -> bytes:
    """A fresh random request, instance or boot id (``ID_SIZE`` bytes)."""
    return os.urandom(ID_SIZE)
