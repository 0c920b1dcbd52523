"""The options that every ØMQ socket of ours has, in one place: what two ends count on has to be the same at both."""

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
