"""The worker's shell: one DEALER to the broker, the session core, the engine's thread."""

from __future__ import annotations

import math
import os
import platform
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

import zmq

import loopmux
from loopmux.errors import AuthError, EngineError, LoopmuxError, ProtocolError
from loopmux.keys import Credentials
from loopmux.messages import Register, WorkerSpec
from loopmux.pulse import Pulse
from loopmux.sockets import Dealer, new_context
from loopmux.wire import CLIENT_BODY_LIMIT, VERSIONS, foreign, from_bytes, message_limit, new_id, to_bytes
from loopmux_worker import logs
from loopmux_worker.driver import Driver
from loopmux_worker.engine.base import Description, Engine, fitting
from loopmux_worker.events import (
    STOP_WITHIN,
    Action,
    Adapt,
    Asked,
    Cancel,
    Connected,
    Disconnected,
    Event,
    Hint,
    Leave,
    Received,
    Send,
    Submit,
    Unsend,
    Woke,
)
from loopmux_worker.joining import described
from loopmux_worker.session import Session

_PER_TURN = 64
"""Messages read per turn of the loop, so that a flood cannot keep output from going out."""
_LONGEST_POLL = 5.0
"""Seconds between two signs of life, whatever interval the broker asks for."""
_ALONE = 1.0
"""Seconds without a broker after which a worker counts as ready all the same: it serves as soon as there is one."""
_PATHS = 4096
"""Bytes of the module search path that are told."""
_ENGINE_STOP = 1.0
"""Seconds that the engine has to end its step; with the farewell this stays within the 2 s that a stop may take."""


def registration(spec: WorkerSpec, description: Description, boot: bytes) -> Register:
    """How this worker introduces itself.

    Raises:
        ConfigError: it serves more than fits into the message.
    """
    register = Register(
        role="worker",
        name=spec.name,
        boot=boot,
        versions=VERSIONS,
        host=platform.node(),
        pid=os.getpid(),
        software=f"loopmux {loopmux.__version__}",
    )
    return described(register, description)


class Worker:
    """Serves a broker with an engine until it is told to leave.

    ``run`` blocks in the calling thread, which does all I/O; ``stop`` may be called from anywhere, signal handlers
    included. Use it as a context manager: leaving the block closes socket, engine and threads.

    Args:
        engine: handed over.
        pulse: beats with every turn of the loop in ``run``; nobody looks at the default.
    """

    def __init__(
        self, spec: WorkerSpec, engine: Engine, pulse: Pulse | None = None, credentials: Credentials | None = None
    ) -> None:
        description = engine.describe()
        register = registration(spec, description, new_id())
        self._session = Session(register, _about_process() | description.report, time.monotonic())
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._driver = Driver(engine, self._wake)
        self._context = new_context(spec.endpoint)
        # whatever a client may ask travels on
        self._dealer = Dealer(self._context, message_limit(CLIENT_BODY_LIMIT), credentials)
        self._endpoint = spec.endpoint
        self._said: list[Send] = []
        self._unsent: deque[bytes] = deque()
        self._asked: deque[float] = deque()
        self._left: Leave | None = None
        self._pulse = pulse or Pulse()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def run(self, joined: Callable[[], None] = lambda: None) -> None:
        """Serve until asked to leave.

        Args:
            joined: called once: when the broker knows this worker, or when none has answered for a while.

        Raises:
            LoopmuxError: the broker refused this worker (or, an AuthError, its key), is of another release, or ended it
                because its engine hangs, or the engine's thread died.
        """
        self._driver.start()
        self._dealer.connect(self._endpoint)
        poller = zmq.Poller()
        poller.register(self._dealer.monitor, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        alone = time.monotonic() + _ALONE
        said = False
        while self._left is None:
            self._pulse.beat()
            if not said and (self._session.welcomed or time.monotonic() >= alone):
                joined()
                said = True
            left = self._session.next_timer() - time.monotonic()  # once a turn: every request is asked
            if left <= 0:
                self._handle(Woke())
            self._flush()
            blocked = self._unsent and self._dealer.connected
            poller.register(self._dealer.socket, zmq.POLLIN | (zmq.POLLOUT if blocked else 0))
            self._turn({source for source, _ in poller.poll(max(0, math.ceil(min(left, _LONGEST_POLL) * 1000)))})
        self._flush()
        if self._left.error is not None:
            raise self._left.error

    @property
    def bell(self) -> int:
        """A file descriptor: a byte written there wakes ``run``."""
        return self._bell.fileno()

    def stop(self, within: float = STOP_WITHIN) -> None:
        """Let what runs end or go on elsewhere, say goodbye to the broker and have ``run`` return; twice: at once.

        Args:
            within: seconds; a second call with fewer has it hurry, any other one have it leave.
        """
        self._asked.append(within)
        self._wake()

    def close(self) -> bool:
        """Release everything; False if the engine is in a step that did not end in time."""
        ended = self._driver.stop(_ENGINE_STOP)
        self._dealer.close()
        self._context.term()
        if ended:  # else its thread may still ring
            self._bell.close()
        self._ear.close()
        return ended

    def _turn(self, readable: set[object]) -> None:
        logs.pass_on()
        if self._ear.fileno() in readable:
            self._ear.recv(4096)
        if self._dealer.monitor in readable:
            while (connected := self._dealer.news()) is not None:
                self._handle(Connected() if connected else Disconnected())
            if self._dealer.barred:
                raise AuthError(self._dealer.barred)
        if self._dealer.socket in readable:
            for data in self._dealer.arrived(_PER_TURN):
                self._take(data)
        if isinstance(self._driver.died, LoopmuxError):
            raise self._driver.died
        if self._driver.died is not None:
            raise EngineError(f"the engine's thread died: {self._driver.died!r}") from self._driver.died
        if not self._session.full:  # else the engine waits when its own queue is full too
            for event in self._driver.drain():
                self._handle(event)
        while self._asked:
            self._handle(Asked(self._asked.popleft()))

    def _handle(self, event: Event) -> None:
        if self._left is not None:
            return
        try:
            actions = self._session.handle(event, time.monotonic())
        except ProtocolError as error:
            logs.warning("malformed message from the broker", error=error.message)
            return
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Send():
                self._said.append(action)
            case Unsend():
                self._said.clear()
                self._unsent.clear()
            case Submit() | Cancel() | Hint() | Adapt():
                if self._said:
                    self._flush()  # RUNACK leaves before the request begins, which may be its worker's end
                self._driver.put(action)
            case Leave():
                self._left = action

    def _flush(self) -> None:
        """Send what was said, behind what waits; what the connection does not take and is to last waits on."""
        taken = 0
        if not self._unsent:
            taken = self._dealer.send(to_bytes(send.message) for send in self._said)
        self._unsent.extend(to_bytes(send.message) for send in self._said[taken:] if send.lasting)
        self._said.clear()
        for _ in range(self._dealer.send(self._unsent)):
            self._unsent.popleft()

    def _take(self, data: bytes) -> None:
        try:
            message = from_bytes(data)
        except ProtocolError as error:
            if foreign(data) and not self._session.welcomed:
                self._left = Leave(error)  # a broker of another release, to which REGISTER says nothing
            else:
                logs.warning("malformed message from the broker", error=error.message)
        else:
            self._handle(Received(message))

    def _wake(self) -> None:
        try:
            self._bell.send(b"!")
        except BlockingIOError:
            pass  # it is full of unheard rings, so the loop is about to wake anyway


def _about_process() -> dict[str, object]:
    """Which Python this is and where it looks for packages: how ``status`` shows that environments are apart."""
    executable, prefix = (os.fsencode(path).decode(errors="replace") for path in (sys.executable, sys.prefix))
    return {
        "python": platform.python_version(),
        "executable": executable,
        "prefix": prefix,
        "sys_path": fitting(sys.path, _PATHS),
    }
