"""A client's socket to the broker, and what could not be sent yet."""

from __future__ import annotations

import sys
from collections import deque

import zmq

from loopmux.endpoints import ipc_path
from loopmux.errors import ConfigError
from loopmux.events import Connected, Disconnected
from loopmux.sockets import FAREWELL, dealer, readable, receive, send
from loopmux.wire import CLIENT_MESSAGE_LIMIT, Message, to_frames


class Link:
    """A DEALER connected to an endpoint; belongs to one thread at a time.

    What the socket does not take (no connection, full pipe) waits here in order until ``flush`` gets rid of it.
    ``monitor`` is readable when there is ``news``.

    Raises:
        ConfigError: the endpoint is not one that can be connected to.
    """

    def __init__(self, endpoint: str) -> None:
        ipc_path(endpoint)
        self._context = zmq.Context()
        self.socket = dealer(self._context, CLIENT_MESSAGE_LIMIT)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._unsent: deque[list[bytes]] = deque()
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot connect to {endpoint!r}: {error}; expected as in tcp://127.0.0.1:7750"
            ) from error

    @property
    def descriptor(self) -> int:
        """A file descriptor that becomes readable when ``ready`` may have changed (edge-triggered)."""
        return int(self.socket.getsockopt(zmq.FD))

    @property
    def ready(self) -> bool:
        """Whether there is something to receive, or room for what waits to be sent."""
        events = int(self.socket.getsockopt(zmq.EVENTS))
        return bool(events & zmq.POLLIN or (events & zmq.POLLOUT and self._unsent))

    @property
    def readable(self) -> bool:
        """Whether there is something to receive."""
        return readable(self.socket)

    @property
    def blocked(self) -> bool:
        """Whether something waits for the socket to take it."""
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Send, or keep for ``flush``."""
        self._unsent.append(to_frames(message))
        self.flush()

    def introduce(self, message: Message) -> None:
        """Send, and drop what waits: it was meant for a connection that is gone."""
        self._unsent.clear()
        self.send(message)

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._unsent:
            try:
                send(self.socket, self._unsent[0])
            except zmq.Again:
                return
            self._unsent.popleft()

    def receive(self) -> list[bytes] | None:
        """The frames of the next message, or None."""
        return receive(self.socket)

    def news(self) -> Connected | Disconnected | None:
        """What happened to the connection, one by one; None when that is all."""
        try:
            event, _endpoint = self.monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        lost = int.from_bytes(event[:2], sys.byteorder) == zmq.EVENT_DISCONNECTED
        return Disconnected() if lost else Connected()

    def close(self) -> None:
        """Close the socket, letting what it has taken leave first."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger=FAREWELL)
        self._context.term()
