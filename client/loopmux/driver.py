"""A connection core on its socket, as both clients drive it: ``pump`` in a thread, ``aiodriver`` in the event loop."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable

from loopmux import __version__
from loopmux.connection import Connection
from loopmux.errors import ConnectionLostError
from loopmux.events import (
    Answer,
    Asked,
    ConnectionEvent,
    Deliver,
    Fail,
    Finish,
    Introduce,
    Send,
    Submitted,
)
from loopmux.keys import Credentials
from loopmux.link import Link
from loopmux.wire import new_id

ForCaller = Deliver | Finish | Fail | Answer
"""What the core has for whoever asked for something."""
Sink = Callable[[ForCaller], object]
"""Where what concerns one request or question goes; called by whoever drives the connection."""


def closed() -> ConnectionLostError:
    """The error for whoever uses a client that was closed."""
    return ConnectionLostError("the client is closed: make another one", retryable=False)


class Driver(ABC):
    """One connection, and who waits for what of it."""

    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None:
        self.pid = os.getpid()
        self._core = Connection(endpoint, new_id(), connect_timeout, f"loopmux {__version__}")
        self._link = Link(endpoint, credentials)
        self._sinks: dict[bytes, Sink] = {}

    @abstractmethod
    def start(self, event: Submitted | Asked, sink: Sink) -> None:
        """Begin a request or a question whose outcome and events go to ``sink``."""

    @abstractmethod
    def post(self, event: ConnectionEvent) -> None:
        """Take in what a caller wants."""

    def forget(self, request: bytes) -> None:
        """Nobody waits for the outcome of this request any more."""
        self._sinks.pop(request, None)

    def _handle(self, event: ConnectionEvent, now: float) -> None:
        """Carry out what the core wants done; each request's last action takes its sink away."""
        for action in self._core.handle(event, now):
            match action:
                case Send(message):
                    self._link.send(message)
                case Deliver(request):
                    if sink := self._sinks.get(request):
                        sink(action)
                case Finish(id_) | Fail(id_) | Answer(id_):
                    if sink := self._sinks.pop(id_, None):
                        sink(action)
                case Introduce(message):
                    self._link.introduce(message)
