"""The two ends around whatever is measured in the middle: an echo worker, and callers over wire or HTTP.

Both do nothing but speak: a request names how many chunks it wants, the worker sends as many and the end.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import zmq

from loopmux import codec, keys, sockets, wire
from loopmux.cadence import HEARTBEAT
from loopmux.keys import Credentials
from loopmux.messages import End, Hello, Register, ServedModel, Submit, Tok, Welcome
from loopmux.results import Timing, Usage
from loopmux.wire import Header, Kind, Message
from loopmux_loadtest.stopping import Again

CHUNK = 8
"""Tokens of one TOK: what a worker sends at most at once (docs/protocol.md)."""
TEXT = "some words of text, as eight tokens are "
SLOTS = 1024
"""Requests that the worker takes at once: nothing is to queue."""
PATIENCE = 20.0
"""Seconds without any message after which the benchmark gives up."""

_WINDOW = 1024
"""Tokens that a caller allows a stream to be ahead."""
_TOK_BODY = codec.pack(Tok(TEXT))
_IDS = wire.pack_tokens(list(range(CHUNK)))
_END_BODY = codec.pack(End("stop", Usage(10, 10), Timing(), "echo", "bench"))
_ROUTE = codec.pack(Submit("echo"))


# --- the worker's side: a process of its own --------------------------------------------------------------------------


@dataclass
class Job:
    """What one request still wants: chunks, each of ``width`` tokens, for the ``peer`` of a ROUTER."""

    peer: bytes | None
    header: Header
    chunks: int
    width: int
    sent: int = 0


@dataclass
class Echo:
    """Answers RUN (of a broker) or SUBMIT (of a caller) with as many chunks as the body asks for.

    With ``routed`` a frame in front of each message says whom the answer is for.
    """

    socket: zmq.Socket[bytes]
    routed: bool
    jobs: dict[bytes, Job] = field(default_factory=dict)
    said: dict[bytes | None, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    pace: float = 0.0

    def serve(self) -> None:
        """Run until killed. Streams take turns, so that many are under way at once."""
        beat = time.monotonic()
        while True:
            if self.jobs or self.socket.poll(200):
                self._take()
            if time.monotonic() > beat + 0.5:
                beat = time.monotonic()
                if not self.routed:  # the other end is a broker
                    self._send(None, Message(Header(Kind.HB), route=codec.pack({})))
            for job in list(self.jobs.values()):
                self._step(job)
                if self.pace:
                    self._flush()
                    _sleep_exactly(self.pace)
            self._flush()

    def _take(self) -> None:
        while (frame := sockets.receive(self.socket)) is not None:
            peer, frame = (frame, self.socket.recv()) if self.routed else (None, frame)
            for data in wire.split(frame):
                self._receive(peer, data)

    def _receive(self, peer: bytes | None, data: bytes) -> None:
        message = wire.from_bytes(data)
        if message.kind not in (Kind.RUN, Kind.SUBMIT):
            return
        wish = codec.decode(message.body, codec.ROUTE_LIMITS)
        self.jobs[message.header.request] = Job(peer, message.header, wish["chunks"], wish["width"])
        self.pace = 1 / wish["rate"] if wish["rate"] else 0.0

    def _step(self, job: Job) -> None:
        request, attempt = job.header.request, job.header.attempt
        position = job.sent * job.width
        if job.sent < job.chunks:
            header = Header(Kind.TOK, request, position, job.width, attempt)
            self._send(job.peer, Message(header, body=_TOK_BODY, tokens=_IDS[: 4 * job.width]))
            job.sent += 1
            if job.sent < job.chunks:
                return
            position += job.width
        self._send(job.peer, Message(Header(Kind.END, request, position, attempt=attempt), body=_END_BODY))
        del self.jobs[request]

    def _send(self, peer: bytes | None, message: Message) -> None:
        self.said[peer].append(wire.to_bytes(message))

    def _flush(self) -> None:
        """Send what was said in this turn, as a worker does: in as few frames as it takes."""
        for peer, messages in self.said.items():
            for frame, _ in wire.frames(messages):
                sockets.send(self.socket, frame, peer)
        self.said.clear()


def _sleep_exactly(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(left / 2 if left > 0.0002 else 0)


def work(endpoint: str, how: str) -> None:
    """Be the worker: ``direct`` to callers, ``behind`` something that only passes on, or ``joined`` to a broker."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    worker = context.socket(zmq.ROUTER if how == "direct" else zmq.DEALER)
    worker.setsockopt(zmq.SNDHWM, 100_000)
    worker.setsockopt(zmq.RCVHWM, 100_000)
    if how == "direct":
        worker.bind(endpoint)
    else:
        sockets.use_keys(worker, keys.credentials(endpoint))
        worker.connect(endpoint)
    if how == "joined":
        served = (ServedModel("echo", "f"),)
        register = Register("worker", "bench", wire.new_id(), wire.VERSIONS, models=served, slots=SLOTS)
        worker.send(wire.to_bytes(Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({}))))
        worker.recv()
        print("ready", file=sys.stderr, flush=True)
    Echo(worker, how != "joined").serve()


# --- the callers' side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Took:
    """What a run took: seconds in all, seconds of each request, chunks that came."""

    seconds: float
    latencies: list[float]
    chunks: int


class Callers(Protocol):
    """Connections with requests under way on each."""

    def run(self, again: Again, chunks: int, *, at_once: int) -> Took:
        """Requests of so many chunks, ``at_once`` of them under way, spread over the connections."""

    def close(self) -> None:
        """Let the connections go."""


class WireCallers:
    """Callers as DEALERs; ``introduce`` to a broker, which then gets credit, acknowledgements and heartbeats too."""

    def __init__(
        self, endpoint: str, connections: int, *, introduce: bool, credentials: Credentials | None = None
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 2 * connections + 100)
        self._introduce = introduce
        self._begun: dict[bytes, float] = {}
        self._epoll = select.epoll()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._said: list[bytes] = []
        for _ in range(connections):
            caller = self._context.socket(zmq.DEALER)
            caller.setsockopt(zmq.LINGER, 0)
            caller.setsockopt(zmq.RCVHWM, 100_000)
            sockets.use_keys(caller, credentials)
            caller.connect(endpoint)
            self._sockets[caller.FD] = caller
            self._epoll.register(caller.FD, select.EPOLLIN)
        self._beat_at = 0.0
        if introduce:
            self._greet()

    def _greet(self) -> None:
        for caller in self._sockets.values():
            hello = Message(Header(Kind.HELLO), route=codec.pack(Hello(wire.VERSIONS, wire.new_id())))
            caller.send(wire.to_bytes(hello))
        for caller in self._sockets.values():
            if not caller.poll(int(1000 * PATIENCE)):
                raise SystemExit("no broker answers")
            codec.unpack(Welcome, wire.from_bytes(caller.recv()).route)
        self._beat_at = time.perf_counter() + HEARTBEAT

    def run(self, again: Again, chunks: int, *, at_once: int, width: int = CHUNK, rate: int = 0) -> Took:
        """See ``Callers``; ``width`` tokens a chunk, ``rate`` of them a second or as fast as it goes."""
        body = codec.pack({"chunks": chunks, "width": width, "rate": rate})
        begun, latencies, came = time.perf_counter(), list[float](), 0
        callers = itertools.cycle(self._sockets.values())
        started = [caller for _, caller in zip(range(at_once), callers, strict=False) if again()]
        for caller in started:
            self._submit(body)
            self._flush(caller)
        ready = list(self._sockets)  # what came while others were asked is not announced again
        while self._begun:
            unannounced = list[int]()
            for descriptor in ready:
                caller = self._sockets[descriptor]
                for header in _headers(caller):
                    if header.kind is Kind.TOK:
                        came += 1
                        self._credit(header)
                    elif header.kind is Kind.END:
                        begun_at = self._begun.pop(header.request, None)
                        self._say(Kind.ENDACK, header.request)
                        if begun_at is None:
                            continue  # said again, because ENDACK took long
                        latencies.append(time.perf_counter() - begun_at)
                        if again():
                            self._submit(body)
                    elif header.kind in wire.TERMINALS or header.kind is Kind.WHO:
                        raise SystemExit(f"the broker says {header.kind.name}: a request or this caller is lost")
                if self._said:
                    self._flush(caller)
                    if sockets.readable(caller):  # sending takes in what would have been announced
                        unannounced.append(descriptor)
            ready = unannounced or (self._wait() if self._begun else [])
        return Took(time.perf_counter() - begun, latencies, came)

    def _submit(self, body: bytes) -> None:
        request = wire.new_id()
        self._begun[request] = time.perf_counter()
        self._said.append(wire.to_bytes(Message(Header(Kind.SUBMIT, request), _ROUTE, body)))

    def _credit(self, header: Header) -> None:
        received = header.seq + header.arg
        if received % (_WINDOW // 2) < header.arg:  # as the client does: when half the window was used
            self._say(Kind.CREDIT, header.request, received + _WINDOW, received)

    def _say(self, kind: Kind, request: bytes, seq: int = 0, arg: int = 0) -> None:
        if self._introduce:
            self._said.append(wire.to_bytes(Message(Header(kind, request, seq, arg))))

    def _flush(self, caller: zmq.Socket[bytes]) -> None:
        """Send what was said in this turn, as a client does: in as few frames as it takes."""
        for frame, _ in wire.frames(self._said):
            sockets.send(caller, frame)
        self._said.clear()

    def _wait(self) -> list[int]:
        """The connections on which something came; now and then it is said that the callers are there."""
        if time.perf_counter() > self._beat_at:
            self._beat_at = time.perf_counter() + HEARTBEAT
            for caller in self._sockets.values():
                self._say(Kind.PING, wire.NO_ID)
                self._flush(caller)
            return list(self._sockets)  # as there
        ready = [descriptor for descriptor, _ in self._epoll.poll(PATIENCE)]
        if not ready:
            raise SystemExit(f"nothing came for {PATIENCE:.0f} s: the broker or the worker is gone")
        return ready

    def close(self) -> None:
        """Let the connections go."""
        self._epoll.close()
        self._context.destroy(0)


def _headers(caller: zmq.Socket[bytes]) -> Iterator[Header]:
    while (frame := sockets.receive(caller)) is not None:
        for data in wire.split(frame):
            yield wire.from_bytes(data).header


@dataclass
class _Line:
    """One HTTP connection, and what of the present answer came and was not taken yet."""

    socket: socket.socket
    came: bytes = b""
    begun: float = 0.0

    def ask(self, request: bytes) -> None:
        """Send the next request."""
        self.came, self.begun = b"", time.perf_counter()
        self.socket.sendall(request)

    def read(self) -> None:
        """Take in what has arrived."""
        first = not self.came
        self.came += self.socket.recv(1 << 16)
        if first and not self.came.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server answered {self.came[:200]!r}")

    def take_events(self) -> int:
        """Take out each server-sent event that is whole, as a reader gets them, and count them."""
        *whole, rest = self.came.split(b"\n\n")
        self.came = rest or b"\n"  # never empty, as before an answer
        return sum(b"data: " in piece for piece in whole)

    def ended(self, *, streamed: bool) -> bool:
        """Whether the answer is complete."""
        head, _, body = self.came.partition(b"\r\n\r\n")
        at = -1 if streamed else head.lower().find(b"content-length:")
        if at < 0:
            return self.came.endswith(b"\r\n0\r\n\r\n")
        return len(body) >= int(head[at + 15 :].split(b"\r", 1)[0])


class HttpCallers:
    """Callers over HTTP/1.1: kept connections, requests encoded once, answers read no further than they must be.

    A chunk is a server-sent event with the text and the token ids that a TOK has, counted when it has come.
    """

    def __init__(self, port: int, connections: int) -> None:
        self._lines: dict[int, _Line] = {}
        self._epoll = select.epoll()
        for _ in range(connections):
            line = socket.create_connection(("127.0.0.1", port), PATIENCE)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines[line.fileno()] = _Line(line)
            self._epoll.register(line, select.EPOLLIN)

    def run(self, again: Again, chunks: int, *, at_once: int) -> Took:
        """See ``Callers``; a request without chunks is answered whole."""
        text = json.dumps({"text": TEXT, "token_ids": list(range(CHUNK))}) if chunks else TEXT
        body = json.dumps({"text": text, "chunks": chunks}).encode()
        head = f"POST /{'stream' if chunks else 'echo'} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        begun, latencies, came, busy = time.perf_counter(), list[float](), 0, 0
        for _, line in zip(range(at_once), self._lines.values(), strict=False):
            busy += self._ask(line, request, again)
        while busy:
            ready = self._epoll.poll(PATIENCE)
            if not ready:
                raise SystemExit(f"nothing came for {PATIENCE:.0f} s: the server is gone")
            for descriptor, _ in ready:
                line = self._lines[descriptor]
                line.read()
                if chunks:
                    came += line.take_events()
                if line.ended(streamed=bool(chunks)):
                    latencies.append(time.perf_counter() - line.begun)
                    busy -= not self._ask(line, request, again)
        return Took(time.perf_counter() - begun, latencies, came)

    def _ask(self, line: _Line, request: bytes, again: Again) -> bool:
        if not again():
            return False
        line.ask(request)
        return True

    def close(self) -> None:
        """Let the connections go."""
        self._epoll.close()
        for line in self._lines.values():
            line.socket.close()


if __name__ == "__main__":
    work(*sys.argv[1:])
