"""For tests of the broker's process: the real program, and raw peers that speak the wire over real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from loopmux import codec, wire
from loopmux.keys import Credentials
from loopmux.messages import Heartbeat, Hello, Register, ServedModel, Status, Submit, Welcome
from loopmux.sockets import use_keys
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import say
from waiting import wait_for

PATIENCE = 30.0
"""Seconds after which something that should happen at once counts as not happening: the machine may be busy."""
until = partial(wait_for, limit=PATIENCE)
BODY = codec.pack({"prompt": "hello"})


def plain(endpoint: str) -> socket.socket:
    """A connection by no library that tries again: it must succeed at once."""
    if endpoint.startswith("ipc://"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(endpoint.removeprefix("ipc://"))
        return made
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)))


class Peer:
    """A DEALER that says what the test tells it to, and remembers nothing."""

    def __init__(self, endpoint: str, credentials: Credentials | None = None, **options: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        settings = {"LINGER": 0, "IMMEDIATE": 1, "IPV6": 1, "RECONNECT_IVL": 50, "SNDTIMEO": int(1000 * PATIENCE)}
        for name, value in (settings | options).items():
            self.socket.setsockopt(getattr(zmq, name), value)
        use_keys(self.socket, credentials)
        self.socket.connect(endpoint)
        self.frames = 0
        """What came, in frames."""
        self._came: list[bytes] = []  # the next message last

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cut the connection without a word."""
        self.socket.close(0)
        self.context.term()

    def send(self, message: Message) -> None:
        self.raw(wire.to_bytes(message))

    def together(self, *messages: Message) -> None:
        """Send them in one frame."""
        self.raw(b"".join(map(wire.to_bytes, messages)))

    def raw(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, patience: float = PATIENCE) -> Message:
        if not self._came:
            assert self.socket.poll(int(1000 * patience)), "nothing came"
            self._came = wire.split(self.socket.recv())[::-1]
            self.frames += 1
        return wire.from_bytes(self._came.pop())

    def expect(self, kind: Kind, patience: float = PATIENCE) -> Message:
        """The next message of a kind; others before it are passed over."""
        deadline = time.monotonic() + patience
        while True:
            message = self.receive(max(deadline - time.monotonic(), 0.0))
            if message.kind is kind:
                return message

    def hello(self, instance: bytes | None = None) -> Welcome:
        route = codec.pack(Hello(wire.VERSIONS, instance or wire.new_id()))
        self.send(Message(Header(Kind.HELLO), route=route))
        return codec.unpack(Welcome, self.expect(Kind.WELCOME).route)

    def register(
        self,
        name: str = "w1",
        *,
        boot: bytes | None = None,
        slots: int = 4,
        models: tuple[str, ...] = ("m",),
        held: int = 0,
    ) -> Welcome:
        served = tuple(ServedModel(m, "f") for m in models)
        common = ("worker", name, boot or wire.new_id(), wire.VERSIONS)
        register = Register(*common, models=served, slots=slots, pid=os.getpid(), held=held)
        self.send(Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({})))
        return codec.unpack(Welcome, self.expect(Kind.WELCOME).route)

    def beat(self) -> None:
        self.send(Message(Header(Kind.HB), route=codec.pack(Heartbeat())))

    def submit(self, request: bytes, **route: Any) -> None:
        route.setdefault("model", "m")
        self.send(Message(Header(Kind.SUBMIT, request), codec.pack(Submit(**route)), BODY))

    def take(self) -> Message:
        """Take the next RUN and confirm it."""
        run = self.expect(Kind.RUN)
        self.send(say(Kind.RUNACK, run.header.request, attempt=run.header.attempt))
        return run

    def status(self) -> Status:
        self.send(say(Kind.STATUS, wire.new_id()))
        return codec.unpack(Status, self.expect(Kind.REPORT).body, codec.BODY_LIMITS)

    def alive(self) -> bool:
        """Whether the broker still answers."""
        self.send(say(Kind.PING))
        return self.expect(Kind.PONG).kind is Kind.PONG


@dataclass
class Process:
    """A running broker; ``process`` is the parent of the one that serves."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]

    @property
    def serving(self) -> int:
        """The process that said it is ready."""
        return int(self.ready["pid"])

    def line(self) -> dict[str, Any]:
        """The next line of its log."""
        assert self.process.stderr is not None
        found: dict[str, Any] = json.loads(self.process.stderr.readline())
        return found

    @property
    def clients(self) -> str:
        return str(self.ready["endpoints"][0])

    @property
    def workers(self) -> str:
        return str(self.ready["worker_endpoints"][0])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """End it by a signal: its exit code, and what it wrote after it was ready."""
        self.process.send_signal(number)
        _, written = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, written


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loopmux_broker", "--log-format", "json", *arguments]


@contextmanager
def broker(*arguments: str, descriptors: Sequence[int] = (), open_files: int | None = None) -> Iterator[Process]:
    """A broker process from its ready line until the end of the block, when it must end well.

    It may have ``open_files`` at most.
    """
    words = command(*arguments)
    if open_files is not None:
        words = ["sh", "-c", f'ulimit -n {open_files} && exec "$@"', "sh", *words]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, pass_fds=descriptors)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert '"ready"' in line, line + process.stderr.read()
        running = Process(process, json.loads(line))
        yield running
        if process.poll() is None:
            code, written = running.stop()
            assert code == 0, written
            assert "internal error" not in written
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def fails(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a broker that is not to start."""
    done = subprocess.run(command(*arguments), stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def settings(folder: Path, **values: Any) -> Path:
    """A configuration file; raw peers say nothing by themselves, so it takes long until their silence counts."""
    path = folder / "broker.yaml"
    path.write_text(json.dumps({"heartbeat": 60} | values))  # JSON is YAML
    return path
