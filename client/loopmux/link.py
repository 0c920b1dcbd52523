"""A client's socket to the broker, and what could not be sent yet."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator

import zmq

from loopmux.endpoints import ipc_path
from loopmux.errors import ConfigError
from loopmux.events import Barred, Connected, Disconnected
from loopmux.keys import Credentials
from loopmux.outbox import Outbox
from loopmux.sockets import Dealer, new_context
from loopmux.wire import CLIENT_BODY_LIMIT, Message, message_limit, to_bytes

_AHEAD = 8
"""Frames that the socket takes before they leave. What waits in the outbox is there once, however often it is said
while a slow line carries what was said before; in the socket it would be there each time."""
_inherited: list[tuple[Dealer, zmq.Context[zmq.Socket[bytes]]]] = []
"""A forked child keeps what its parent has open: it is not the child's to close."""


class Link:
    """A DEALER connected to an endpoint; belongs to one thread at a time.

    What is said waits here in order for ``flush``, which whoever drives the link calls once it has no more to say for
    the moment; what the socket does not take then (no connection, full pipe) waits for the next time.
    ``monitor`` is readable when there is ``news``. One that is collected unclosed is closed.

    Raises:
        ConfigError: the endpoint is not one that can be connected to.
        ConnectionLostError: the system has no descriptors left for it.
    """

    def __init__(self, endpoint: str, credentials: Credentials | None = None) -> None:
        ipc_path(endpoint)
        context = new_context(endpoint)
        self._dealer = Dealer(context, message_limit(CLIENT_BODY_LIMIT), credentials)
        # Left to the collector, the context may come first, and wait for ever for sockets that it cannot name any more.
        self._finalizer = weakref.finalize(self, _close, self._dealer, context, os.getpid())
        self._finalizer.atexit = False  # a thread that still runs may be using it
        self.socket, self.monitor = self._dealer.socket, self._dealer.monitor
        self.socket.setsockopt(zmq.SNDHWM, _AHEAD)
        self._said: list[Message] = []
        self._unsent = Outbox()
        try:
            self._dealer.connect(endpoint)
        except ConfigError:
            self.close()
            raise

    @property
    def descriptor(self) -> int:
        """A file descriptor that becomes readable when ``ready`` may have changed (edge-triggered)."""
        return int(self.socket.getsockopt(zmq.FD))

    @property
    def ready(self) -> bool:
        """Whether there is something to receive, or room for what waits to be sent."""
        events = int(self.socket.getsockopt(zmq.EVENTS))
        return bool(events & zmq.POLLIN or (events & zmq.POLLOUT and self.blocked))

    @property
    def barred(self) -> str:
        """Why the broker will not have this client; another link may try again. Empty as long as it may."""
        return self._dealer.barred

    @property
    def blocked(self) -> bool:
        """Whether something waits for room in the socket; without a connection it waits for ``news``."""
        return bool(self._unsent) and self._dealer.connected

    def send(self, message: Message) -> None:
        """Say something, with the next ``flush``."""
        self._said.append(message)

    def introduce(self, message: Message) -> None:
        """Say this, and drop what waits: it was meant for a connection that is gone."""
        self._unsent.clear()
        self._said = [message]

    def flush(self) -> None:
        """Send what was said, behind what waits, as far as the socket takes it."""
        if not self._unsent:
            taken = self._dealer.send(map(to_bytes, self._said))
            self._unsent.extend(self._said[taken:])
        else:
            self._unsent.extend(self._said)
            self._unsent.drop(self._dealer.send(map(to_bytes, self._unsent)))
        self._said.clear()

    def arrived(self, most: int) -> Iterator[bytes]:
        """The messages that are there, about ``most``."""
        return self._dealer.arrived(most)

    def news(self) -> Connected | Disconnected | Barred | None:
        """What happened to the connection, one by one; None when that is all."""
        connected = self._dealer.news()
        if connected is False and self.barred:
            return Barred(self.barred)
        return None if connected is None else Connected() if connected else Disconnected()

    def close(self) -> None:
        """Close the socket, letting what was said leave first."""
        self.flush()
        self._finalizer()


def _close(dealer: Dealer, context: zmq.Context[zmq.Socket[bytes]], pid: int) -> None:
    if pid != os.getpid():
        _inherited.append((dealer, context))
        return
    dealer.close()
    context.term()
