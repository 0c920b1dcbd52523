"""What all ØMQ sockets of ours have in common: their options, on which two ends count alike, and how messages pass."""

from __future__ import annotations

from typing import Final

import zmq

from loopmux.cadence import HEARTBEAT, SILENT_HEARTBEATS

FAREWELL: Final = 200
"""Milliseconds that a closing socket may take to hand CANCEL and BYE to the kernel; it takes well under one."""

COMMON: Final = {
    zmq.LINGER: 0,  # who has something left to say closes with FAREWELL
    zmq.SNDTIMEO: 0,  # what cannot be sent now is kept by whoever sends, who knows whether it still matters later
    zmq.HEARTBEAT_IVL: round(1000 * HEARTBEAT),
    zmq.HEARTBEAT_TIMEOUT: round(1000 * HEARTBEAT * SILENT_HEARTBEATS),
    zmq.HANDSHAKE_IVL: 2000,  # the default of 30 s is a long time to take a port that says nothing for a broker
}
"""Of both ends; times are milliseconds."""

_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)  # plain numbers: an enum's `&` costs as much as asking the socket

# The compiled method itself: what zmq.Socket wraps around it is for other types of sockets and doubles the cost.
_send = zmq.backend.Socket.send
_NOW, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


def dealer(context: zmq.Context[zmq.Socket[bytes]], largest: int) -> zmq.Socket[bytes]:
    """A socket for a peer of the broker, not connected yet; ``largest`` is the longest message it takes, bytes."""
    socket = context.socket(zmq.DEALER)
    options = COMMON | {
        zmq.IMMEDIATE: 1,  # without a connection a send fails instead of queueing for nobody
        zmq.RECONNECT_IVL: 50,  # a broker that was started again is found at once
        zmq.RECONNECT_IVL_MAX: 2000,  # one that stays away costs hundreds of peers little, and is found soon
        zmq.MAXMSGSIZE: largest,
    }
    for option, value in options.items():
        socket.setsockopt(option, value)
    return socket


def receive(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    """The frames of the next message, None if there is none now."""
    try:
        frame = socket.recv(zmq.NOBLOCK, False)
    except zmq.Again:
        return None
    # Frames rather than bytes: `more` comes with them, asking the socket for it costs more than the rest together.
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(zmq.NOBLOCK, False)
        frames.append(frame.bytes)
    return frames


def send(socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
    """Send a message at once.

    Raises:
        zmq.Again: the socket does not take it now.
        zmq.ZMQError: or never; of a ROUTER with EHOSTUNREACH, where the first frame names nobody who is there.
    """
    for frame in frames[:-1]:
        _send(socket, frame, _MORE)
    _send(socket, frames[-1], _NOW)


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether there is a message to receive."""
    return int(socket.get(_EVENTS)) & _READABLE != 0
