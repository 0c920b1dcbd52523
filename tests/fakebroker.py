"""A broker for client tests: a real ROUTER that speaks the wire, with behaviour that a test can choose per model.

Not a mock of the client's parts: everything goes through real sockets. What it lacks is workers, queues and recovery.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import zmq

from loopmux import codec, wire
from loopmux.messages import End, Failure, Generate, ModelStatus, Status, Submit, Tok, Welcome
from loopmux.results import Timing, Usage
from loopmux.wire import Header, Kind, Message, pack_tokens
from waiting import wait_for

CHUNK = 4
PATIENCE = 30.0
"""Seconds after which something that should happen at once counts as not happening: the machine may be busy."""
wait_until = partial(wait_for, limit=PATIENCE)


@dataclass
class _Live:
    """A request: what it wants, how far it may go and how far it went."""

    model: str
    total: int
    credit: int
    sent: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Seen:
    """A message that arrived, and from which connection."""

    peer: bytes
    message: Message


def text_of(index: int) -> str:
    """The text of the token at an index."""
    return f"w{index} "


def whole_text(total: int) -> str:
    """The text of a whole answer."""
    return "".join(text_of(i) for i in range(total))


@dataclass
class FakeBroker:
    """Answers every SUBMIT with ``max_new_tokens`` tokens, credit permitting, unless the model's name says otherwise.

    ``hang`` one chunk and no more; ``mute`` nothing at all; ``overloaded`` an error; ``garbage`` an undecodable chunk.
    """

    endpoint: str
    window: int = 64
    heartbeat: float = 0.2
    epoch: bytes = b"epoch--1"
    loses: Callable[[Message], bool] = lambda message: False
    """Which of the messages to clients are to be lost on the way."""
    seen: list[Seen] = field(default_factory=list)
    frames: list[list[Kind]] = field(default_factory=list)
    """What came in one frame each time."""

    def __post_init__(self) -> None:
        self.live: dict[bytes, _Live] = {}
        self.peers: set[bytes] = set()
        self._news = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stop = False
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.SNDHWM, 0)  # nothing is lost but what ``loses`` says
        self._router.bind(self.endpoint)
        self.endpoint = self._router.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0")
        self._thread = threading.Thread(target=self._run, name="fakebroker")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once, as if killed."""
        self._stop = True
        self._thread.join()

    def count(self, kind: Kind) -> int:
        """How many messages of a kind came."""
        return sum(s.message.kind is kind for s in list(self.seen))

    def wait_for(self, kind: Kind, times: int = 1, within: float = PATIENCE) -> Message:
        """Wait until so many messages of a kind came; the last of them."""
        with self._news:
            if not self._news.wait_for(lambda: self.count(kind) >= times, within):
                raise AssertionError(f"{self.count(kind)} × {kind.name} within {within} s, expected {times}")
        return [s.message for s in self.seen if s.message.kind is kind][times - 1]

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        while not self._stop:
            poller.poll(20)
            while self._router.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                peer, frame = self._router.recv_multipart()
                messages = [wire.from_bytes(data) for data in wire.split(frame)]
                self.frames.append([message.kind for message in messages])
                for message in messages:
                    self._answer(peer, message)
                    with self._news:
                        self.seen.append(Seen(peer, message))
                        self._news.notify_all()
        self._router.close()
        self._context.term()

    def _send(self, peer: bytes, message: Message) -> None:
        if not self.loses(message):
            self._router.send_multipart([peer, wire.to_bytes(message)])

    def _answer(self, peer: bytes, message: Message) -> None:
        id_ = message.header.request
        if message.kind is Kind.HELLO:
            self.peers.add(peer)
            welcome = Welcome(wire.VERSION, self.epoch, self.heartbeat, wire.CLIENT_BODY_LIMIT, self.window)
            self._send(peer, Message(Header(Kind.WELCOME, seq=message.header.seq), codec.pack(welcome)))
        elif peer not in self.peers:
            self._send(peer, Message(Header(Kind.WHO)))
        elif message.kind is Kind.PING:
            self._send(peer, Message(Header(Kind.PONG)))
        elif message.kind is Kind.STATUS:
            models = (ModelStatus("echo", "ready", 1),)
            status = Status(self.epoch, 1.0, "fake", 1, len(self.peers), 0, len(self.live), models)
            self._send(peer, Message(Header(Kind.REPORT, id_), body=codec.pack(status)))
        elif message.kind in (Kind.SUBMIT, Kind.ATTACH):
            self._submitted(peer, message)
        elif message.kind is Kind.ENDACK:
            self.live.pop(id_, None)
        elif id_ in self.live and message.kind is Kind.CREDIT:
            self._credited(peer, self.live[id_], message)
        elif message.kind is Kind.CANCEL:
            total = self.live[id_].sent if id_ in self.live else 0
            failure = codec.pack(Failure("cancelled", "cancelled as asked"))
            self._send(peer, Message(Header(Kind.CANCELLED, id_, seq=total), body=failure))

    def _submitted(self, peer: bytes, message: Message) -> None:
        id_, model = message.header.request, codec.unpack(Submit, message.route).model
        wanted = codec.unpack(Generate, message.body, codec.BODY_LIMITS).max_new_tokens
        if model == "mute" or id_ in self.live:
            return
        received = message.header.seq  # 0 in SUBMIT
        self.live[id_] = _Live(model, wanted, received + self.window, received)
        self._send(peer, Message(Header(Kind.ACCEPTED, id_)))
        if model == "overloaded":
            failure = Failure("overloaded", "the queue is full", retryable=True, retry_after=1.5)
            self._send(peer, Message(Header(Kind.ERROR, id_), body=codec.pack(failure)))
        elif model == "garbage":
            self._send(peer, Message(Header(Kind.TOK, id_, seq=0, arg=1), body=b"\xc1", tokens=pack_tokens([1])))
        else:
            self._advance(peer, id_)

    def _credited(self, peer: bytes, live: _Live, message: Message) -> None:
        if message.header.seq > live.credit:
            live.credit = message.header.seq
        else:  # nothing new is allowed, so something is missing
            live.sent, live.ended = message.header.arg, False
        self._advance(peer, message.header.request)

    def _advance(self, peer: bytes, id_: bytes) -> None:
        live = self.live[id_]
        stop = min(live.total, live.credit) if live.model != "hang" else CHUNK
        while live.sent < stop:
            ids = list(range(live.sent, min(live.sent + CHUNK, stop)))
            tok = codec.pack(Tok("".join(map(text_of, ids))))
            self._send(peer, Message(Header(Kind.TOK, id_, ids[0], len(ids), 1), body=tok, tokens=pack_tokens(ids)))
            live.sent = ids[-1] + 1
        if live.sent == live.total and live.model != "hang" and not live.ended:
            live.ended = True
            end = End("length", Usage(3, live.total), Timing(0.0, 0.001, 0.002), live.model, "fake-worker")
            self._send(peer, Message(Header(Kind.END, id_, seq=live.total, attempt=1), body=codec.pack(end)))
