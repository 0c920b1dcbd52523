"""Whose keys open which doors: libzmq asks for each connection to a door with keys (ZAP, RFC 27)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from loopmux import keys
from loopmux.sockets import NOW
from loopmux_broker.events import KeyRefused

_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION, _MECHANISM = b"1.0", b"CURVE"
_PARTS, _SIZE = 7, 32
"""Of a question: version, id, domain, address, routing id, mechanism, and the bytes of the public key."""

Listed = Mapping[str, Mapping[bytes, str]]
"""The names of public keys, by domain; a domain is the name of a side."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer, and what is to be said of it where it is no."""

    answer: list[bytes]
    refused: KeyRefused | None = None


def listed(**sides: Mapping[str, str]) -> Listed:
    """From the settings' names and keys, both by side."""
    return {side: {keys.to_bytes(public): name for name, public in named.items()} for side, named in sides.items()}


def judge(question: Sequence[bytes], names: Listed) -> Verdict:
    """Let in who has a listed key, by its name; whatever the question is like."""
    id_ = question[1] if len(question) > 1 else b""
    if len(question) != _PARTS or (question[0], question[5], len(question[6])) != (_VERSION, _MECHANISM, _SIZE):
        return Verdict([_VERSION, id_, b"400", b"no question about a key", b"", b""], KeyRefused("", "", ""))
    side, address, key = question[2].decode(errors="replace"), question[3].decode(errors="replace"), question[6]
    name = names.get(side, {}).get(key)
    if name is not None:
        return Verdict([_VERSION, id_, b"200", b"OK", name.encode(), b""])
    refused = KeyRefused(side, address, z85.encode(key).decode())
    return Verdict([_VERSION, id_, b"400", b"this key is not listed", b"", b""], refused)


class Gate:
    """The socket that libzmq asks; to be there before the doors, and read by the thread that reads them."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], names: Listed) -> None:
        self._names = names
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ENDPOINT)

    def answer(self) -> Verdict | None:
        """Answer the next question; None if there is none."""
        try:
            verdict = judge(self.socket.recv_multipart(NOW), self._names)
        except zmq.Again:
            return None
        self.socket.send_multipart(verdict.answer)
        return verdict
