"""A client written from docs/protocol.md alone, and its example: it imports nothing of Loopmux.

One thread, one socket, no queue of its own: a message that cannot be sent is dropped, since whatever wants an answer is
repeated. ``step`` does everything; an application calls it again and again. What takes a minute to be given up is never
given up here.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

VERSION = 3
HEADER = struct.Struct(">2sBBH16sIIHIII")
HELLO, WELCOME, PING, PONG, BYE = 1, 2, 3, 4, 5
SUBMIT, ATTACH, CREDIT, CANCEL = 16, 17, 18, 19
ACCEPTED, PHASE, TOK, END, ERROR, CANCELLED, EXPIRED, ENDACK = 32, 33, 48, 49, 50, 51, 52, 53
WHO, STATUS, REPORT = 66, 112, 113
TERMINALS = {END, ERROR, CANCELLED, EXPIRED}
NO_ID = bytes(16)
HELLO_AGAIN, AGAIN, GRACE, SAME_GAP, SILENT = 0.5, 1.0, 1.0, 0.25, 3


@dataclass
class Request:
    """What a client keeps of a request. ``paused`` is an application that takes nothing for now."""

    model: str
    body: bytes
    timeout: float
    id: bytes = field(default_factory=lambda: os.urandom(16))
    state: str = "new"
    text: str = ""
    received: int = 0
    consumed: int = 0
    ids: bytes = b""
    weights: dict[str, str] = field(default_factory=dict)
    limit: int = 0
    attempt: int = 0
    submitted: int = 0
    attached: bool = False
    quiet: bool = False
    paused: bool = False
    again_at: float = math.inf
    gap: tuple[int, float] = (-1, 0.0)
    early: tuple[int, int, bytes] | None = None
    outcome: tuple[int, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.timeout


class Client:
    """All requests of one application over one socket."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        options = {"SNDTIMEO": 0, "LINGER": 200, "RECONNECT_IVL": 50, "RECONNECT_IVL_MAX": 2000}
        for name, value in (options | {"HEARTBEAT_IVL": 500, "HEARTBEAT_TIMEOUT": 2500}).items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.connect(endpoint)
        self.instance, self.epoch, self.heartbeat, self.window = os.urandom(16), b"", 1.0, 1
        self.requests: dict[bytes, Request] = {}
        self.report: dict[str, Any] | None = None
        self.sent: Counter[int] = Counter()
        self.introduction = 0
        self.greet()

    def say(
        self,
        kind: int,
        id_: bytes = NO_ID,
        route: bytes = b"",
        body: bytes = b"",
        ids: bytes = b"",
        *,
        seq: int = 0,
        arg: int = 0,
        attempt: int = 0,
    ) -> None:
        lengths = len(route), len(ids) // 4, len(body)
        header = HEADER.pack(b"LM", VERSION, kind, 0, id_, seq, arg, attempt, *lengths)
        try:
            self.socket.send(header + route + ids + body)
            self.sent[kind] += 1
        except zmq.Again:
            pass

    # --- the connection

    def greet(self) -> None:
        self.ready, self.heard = False, time.monotonic()
        self.hello_at = self.heard + HELLO_AGAIN
        for request in self.requests.values():
            request.again_at = math.inf  # nothing but HELLO before WELCOME
        hello = msgpack.packb({"versions": [VERSION], "instance": self.instance})
        self.say(HELLO, NO_ID, hello, seq=self.introduction)

    def greet_anew(self) -> None:
        self.introduction += 1
        self.greet()

    def welcomed(self, welcome: dict[str, Any]) -> None:
        fresh = welcome["epoch"] != self.epoch
        if self.ready and not fresh:
            return
        self.ready, self.epoch = True, welcome["epoch"]
        self.heartbeat, self.window = welcome["heartbeat"], welcome["window"]
        self.ping_at = time.monotonic() + self.heartbeat
        for request in self.requests.values():
            if request.state == "cancelling":
                self.cancel(request)
            elif request.state == "new":
                self.submit(request)
            elif fresh:
                self.attach(request)
            elif request.state == "sent":
                self.submit(request)
            else:
                self.credit(request)

    def step(self) -> None:
        """Wait a moment, then handle what came and what is due."""
        self.socket.poll(10)
        while self.monitor.poll(0):
            self.monitor.recv_multipart()
            self.greet_anew()  # the connection is gone, or there is a new one
        while self.socket.poll(0):
            self.frame(self.socket.recv())
        now = time.monotonic()
        if not self.ready:
            if now >= self.hello_at:
                self.greet()
        elif now > self.heard + SILENT * self.heartbeat:
            self.greet_anew()
        elif now >= self.ping_at:
            self.ping_at = now + self.heartbeat
            self.say(PING)
        for request in list(self.requests.values()):
            self.due(request, now)

    def due(self, request: Request, now: float) -> None:
        if now >= request.deadline + GRACE and request.outcome is None:
            self.fail(request, "deadline")
        elif now >= request.again_at:
            self.cancel(request) if request.state == "cancelling" else self.submit(request)

    # --- what the client says of a request

    def start(self, model: str, timeout: float = 60.0, **generate: Any) -> Request:
        request = Request(model, msgpack.packb(generate), timeout)
        self.requests[request.id] = request
        if self.ready:
            self.submit(request)
        return request

    def submit(self, request: Request) -> None:
        """SUBMIT; ATTACH once this request had to be attached."""
        now = time.monotonic()
        request.state, request.again_at = "sent", now + AGAIN
        request.submitted += 1
        left = max(request.deadline - now, 0.001)
        route = msgpack.packb({"model": request.model, "timeout": left} | request.weights)
        request.limit = request.consumed + self.window
        if request.attached:
            position = {"seq": request.received, "arg": request.limit, "attempt": request.attempt}
            self.say(ATTACH, request.id, route, request.body, request.ids, **position)
        else:
            self.say(SUBMIT, request.id, route, request.body)

    def attach(self, request: Request) -> None:
        request.attached, request.early = True, None
        self.submit(request)

    def credit(self, request: Request) -> None:
        request.limit = request.consumed + self.window
        self.say(CREDIT, request.id, seq=request.limit, arg=request.received)

    def cancel(self, request: Request) -> None:
        if request.state == "new":
            self.over(request, CANCELLED, {"code": "cancelled"})
            return
        request.state, request.again_at = "cancelling", time.monotonic() + AGAIN
        if self.ready:
            self.say(CANCEL, request.id)

    def fail(self, request: Request, code: str) -> None:
        request.outcome = ERROR, {"code": code}
        self.cancel(request)

    def over(self, request: Request, kind: int, outcome: dict[str, Any]) -> None:
        request.outcome, request.state = request.outcome or (kind, outcome), "over"
        del self.requests[request.id]

    def take(self, request: Request) -> None:
        """The application takes everything that is here."""
        request.consumed = request.received
        if request.state == "open" and request.consumed + self.window - request.limit >= max(self.window // 2, 1):
            self.credit(request)

    # --- what the broker says

    def frame(self, data: bytes) -> None:
        """One message behind the other."""
        while data:
            _, _, kind, _, id_, seq, arg, attempt, *lengths = HEADER.unpack_from(data)
            ids_at = HEADER.size + lengths[0]
            body_at = ids_at + 4 * lengths[1]
            end = body_at + lengths[2]
            parts = data[HEADER.size : ids_at], data[ids_at:body_at], data[body_at:end]
            self.arrived(kind, id_, seq, arg, attempt, *parts)
            data = data[end:]

    def arrived(
        self, kind: int, id_: bytes, seq: int, arg: int, attempt: int, route: bytes, ids: bytes, body: bytes
    ) -> None:
        self.heard = time.monotonic()
        request = self.requests.get(id_)
        if request is not None:
            self.about(request, kind, seq, arg, attempt, body, ids)
        elif kind == WELCOME:
            if seq == self.introduction:
                self.welcomed(msgpack.unpackb(route))
        elif kind == WHO and id_ == NO_ID:
            self.greet_anew()
        elif kind == PONG:
            for each in self.requests.values():
                if each.state == "open" and each.quiet:
                    self.credit(each)
                each.quiet = True
        elif kind == REPORT:
            self.report = msgpack.unpackb(body)
        elif kind in TERMINALS and id_ != NO_ID:
            self.say(ENDACK, id_)

    def about(self, request: Request, kind: int, seq: int, arg: int, attempt: int, body: bytes, ids: bytes) -> None:
        if kind == WHO:
            if request.state != "cancelling":
                self.attach(request)
            return
        request.quiet, request.attempt = False, max(request.attempt, attempt)
        if request.state == "sent":
            request.state, request.again_at = "open", math.inf
        if kind == TOK:
            self.tokens(request, seq, arg, body, ids)
        elif kind in TERMINALS:
            self.terminal(request, kind, seq, body)

    def tokens(self, request: Request, seq: int, arg: int, body: bytes, ids: bytes) -> None:
        if request.state == "cancelling" or seq + arg <= request.received:
            return
        if seq > request.received:
            self.gap(request)
        elif seq < request.received or len(ids) != 4 * arg:
            self.fail(request, "protocol")
        else:
            request.received += arg
            request.ids += ids
            tok = msgpack.unpackb(body)
            request.text += tok.get("text", "")
            if "fingerprint" in tok:
                request.weights = {"fingerprint": tok["fingerprint"]}
            if not request.paused:
                self.take(request)
            if request.early is not None:
                self.terminal(request, *request.early)

    def gap(self, request: Request) -> None:
        position, asked = request.gap
        if position != request.received or time.monotonic() >= asked + SAME_GAP:
            request.gap = request.received, time.monotonic()
            self.credit(request)

    def terminal(self, request: Request, kind: int, seq: int, body: bytes) -> None:
        if request.state == "cancelling" or seq == request.received:
            self.over(request, kind, msgpack.unpackb(body))
            self.say(ENDACK, request.id)
            if kind == ERROR and request.submitted > 1:
                self.say(CANCEL, request.id)
        elif seq < request.received:
            self.fail(request, "protocol")
        else:
            request.early = kind, seq, body
            self.gap(request)

    # --- the application's side

    def until(self, condition: Callable[[], bool], within: float = 60.0) -> None:
        end = time.monotonic() + within
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            self.step()

    def finish(self, request: Request) -> tuple[int, dict[str, Any]]:
        self.until(lambda: request.state == "over")
        assert request.outcome is not None
        return request.outcome

    def status(self) -> dict[str, Any]:
        self.report, asked = None, -math.inf

        def answered() -> bool:
            nonlocal asked
            if self.ready and time.monotonic() >= asked + AGAIN:
                asked = time.monotonic()
                self.say(STATUS, os.urandom(16))
            return self.report is not None

        self.until(answered)
        assert self.report is not None
        return self.report

    def close(self) -> None:
        self.say(BYE)
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()
        self.context.term()
