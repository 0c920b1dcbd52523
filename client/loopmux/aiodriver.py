"""What drives the asyncio client's connection core: the event loop, through the socket's descriptor.

A plain socket and ``loop.add_reader``: the descriptor of a ZeroMQ socket is edge-triggered and stands for sending and
receiving alike, so after every turn the socket's events are looked at again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import warnings
import weakref

from loopmux.driver import Driver, Sink, closed
from loopmux.errors import AuthError
from loopmux.events import Asked, CancelAsked, Closed, ConnectionEvent, Fail, Received, Submitted, TimePassed
from loopmux.keys import Credentials

_DRAIN = 64
"""Messages taken per turn of the loop before other tasks get theirs."""


class AsyncDriver(Driver):
    """One connection, driven by the event loop it was made in."""

    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None:
        self.loop = asyncio.get_running_loop()
        super().__init__(endpoint, connect_timeout, credentials)
        self.closed = False
        self._endpoint = endpoint
        self._timer: asyncio.TimerHandle | None = None
        self._again: asyncio.Handle | None = None
        self._flushing: asyncio.Handle | None = None
        self.loop.add_reader(self._link.descriptor, self._turn)
        self.loop.add_reader(self._link.monitor.FD, self._watch)
        self._watch()  # the descriptor announces nothing before the first time that nothing was found

    def start(self, event: Submitted | Asked, sink: Sink) -> None:
        """Begin a request or a question whose outcome and events go to ``sink``."""
        if self._link.barred:  # as soon as it was made: nothing comes from it any more
            sink(Fail(event.id, AuthError(self._link.barred)))
            return
        self._sinks[event.id] = sink
        self.post(event)

    def post(self, event: ConnectionEvent) -> None:
        """Handle an event of a caller now."""
        if not self.closed:
            self._handle(event, self.loop.time())
            self._settle()

    def abandon(self, request: bytes) -> None:
        """Cancel a request that nobody reads any more; from any thread, as the collector may run in any."""
        if self.closed or self.pid != os.getpid():
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it everything that runs
            self.loop.call_soon_threadsafe(self._abandon, request)

    def _abandon(self, request: bytes) -> None:
        self.forget(request)
        self.post(CancelAsked(request))

    def close(self) -> None:
        """Cancel what runs, say goodbye, close the socket; if the event loop is gone, only the last."""
        if self.closed:
            return
        self.closed = True
        if not self.loop.is_closed():
            self._handle(Closed(), self.loop.time())
            self.loop.remove_reader(self._link.descriptor)
            self.loop.remove_reader(self._link.monitor.FD)
            for handle in (self._timer, self._again, self._flushing):
                if handle is not None:
                    handle.cancel()
        self._link.close()

    def drop(self) -> None:
        """Close it as nobody has its client any more; from any thread, as the collector may run in any."""
        if self.closed or self.pid != os.getpid():
            return
        try:
            self.loop.call_soon_threadsafe(self.close)
        except RuntimeError:  # the loop is closed
            self.close()
        warnings.warn(
            f"an AsyncClient of {self._endpoint} was not closed: use `async with`, or `await client.close()`",
            ResourceWarning,
            stacklevel=2,
        )

    def _turn(self) -> None:
        """Take what is there; the descriptor only says that something may have changed."""
        if self._again is not None:
            self._again.cancel()  # it is the descriptor that called, and who closes must find no other turn
            self._again = None
        for data in self._link.arrived(_DRAIN):
            self._handle(Received(data), self.loop.time())
        self._settle()

    def _watch(self) -> None:
        """What happened to the connection, until there is no more: this descriptor announces only changes, too."""
        while (event := self._link.news()) is not None:
            self._handle(event, self.loop.time())
        if self._link.barred:
            self.close()  # another one may try
        else:
            self._settle()

    def _tick(self) -> None:
        self._timer = None
        self._handle(TimePassed(), self.loop.time())
        self._settle()

    def _settle(self) -> None:
        """Send what was said once the tasks that wake up now have said theirs, and come back for the next timer."""
        if self._flushing is None:
            self._flushing = self.loop.call_soon(self._flush)
        due = self._core.next_timer()
        if self._timer is not None and due < self._timer.when():
            self._timer.cancel()
            self._timer = None
        if self._timer is None and not math.isinf(due):
            self._timer = self.loop.call_at(due, self._tick)

    def _flush(self) -> None:
        """Send what was said, and come back for what the descriptor will not announce again."""
        self._flushing = None
        self._link.flush()
        if self._again is None and self._link.ready:
            self._again = self.loop.call_soon(self._turn)


class AsyncChannel:
    """The way to a broker that a client and its ``with_options`` copies share; opened at the first use in a loop.

    After a fork the child opens its own. The loop holds the driver, nobody but clients and streams the channel: an
    unclosed one that is collected closes itself.
    """

    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None:
        self._endpoint, self._credentials = endpoint, credentials
        self.connect_timeout = connect_timeout
        self._driver: AsyncDriver | None = None
        self._finalizer: weakref.finalize[..., AsyncChannel] | None = None
        self._closed = False

    def driver(self) -> AsyncDriver:
        """The driver of the running loop.

        Raises:
            ConnectionLostError: the client was closed.
            RuntimeError: the client is in use by another loop.
        """
        self._check_open()
        if self._driver is not None and self._driver.pid != os.getpid():
            self._driver = self._finalizer = None  # a forked child: the parent's stays in the registry of finalizers
        if self._driver is not None and self._driver.loop is not asyncio.get_running_loop():
            if not self._driver.loop.is_closed():
                raise RuntimeError("this AsyncClient is used by another event loop: make one client per loop")
            self._driver.close()
            self._driver = None
        if self._driver is None or self._driver.closed:
            if self._finalizer is not None:
                self._finalizer.detach()
            self._driver = AsyncDriver(self._endpoint, self.connect_timeout, self._credentials)
            self._finalizer = weakref.finalize(self, self._driver.drop)
            self._finalizer.atexit = False  # what is left at exit is no leak
        return self._driver

    def mention(self, event: ConnectionEvent) -> None:
        """Post what is of use only over a connection that is there: none is opened for it.

        Raises:
            ConnectionLostError, RuntimeError: as ``driver``.
        """
        self._check_open()
        if self._driver is not None and not self._driver.closed:
            self.driver().post(event)

    def _check_open(self) -> None:
        if self._closed:
            raise closed()

    def close(self) -> None:
        """Close for good; a second time does nothing. A driver whose loop runs elsewhere is closed there, soon."""
        self._closed = True
        driver = self._driver
        if driver is None or driver.pid != os.getpid():
            return
        if driver.loop.is_running() and driver.loop is not asyncio.get_running_loop():
            with contextlib.suppress(RuntimeError):  # that loop was closed by now, and with it everything that runs
                driver.loop.call_soon_threadsafe(driver.close)
        else:
            driver.close()
