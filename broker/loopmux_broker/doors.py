"""One ROUTER socket: receiving, sending, and noticing closed connections."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from enum import Enum

import zmq

from loopmux.sockets import COMMON, NOW, SEAL, news, readable, send
from loopmux.wire import CLIENT_BODY_LIMIT, WORKER_BODY_LIMIT, Kind, frames, message_limit, split
from loopmux_broker.descriptors import most, turn_away
from loopmux_broker.events import AdminSent, ClientSent, FramesSent, Peer, Sent, WorkerSent

_INTRODUCTIONS = frozenset(bytes([kind]) for kind in (Kind.HELLO, Kind.REGISTER))
_RECEIVE_HWM = 1000
_FRAMES = 16
"""Frames, at least, that wait for a client that does not read; each may have 64 KiB. What goes to workers is few, and
is not to be refused."""
_PASSED = 64
"""Frames of what has too many that are read at once: they take a tenth of a millisecond."""
_NEWS = 2001
"""News of a monitor that are read at once: all that its pipe can hold."""
_CLOSE_DEAD = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 60_000,  # milliseconds for which what was sent may stay unacknowledged
}
"""The system closes connections to hosts that are not there any more within a minute. By its own measure it takes two
hours, and keeps a descriptor and what was to be sent for each."""


class Side(Enum):
    """Who connects to a door."""

    CLIENTS = "clients"
    WORKERS = "workers"
    ADMINS = "admins"


_SENT: dict[Side, Callable[..., ClientSent | WorkerSent | AdminSent]] = {
    Side.CLIENTS: ClientSent,
    Side.WORKERS: WorkerSent,
    Side.ADMINS: AdminSent,
}


class Descriptors:
    """Whose connection has which file descriptor. A descriptor is used again once its connection is closed.

    What came in on a closed connection may be read after what the next one with its descriptor said. Which of the two
    is the newer one is told by their routing ids: libzmq counts them up from a random number, one for each connection.
    """

    def __init__(self) -> None:
        self._peers: dict[int, Peer] = {}

    def introduced(self, descriptor: int, peer: Peer) -> Peer | None:
        """A peer said who it is. Returns the one, if any, whose connection must be closed because of that."""
        holder = self._peers.get(descriptor, peer)
        if _newer(holder, peer):
            return peer
        self._peers[descriptor] = peer
        return holder if holder != peer else None

    def closed(self, descriptor: int) -> Peer | None:
        """The system has closed a descriptor. Returns the peer that had introduced itself over it."""
        return self._peers.pop(descriptor, None)


def _newer(one: Peer, other: Peer) -> bool:
    """Whether a peer connected after another one of the same door: the number of 32 bits in its routing id is ahead.

    Who brings a routing id of its own is newer than nobody, or, if it begins with a zero as libzmq's do, than whom it
    likes: it can harm no one but the next user of its descriptor, whose connection then counts as lost.
    """
    if one[0] or other[0]:
        return False
    ahead = int.from_bytes(one[1:5]) - int.from_bytes(other[1:5])
    return 0 < ahead % 2**32 < 2**31


def _throw_dice() -> None:
    """Have libzmq begin to count the next socket's connections at a number that nobody can guess.

    It takes that from ``rand``, without a seed: the same one in each process. And it ends the process when it comes to
    a number that a peer has brought as its own routing id ("Assertion failed: ok", socket_base.cpp).
    """
    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4))))


class Door:
    """A ROUTER socket and its monitor. The last byte of each ``Peer`` is ``number``, the rest its routing id."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], number: int, side: Side, window: int, secret: str = ""
    ) -> None:
        """With the ``secret`` part of the broker's key it lets in keys only, as `zap` says."""
        self._keyed = bool(secret)
        self.number, self.side = number, side
        self.endpoint = ""
        self._suffix = bytes([number])
        self._sent = _SENT[side]
        self._descriptors = Descriptors()
        self._most = most(clients=side is Side.CLIENTS)
        self.lost: list[Peer] = []
        """Introduced peers whose connections have closed, until somebody takes them out."""
        self.turned_away = 0
        """Connections that were one too many, until somebody counts them."""
        self.amid: FramesSent | None = None
        """What has several frames that have not all been read."""
        _throw_dice()
        self.socket = context.socket(zmq.ROUTER)
        limit = CLIENT_BODY_LIMIT if side is Side.CLIENTS else WORKER_BODY_LIMIT
        options = COMMON | {
            zmq.ROUTER_MANDATORY: 1,  # without it a full or lost peer's messages vanish while every send succeeds
            # Who brings a routing id that another one has is not heard, and what it sends is kept until the door closes
            # (libzmq never reads it). With 1 it would take the other's connection over, and anybody may bring any id,
            # the counted ones of ours included.
            zmq.ROUTER_HANDOVER: 0,
            zmq.MAXMSGSIZE: message_limit(limit) + (SEAL if secret else 0),
            zmq.SNDHWM: max(window // 4, _FRAMES) if side is Side.CLIENTS else 2 * window,
            zmq.RCVHWM: _RECEIVE_HWM,
            zmq.IPV6: 1,
            # libzmq ends the process that is to send a heartbeat over a connection which closed while nothing more was
            # read from it ("Assertion failed: !_io_error", stream_engine_base.cpp): whoever floods a door and is killed
            # would take the broker along. The other ends send theirs, and silence is judged by the core.
            zmq.HEARTBEAT_IVL: 0,
            **_CLOSE_DEAD,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        if secret:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
            self.socket.setsockopt(zmq.ZAP_DOMAIN, side.value.encode())
            self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without anybody to ask, nobody comes in
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)

    def serve(self, endpoint: str, descriptor: int) -> None:
        """Serve a socket that listens on an endpoint. The descriptor stays the caller's."""
        self.endpoint = endpoint
        self.socket.setsockopt(zmq.USE_FD, os.dup(descriptor))
        self.socket.bind(endpoint)

    @property
    def readable(self) -> bool:
        """Whether there is a message to receive."""
        return readable(self.socket)

    def receive(self) -> list[Sent]:
        """The messages of what comes in next; none if there is nothing now, or nothing yet (``amid``)."""
        if self.amid is not None:
            return self._pass_over(self.amid)
        receive = self.socket.recv
        try:
            peer = receive(NOW) + self._suffix
        except zmq.Again:
            return []
        # A Frame rather than bytes: it knows its connection, and whether more frames follow. The socket would take them
        # for the next routing id and its message, and to ask it costs more than the Frame does.
        frame = receive(NOW, False)
        if frame.more:
            return self._pass_over(FramesSent(peer, frame.bytes))
        messages, sent = split(frame.bytes), self._sent
        for data in messages:
            if data[3:4] in _INTRODUCTIONS:
                self._introduced(frame, peer)
                if self._keyed:
                    key = frame.get("User-Id")
                    return [sent(peer, data, key) for data in messages]
        return [sent(peer, data) for data in messages]

    def _introduced(self, frame: zmq.Frame, peer: Peer) -> None:
        try:
            descriptor = int(frame.get(zmq.SRCFD))
        except zmq.ZMQError:
            return  # libzmq does not know it of peers that speak ZMTP 1 or 2; their silence is noticed all the same
        self.watch()  # the descriptor's last user is gone, which the monitor has said but nobody may have read yet
        self._lose(self._descriptors.introduced(descriptor, peer))

    def _pass_over(self, sent: FramesSent) -> list[Sent]:
        """Read more frames of what has too many; it may have a million, and others have their turns."""
        for _ in range(_PASSED):
            if not self.socket.recv(NOW, False).more:
                self.amid = None
                return [sent]
        self.amid = sent
        return []

    def send(self, peer: Peer, messages: Iterable[bytes]) -> int:
        """Send messages at once or not at all, several to a frame, in order. Returns how many were taken.

        Raises:
            LookupError: the peer is gone.
        """
        taken = 0
        for frame, count in frames(messages):
            try:
                send(self.socket, frame, peer[:-1])
            except zmq.Again:
                break
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                raise LookupError from error
            taken += count
        return taken

    def watch(self) -> None:
        """Read the monitor: whose connections have closed, and whether there are too many."""
        for _ in range(_NEWS):
            told = news(self.monitor)
            if told is None:
                return
            event, descriptor = told
            if event == zmq.EVENT_DISCONNECTED:
                self._lose(self._descriptors.closed(descriptor))
            elif descriptor >= self._most:
                turn_away(descriptor)
                self.turned_away += 1

    def _lose(self, peer: Peer | None) -> None:
        if peer is not None:
            self.lost.append(peer)

    def close(self) -> None:
        """Stop listening; the socket file goes with it."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
