"""The thread behind the sync client: it owns the socket and the connection core, callers meet it in queues."""

from __future__ import annotations

import functools
import math
import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import zmq

from loopmux.driver import Driver, Sink, closed
from loopmux.errors import AuthError, LoopmuxError
from loopmux.events import Asked, Closed, ConnectionEvent, Fail, Received, Send, Submitted, TimePassed
from loopmux.keys import Credentials

_DRAIN = 64
"""Messages taken from the socket before callers and timers get their turn again."""
_STOP_WITHIN = 2.0
"""Seconds that closing waits for the thread; it needs a millisecond, and an exit must not hang on it."""


class Pump(Driver):
    """One connection and its thread, which runs from ``begin`` on.

    Every method but the thread's own may be called from any thread. It has ``ended`` when it was stopped, or the broker
    would not have it: then another one may try.
    """

    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None:
        super().__init__(endpoint, connect_timeout, credentials)
        self._posted: deque[ConnectionEvent] = deque()
        self._asleep = False
        self._why_ended: Callable[[], LoopmuxError] = closed  # each caller's own: a loop notes its transcript on it
        self.ended = False
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._left = threading.Event()
        self._owned = threading.Lock()  # taken by whoever ends it: its thread, or who stops it before that runs
        self._thread = threading.Thread(target=self._run, name="loopmux-client", daemon=True)

    def begin(self) -> None:
        """Start the thread; after ``stop`` it ends at once.

        Raises:
            RuntimeError: the system has no thread left.
        """
        self._thread.start()

    def start(self, event: Submitted | Asked, sink: Sink) -> None:
        """Begin a request or a question whose outcome and events go to ``sink``."""
        self._sinks[event.id] = sink
        self.post(event)
        if self.ended and event.id in self._sinks:  # the thread ended before it could see the event
            if _exiting():
                time.sleep(_STOP_WITHIN)  # as in _end
            if self._sinks.pop(event.id, None):
                sink(Fail(event.id, self._why_ended()))

    def post(self, event: ConnectionEvent) -> None:
        """Hand an event to the thread."""
        self._posted.append(event)
        if self._asleep:
            self._ring()

    def stop(self) -> None:
        """Cancel what runs, say goodbye, close the socket, end the thread. A forked child leaves its parent's alone."""
        if self.pid != os.getpid() or self.ended:
            return
        self._posted.append(Closed())
        self._ring()
        if self._owned.acquire(blocking=False):  # begin() failed or was interrupted
            self._end()
        elif threading.current_thread() is not self._thread:  # the collector may run finalizers in any thread
            (self._left.wait if _exiting() else self._thread.join)(_STOP_WITHIN)

    def _ring(self) -> None:
        try:
            self._button.send(b"\0")
        except BlockingIOError:
            pass  # it rings already
        except OSError:
            if not self.ended:
                raise

    def _run(self) -> None:
        if not self._owned.acquire(blocking=False):
            return
        try:
            self._turn_until_closed()
        except BaseException as cause:
            failed = f"the client's connection thread failed ({type(cause).__name__}: {cause}): report this"
            self._why_ended = functools.partial(LoopmuxError, failed)
            raise  # threading.excepthook prints it; callers get the error above
        finally:
            self._end()

    def _end(self) -> None:
        self.ended = True
        if not _exiting():
            self._fail_all()
        self._link.close()
        self._bell.close()
        self._button.close()
        self._left.set()
        if self._sinks and _exiting():  # daemon threads end with the interpreter, unless somebody joins one even now
            time.sleep(_STOP_WITHIN)
            self._fail_all()

    def _fail_all(self) -> None:
        for id_ in list(self._sinks):
            if sink := self._sinks.pop(id_, None):
                sink(Fail(id_, self._why_ended()))

    def _turn_until_closed(self) -> None:
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        poller.register(self._link.monitor, zmq.POLLIN)
        while True:
            self._link.flush()
            want = zmq.POLLIN | zmq.POLLOUT if self._link.blocked else zmq.POLLIN
            poller.register(self._link.socket, want)
            readable = False
            for ready, event in poller.poll(self._nap()):
                if ready is self._link.socket:
                    readable = bool(event & zmq.POLLIN)
                elif ready is self._link.monitor:
                    self._take_news()
                else:
                    self._bell.recv(4096)
            self._asleep = False
            if readable:
                self._take_messages()
            if not self._take_posted():
                return
            if self._link.barred:
                self._why_ended = functools.partial(AuthError, self._link.barred)
                return
            now = time.monotonic()
            if now >= self._core.next_timer():
                self._handle(TimePassed(), now)

    def _nap(self) -> int:
        """Milliseconds until the next timer. From here on whoever posts must ring."""
        self._asleep = True
        if self._posted:
            return 0
        left = self._core.next_timer() - time.monotonic()
        return -1 if math.isinf(left) else max(0, math.ceil(left * 1000))

    def _take_messages(self) -> None:
        for data in self._link.arrived(_DRAIN):
            self._handle(Received(data), time.monotonic())

    def _take_news(self) -> None:
        while (event := self._link.news()) is not None:
            self._handle(event, time.monotonic())

    def _take_posted(self) -> bool:
        """Handle what callers posted; False when that ended the connection."""
        while self._posted:
            event = self._posted.popleft()
            if isinstance(event, Closed) and _exiting():
                self._say_farewell(event)
                return False
            self._handle(event, time.monotonic())
            if isinstance(event, Closed):
                return False
        return True

    def _say_farewell(self, event: Closed) -> None:
        """Tell the broker; those who wait at exit are told late: see ``_end``."""
        for action in self._core.handle(event, time.monotonic()):
            if isinstance(action, Send):
                self._link.send(action.message)


def _exiting() -> bool:
    """Whether the interpreter ends: only daemon threads are left beside what is done at exit."""
    main = threading.main_thread()  # a daemon in a child that one has forked
    return not any(one.is_alive() for one in threading.enumerate() if one is main or not one.daemon)


class Channel:
    """The way to a broker that a client and its ``with_options`` copies share; opened at the first use.

    After a fork the child opens its own. An unclosed channel that is collected, or left at exit, closes itself.
    """

    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None:
        self._endpoint, self._credentials = endpoint, credentials
        self.connect_timeout = connect_timeout
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._pump: Pump | None = None
        self._finalizer: weakref.finalize[..., Channel] | None = None
        self._lock = threading.RLock()  # a signal's handler may close the client wherever its thread is
        self._pid = os.getpid()

    def _ours(self) -> None:
        """A forked child has no thread of its parent's, whose lock may be taken for ever.

        The parent's finalizer stays in the registry, which keeps a child from collecting the parent's sockets.
        """
        if self._pid != os.getpid():
            self._reset()

    def pump(self) -> Pump:
        """The running pump.

        Raises:
            ConnectionLostError: the channel was closed.
            ConfigError: the endpoint cannot be connected to.
        """
        self._ours()
        with self._lock:
            if not self._closed and (self._pump is None or self._pump.ended):
                self._open()
            if self._closed or self._pump is None:
                self._stop()  # what was begun while a handler closed it
                raise closed()
            return self._pump

    def mention(self, event: ConnectionEvent) -> None:
        """Post what is of use only over a connection that is there: none is opened for it, least of all at exit.

        Raises:
            ConnectionLostError: the channel was closed.
        """
        self._ours()
        with self._lock:
            if self._closed:
                raise closed()
            pump = self._pump
        if pump is not None and not pump.ended:
            pump.post(event)

    def _open(self) -> None:
        """Ctrl-C, or a handler that closes the client, may come anywhere in here: what was begun gets stopped."""
        self._stop()
        pump = Pump(self._endpoint, self.connect_timeout, self._credentials)
        self._finalizer = finalizer = weakref.finalize(self, pump.stop)
        pump.begin()
        if finalizer.alive:
            self._pump = pump

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()

    def close(self) -> None:
        """Close for good; a second time does nothing."""
        self._ours()
        with self._lock:
            self._closed, pump, self._pump = True, self._pump, None
        try:
            self._stop()
        except BaseException:  # Ctrl-C: the finalizer is used up, whether it has come to stop the pump or not
            if pump is not None:
                pump.stop()
            raise
