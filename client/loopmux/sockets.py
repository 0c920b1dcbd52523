"""What all ØMQ sockets of ours have in common: their options, on which two ends count alike, and how messages pass."""

from __future__ import annotations

import socket as plain
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import zmq

from loopmux.cadence import HEARTBEAT, SILENT_HEARTBEATS
from loopmux.errors import ConfigError, ConnectionLostError
from loopmux.wire import frames, split

if TYPE_CHECKING:
    from loopmux.keys import Credentials

FAREWELL: Final = 200
"""Milliseconds that a closing socket may take to hand CANCEL and BYE to the kernel; it takes well under one."""

_ASK: Final = round(500 * HEARTBEAT)
"""Milliseconds between two questions whether the other end still answers; the time for an answer begins with one. The
two together are the silence after which a peer counts as lost, so that a line which has gone dead is left by then."""
COMMON: Final = {
    zmq.LINGER: 0,  # who has something left to say closes with FAREWELL
    zmq.SNDTIMEO: 0,  # what cannot be sent now is kept by whoever sends, who knows whether it still matters later
    zmq.HEARTBEAT_IVL: _ASK,
    zmq.HEARTBEAT_TIMEOUT: round(1000 * HEARTBEAT * SILENT_HEARTBEATS) - _ASK,
    zmq.HANDSHAKE_IVL: 2000,  # the default of 30 s is a long time to take a port that says nothing for a broker
}
"""Of both ends; times are milliseconds."""
SEAL: Final = 64
"""Bytes, and more, by which a frame is longer over CURVE (33), where its length is compared with the limit."""
_NEWS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_NEWS_OF_KEYS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_MISMATCH = 0x11000002
"""ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH, which pyzmq has no name for."""
_MANY, _WITHIN = 10, 2.0
"""Handshakes that the other end cut off, within so many seconds. (One that is not answered takes ``HANDSHAKE_IVL``.)"""
_SOON, _LATE = 10, 1000
"""Milliseconds, and up to twice as many, until the next try: a broker that died is followed by another one in no more
time; and where many handshakes are cut off, in steps of ten. libzmq waits longer only where no connection is had."""

_DESCRIPTORS = 12
"""Of a context with one socket and its connection (9), and of a thread that drives it."""
_EVENT: Final = struct.Struct("=Hi")
"""First frame of a monitor's message: event number and value."""
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)  # plain numbers: an enum's `&` costs as much as asking the socket

# The compiled method itself: what zmq.Socket wraps around it is for other types of sockets and doubles the cost.
_send = zmq.backend.Socket.send
NOW, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


def receive(socket: zmq.Socket[bytes]) -> bytes | None:
    """The next frame, None if there is none now. To whoever is not a ROUTER each frame stands for itself."""
    try:
        return socket.recv(NOW)
    except zmq.Again:
        return None


def send(socket: zmq.Socket[bytes], data: bytes, to: bytes | None = None) -> None:
    """Send a frame at once; ``to`` is the routing id that a ROUTER needs.

    Raises:
        zmq.Again: the socket does not take it now.
        zmq.ZMQError: or never; of a ROUTER with EHOSTUNREACH, where ``to`` names nobody who is there.
    """
    if to is not None:
        _send(socket, to, _MORE)
    _send(socket, data, NOW)


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether there is a message to receive."""
    return int(socket.get(_EVENTS)) & _READABLE != 0


def news(monitor: zmq.Socket[bytes]) -> tuple[int, int] | None:
    """The next event of a socket's monitor, its number and value; None if there is none now."""
    try:
        message, _endpoint = monitor.recv_multipart(NOW)
    except zmq.Again:
        return None
    event, value = _EVENT.unpack(message)
    return event, value


def use_keys(socket: zmq.Socket[bytes], credentials: Credentials | None) -> None:
    """Have a socket connect with a key, to who has the server's."""
    if credentials is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, credentials.key.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, credentials.key.secret.encode())
        socket.setsockopt(zmq.CURVE_SERVERKEY, credentials.server.encode())


def new_context(endpoint: str) -> zmq.Context[zmq.Socket[bytes]]:
    """A context for a ``Dealer`` to a broker's endpoint.

    Raises:
        ConnectionLostError: there are too few descriptors for them: libzmq would end the process.
    """
    tried: list[plain.socket] = []  # objects, which close themselves where Ctrl-C comes
    try:
        while len(tried) < _DESCRIPTORS:
            tried.append(plain.socket())
    except OSError as error:
        raise ConnectionLostError(
            f"cannot connect to the broker at {endpoint}: {error}; close what is not needed, one client serves any "
            "number of threads or tasks, or let the process open more (`ulimit -n`)"
        ) from error
    finally:
        for one in tried:
            one.close()
    return zmq.Context()


class _Often:
    """Notices what happens many times within a while."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_MANY)

    def again(self) -> bool:
        """It happened once more; whether that makes many, which are counted anew then."""
        self._times.append(time.monotonic())
        if len(self._times) < _MANY or self._times[-1] - self._times[0] >= _WITHIN:
            return False
        self._times.clear()
        return True


class Dealer:
    """A DEALER to the broker that knows whether it has a connection; belongs to one thread at a time.

    Without one it takes nothing. libzmq has an option for that (IMMEDIATE), but with it a connection that closes while
    the first of several frames have been read ends the process ("Assertion failed: !_more", fq.cpp): a broker of an
    older release, which sends several, would take busy clients and workers along when it is killed.

    Attributes:
        socket: to be polled for input, and for output while something waits and there is a connection.
        monitor: readable when there is ``news``.
        connected: as of the news that was taken.
        barred: why the broker will not have this end, empty as long as it may. The connection is given up for good
            then: libzmq would ignore another ``connect``.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], largest: int, credentials: Credentials | None = None
    ) -> None:
        """``largest`` is the longest message it takes, bytes."""
        self.connected = False
        self.barred = ""
        self._key = None if credentials is None else credentials.key
        self._endpoint = ""
        self._unread: _Often | None = _Often()  # handshakes, none of which has succeeded so far
        self._cut_off = _Often()
        self._interval = _SOON
        self.socket = context.socket(zmq.DEALER)
        options = COMMON | {
            zmq.RECONNECT_IVL: _SOON,
            zmq.RECONNECT_IVL_MAX: 2000,  # one that stays away costs hundreds of peers little, and is found soon
            zmq.CONNECT_TIMEOUT: 2000,  # who is not answered asks anew: the system waits ever longer, up to a minute
            zmq.MAXMSGSIZE: largest + (0 if credentials is None else SEAL),
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        use_keys(self.socket, credentials)
        self.monitor = self.socket.get_monitor_socket(_NEWS | (0 if credentials is None else _NEWS_OF_KEYS))

    def connect(self, endpoint: str) -> None:
        """Begin to connect, and go on until it is closed.

        Raises:
            ConfigError: the endpoint is not one that can be connected to.
        """
        self._endpoint = endpoint
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            expected = "expected as in tcp://127.0.0.1:7750"
            raise ConfigError(f"cannot connect to {endpoint!r}: {error}; {expected}") from error

    def send(self, messages: Iterable[bytes]) -> int:
        """Send messages in order, several to a frame, and return how many were taken: none without a connection.

        What was taken just before the connection was lost may still arrive at the broker, over the next one.
        """
        taken = 0
        if self.connected:
            for frame, count in frames(messages):
                try:
                    send(self.socket, frame)
                except zmq.Again:
                    break
                taken += count
        return taken

    def arrived(self, most: int) -> Iterator[bytes]:
        """The messages that are there: about ``most``, to the end of a frame that was begun."""
        taken = 0
        while taken < most:
            if taken and not readable(self.socket):
                return  # mostly it is one frame that comes, and asking costs less than to be refused
            frame = receive(self.socket)
            if frame is None:
                return
            messages = split(frame)
            yield from messages
            taken += len(messages)

    def news(self) -> bool | None:
        """What happened to the connection, in order: True, it is there; False, it is gone or barred; None, no more."""
        while (told := news(self.monitor)) is not None:
            event, value = told
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self._unread = True, None
                return True
            if event == zmq.EVENT_DISCONNECTED:
                self._set_pace(self.connected)
                self.connected = False
                return False
            self.barred = self._why_barred(event, value)
            if self.barred:
                return False
        return None

    def _set_pace(self, connected: bool) -> None:
        """Choose when the next try comes behind a connection that has ended, or whose handshake was cut off."""
        if connected:
            interval = _SOON
        elif self.barred or not self._cut_off.again():
            return
        else:
            interval = min(10 * self._interval, _LATE)
        if interval != self._interval:  # libzmq keeps to the one with which it began to connect
            self._interval = interval
            self.socket.disconnect(self._endpoint)
            self.socket.setsockopt(zmq.RECONNECT_IVL, interval)
            self.socket.connect(self._endpoint)

    def _why_barred(self, event: int, value: int) -> str:
        """What a handshake that failed means; empty where the next one may succeed."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._key:
            return (
                f"the broker at {self._endpoint} refused the key {self._key.name!r} ($LOOPMUX_KEY): have its public "
                f"part, {self._key.public}, entered into its settings for this side, and the broker started again"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _MISMATCH:
            return f"the broker at {self._endpoint} " + (
                "has no key, and one was expected: unset $LOOPMUX_KEY and $LOOPMUX_SERVER_KEY if that is right"
                if self._key
                else "lets in keys only: set $LOOPMUX_KEY to a key file (`loopmux keys new NAME`) and "
                "$LOOPMUX_SERVER_KEY to the broker's public key"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._key and self._unread and self._unread.again():
            self.socket.disconnect(self._endpoint)
            return (
                f"what listens at {self._endpoint} cannot read what is said to it with $LOOPMUX_SERVER_KEY: set it "
                "to the public key of the broker there (`loopmux keys show FILE` on its host); or it is a tunnel "
                "or proxy with no broker behind it: start that one first"
            )
        return ""

    def close(self) -> None:
        """Close it, letting what it has taken leave first."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger=FAREWELL)
