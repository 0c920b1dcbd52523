"""A broker reduced to its socket: the test reads and writes every message itself."""

from __future__ import annotations

import time

import zmq

from loopmux.codec import pack, unpack
from loopmux.messages import Generate, Register, Run, Welcome
from loopmux.wire import VERSION, Header, Kind, Message, from_bytes, pack_tokens, split, to_bytes

PATIENCE = 30.0
"""Seconds after which a message that does not come is a failure; generous, the machine is shared."""
LOADING = 90.0
"""The same for a worker that imports torch first."""


class FakeBroker:
    """A ROUTER on an ipc endpoint with at most one worker."""

    def __init__(self, endpoint: str, epoch: bytes = b"e" * 8, heartbeat: float = 1.0) -> None:
        self.endpoint, self.epoch, self.heartbeat = endpoint, epoch, heartbeat
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in {zmq.ROUTER_MANDATORY: 1, zmq.LINGER: 0, zmq.HEARTBEAT_IVL: 1000}.items():
            self._router.setsockopt(option, value)
        self._router.bind(endpoint)
        self.peer = b""
        self._came: list[tuple[bytes, bytes]] = []  # peer and message, the next one last
        self.largest = 0
        """Most messages that came in one frame."""
        self.beats: list[Message] = []
        self.acknowledged: list[Header] = []
        self.registered: Register | None = None
        self._welcomed = (b"", b"")  # the connection and the REGISTER that were welcomed

    def close(self) -> None:
        self._router.close()
        self._context.term()

    def send(
        self,
        kind: Kind,
        request: bytes = bytes(16),
        *,
        route: object = None,
        body: object = None,
        raw: bytes | None = None,
        tokens: tuple[int, ...] = (),
        **header: int,
    ) -> None:
        message = Message(
            Header(kind, request, **header),
            route=pack(route) if route is not None else b"",
            body=raw if raw is not None else pack(body) if body is not None else b"",
            tokens=pack_tokens(tokens),
        )
        self._router.send_multipart([self.peer, to_bytes(message)])

    def receive(self, patience: float = PATIENCE) -> Message:
        """The next message but heartbeats (answered and noted), RUNACK (noted) and a repeated REGISTER (answered)."""
        deadline = time.monotonic() + patience
        while True:
            if not self._came:
                left = deadline - time.monotonic()
                assert self._router.poll(max(0, left * 1000)), "no message came"
                peer, frame = self._router.recv_multipart()
                self._came = [(peer, data) for data in reversed(split(frame))]
                self.largest = max(self.largest, len(self._came))
            self.peer, data = self._came.pop()
            message = from_bytes(data)
            if message.kind is Kind.HB:
                self.beats.append(message)
                self.send(Kind.PONG)
            elif message.kind is Kind.RUNACK:
                self.acknowledged.append(message.header)
            elif message.kind is Kind.REGISTER and self._welcomed == (self.peer, message.route):
                self._send_welcome(message)
            else:
                return message

    def expect(self, kind: Kind, patience: float = PATIENCE) -> Message:
        message = self.receive(patience)
        assert message.kind is kind, message
        return message

    def welcome(self, patience: float = PATIENCE) -> Register:
        """Wait for REGISTER and answer it."""
        self._welcomed = (b"", b"")
        message = self.expect(Kind.REGISTER, patience)
        self.registered, self._welcomed = unpack(Register, message.route), (self.peer, message.route)
        self._send_welcome(message)
        return self.registered

    def _send_welcome(self, register: Message) -> None:
        route = Welcome(VERSION, self.epoch, self.heartbeat, 2**20, 256)
        self.send(Kind.WELCOME, seq=register.header.seq, route=route)

    def run(
        self,
        request: bytes,
        generate: Generate,
        *,
        attempt: int = 1,
        prefix: tuple[int, ...] = (),
        model: str = "echo",
    ) -> None:
        """Send RUN."""
        self.send(Kind.RUN, request, route=Run(model), body=generate, tokens=prefix, attempt=attempt)

    def output(self, request: bytes) -> tuple[list[Message], Message]:
        """All TOK of a request up to its terminal, which is acknowledged."""
        tokens = []
        while (message := self.receive()).kind is Kind.TOK:
            tokens.append(message)
        self.send(Kind.ENDACK, request, attempt=message.header.attempt)
        return tokens, message
