"""The wire: message kinds, the fixed header, and which parts follow it.

A message is ``HEADER [ROUTE] [TOKENS] [BODY]`` without gaps; the header says how long each part is. Which parts a kind
has is fixed in ``PARTS``; a message with another one is malformed whatever it says. ``ROUTE`` is what the broker reads,
``BODY`` is for the endpoints alone, and ``TOKENS`` (packed unsigned 32-bit token ids) is the one part of the output
that the broker understands.

Messages travel in ØMQ frames, one or several back to back in each (``frames``, ``split``): most of a broker's work is
passing frames from and to ØMQ, whatever they hold, so whoever has more to say than one message to the same peer says it
in one frame.

This module does no I/O and decodes no MessagePack; ``codec`` does the latter. ``docs/protocol.md`` is the document of
record.
"""

from __future__ import annotations

import array
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from loopmux.errors import ProtocolError

MAGIC: Final = b"LM"
VERSIONS: Final = (3,)
"""Protocol versions this code speaks, the best first."""
VERSION: Final = VERSIONS[0]

ROUTE_LIMIT: Final = 4 * 1024
"""Largest ROUTE, bytes: it is decoded by the broker for every message that has one."""
SUBMIT_ROUTE_LIMIT: Final = ROUTE_LIMIT - 128
"""The same of SUBMIT and ATTACH: RUN has the texts of theirs, and what the broker adds."""
CLIENT_BODY_LIMIT: Final = 4 * 1024 * 1024
"""Largest BODY, and as many bytes of TOKENS: of what a client may send, and therefore of any message."""
WORKER_BODY_LIMIT: Final = 1024 * 1024
"""The same of what a worker or launcher may send."""

MOST_TOKENS: Final = 2**32 - 1
"""Of one request: ``seq`` and ``arg`` count them."""

FRAME_MESSAGES: Final = 64
"""Most messages of one frame: clients and workers handle a frame as a whole, and timers and callers wait meanwhile."""
FRAME_BYTES: Final = 64 * 1024
"""Bytes up to which a frame gets another message; what is longer goes alone."""

_HEADER = struct.Struct(">2sBBH16sIIHIII")
HEADER_SIZE: Final = _HEADER.size
_LENGTHS = struct.Struct(">III")
_LENGTHS_AT = HEADER_SIZE - _LENGTHS.size
_BEGINNING = MAGIC + bytes([VERSION])
ID_SIZE: Final = 16
"""Bytes of a request, instance or boot id."""
NO_ID: Final = bytes(ID_SIZE)
"""Request id of messages that are about no request."""


def message_limit(body: int) -> int:
    """``ZMQ_MAXMSGSIZE`` where BODY and TOKENS may have ``body`` bytes each: more than ``FRAME_BYTES``."""
    return HEADER_SIZE + ROUTE_LIMIT + 2 * body


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


class Part(IntFlag):
    """The parts that may follow the header."""

    NONE = 0
    ROUTE = 1
    BODY = 2
    TOKENS = 4


PARTS: Final[dict[Kind, Part]] = {
    Kind.HELLO: Part.ROUTE,
    Kind.WELCOME: Part.ROUTE,
    Kind.PING: Part.NONE,
    Kind.PONG: Part.NONE,
    Kind.BYE: Part.NONE,
    Kind.SUBMIT: Part.ROUTE | Part.BODY,
    Kind.ATTACH: Part.ROUTE | Part.BODY | Part.TOKENS,
    Kind.CREDIT: Part.NONE,
    Kind.CANCEL: Part.NONE,
    Kind.SESSION: Part.ROUTE,
    Kind.ACCEPTED: Part.NONE,
    Kind.PHASE: Part.ROUTE,
    Kind.TOK: Part.BODY | Part.TOKENS,
    Kind.END: Part.BODY,
    Kind.ERROR: Part.BODY,
    Kind.CANCELLED: Part.BODY,
    Kind.EXPIRED: Part.BODY,
    Kind.ENDACK: Part.NONE,
    Kind.TOKACK: Part.NONE,
    Kind.REGISTER: Part.ROUTE | Part.BODY,
    Kind.HB: Part.ROUTE,
    Kind.WHO: Part.NONE,
    Kind.RESET: Part.NONE,
    Kind.DRAIN: Part.NONE,
    Kind.DIE: Part.NONE,
    Kind.HELD: Part.ROUTE,
    Kind.RUN: Part.ROUTE | Part.BODY | Part.TOKENS,
    Kind.RUNACK: Part.NONE,
    Kind.STOP: Part.NONE,
    Kind.REPLAY: Part.NONE,
    Kind.LOAD: Part.ROUTE,
    Kind.UNLOAD: Part.ROUTE,
    Kind.DONE: Part.BODY,
    Kind.CATALOGUE: Part.ROUTE,
    Kind.SCALE: Part.BODY,
    Kind.FAILED: Part.ROUTE,
    Kind.STATUS: Part.NONE,
    Kind.REPORT: Part.BODY,
    Kind.EVICT: Part.ROUTE,
}

TERMINALS: Final = frozenset({Kind.END, Kind.ERROR, Kind.CANCELLED, Kind.EXPIRED})
"""The kinds that end a request; each request gets exactly one."""


@dataclass(slots=True)
class Header:
    """The fixed part in front of every message.

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
    """One message, header decoded and the other parts as they came (empty where the kind has none)."""

    header: Header
    route: bytes = b""
    body: bytes = b""
    tokens: bytes = b""

    @property
    def kind(self) -> Kind:
        """The header's kind."""
        return self.header.kind


_ALL = Part.ROUTE | Part.BODY | Part.TOKENS
_KINDS: Final = {int(kind): (kind, int(_ALL & ~parts)) for kind, parts in PARTS.items()}
"""By number: the kind, and the parts that it does not have. A plain number: asking a Flag costs as much as all else."""
_ROUTE, _BODY, _TOKENS = int(Part.ROUTE), int(Part.BODY), int(Part.TOKENS)
_pack, _unpack, _lengths = _HEADER.pack, _HEADER.unpack_from, _LENGTHS.unpack_from


def to_bytes(message: Message) -> bytes:
    """A message as it goes over the wire."""
    h, route, tokens, body = message.header, message.route, message.tokens, message.body
    lengths = len(route), len(tokens) // 4, len(body)
    head = _pack(MAGIC, h.version, h.kind, h.flags, h.request, h.seq, h.arg, h.attempt, *lengths)
    return head + route + tokens + body  # not joined: most have one part or two, and nothing is copied for none


def frames(messages: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """Frames for messages to one peer, in order, each with the number of messages that it holds."""
    together: list[bytes] = []
    size = 0
    for data in messages:
        size += len(data)
        if together and (size > FRAME_BYTES or len(together) == FRAME_MESSAGES):
            yield b"".join(together), len(together)
            together, size = [], len(data)
        together.append(data)
    if together:
        yield b"".join(together), len(together)


def split(frame: bytes) -> list[bytes]:
    """The messages of a frame.

    What is not to be told apart, because it does not begin as a message does or there are too many before it, is one
    more of them, up to the frame's end: ``from_bytes`` says what is wrong with it.
    """
    size, begin = len(frame), 0
    found: list[bytes] = []
    while len(found) < FRAME_MESSAGES - 1 and size - begin >= HEADER_SIZE and frame.startswith(_BEGINNING, begin):
        route, ids, body = _lengths(frame, begin + _LENGTHS_AT)
        end = begin + HEADER_SIZE + route + 4 * ids + body
        if end >= size:
            break
        found.append(frame[begin:end])
        begin = end
    found.append(frame[begin:] if begin else frame)
    return found


def from_bytes(data: bytes) -> Message:
    """Check a message and take it apart.

    Raises:
        ProtocolError: malformed header, a part that the kind does not have or that is too large, or lengths that are
            not the message's.
    """
    size = len(data)
    if size < HEADER_SIZE:
        raise _no_header(data)
    magic, version, number, flags, request, seq, arg, attempt, route, ids, body = _unpack(data)
    if magic != MAGIC or version not in VERSIONS:
        raise _no_header(data)
    known = _KINDS.get(number)
    if known is None:
        raise ProtocolError(f"unknown message kind {number}")
    kind, lacks = known
    tokens_at = HEADER_SIZE + route
    body_at = tokens_at + 4 * ids
    if body_at + body != size:
        raise ProtocolError(
            f"{kind.name} announces {route} bytes of ROUTE, {ids} tokens and {body} bytes of BODY, and has "
            f"{size - HEADER_SIZE} bytes: it is cut short, or more than {FRAME_MESSAGES} messages came in one frame"
        )
    if (route and lacks & _ROUTE) or (ids and lacks & _TOKENS) or (body and lacks & _BODY):
        sizes = zip((Part.ROUTE, Part.TOKENS, Part.BODY), (route, ids, body), strict=True)
        names = " and ".join(str(part.name) for part, found in sizes if found and lacks & part)
        raise ProtocolError(f"{kind.name} has {names}, expected none")
    if size > ROUTE_LIMIT and (route > ROUTE_LIMIT or max(4 * ids, body) > CLIENT_BODY_LIMIT):
        raise ProtocolError(
            f"{kind.name} has a ROUTE of {route} bytes, TOKENS of {4 * ids} and a BODY of {body}: "
            f"at most {ROUTE_LIMIT}, {CLIENT_BODY_LIMIT} and {CLIENT_BODY_LIMIT} are accepted"
        )
    header = Header(kind, request, seq, arg, attempt, flags, version)
    return Message(header, data[HEADER_SIZE:tokens_at], data[body_at:], data[tokens_at:body_at])


def foreign(data: bytes) -> bool:
    """Whether this is a message, or the first frame of one, in a protocol version that is not spoken here."""
    return data[:2] == MAGIC and len(data) > 2 and data[2] not in VERSIONS


def _no_header(data: bytes) -> ProtocolError:
    """What is wrong where a header should be."""
    if foreign(data):
        spoken = ", ".join(map(str, VERSIONS))
        return ProtocolError(
            f"protocol version {data[2]} is not spoken here (spoken: {spoken}): install one release everywhere"
        )
    if data[:2] != MAGIC:
        return ProtocolError(f"a message starts with {data[:2]!r}, expected {MAGIC!r}: the peer does not speak Loopmux")
    return ProtocolError(f"a message of {len(data)} bytes, expected a header of {HEADER_SIZE} at least")


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


def unpack_tokens(packed: bytes) -> list[int]:
    """The inverse of ``pack_tokens``; the length must be a multiple of 4."""
    unpacked = array.array("I", packed)
    if sys.byteorder == "little":
        unpacked.byteswap()
    return unpacked.tolist()


def new_id() -> bytes:
    """A fresh random request, instance or boot id (``ID_SIZE`` bytes)."""
    return os.urandom(ID_SIZE)
