"""One connection to a broker, shared by many requests: what it means to each of them who is there, and what to repeat.

A pure core: ``Connection.handle(event, now)`` returns what to do. It does no I/O and reads no clock; the sync and the
asyncio client are two shells around it.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import assert_never

from loopmux import codec, wire
from loopmux.cadence import RESEND
from loopmux.errors import (
    AuthError,
    CancelledError,
    ConnectionLostError,
    LoopmuxError,
    OverloadedError,
    ProtocolError,
)
from loopmux.events import (
    Action,
    Answer,
    Arrived,
    Asked,
    Attached,
    Barred,
    CancelAsked,
    Closed,
    Connected,
    ConnectionEvent,
    Consumed,
    Detached,
    Disconnected,
    Fail,
    Hinted,
    Introduce,
    Ponged,
    Received,
    Refused,
    Request,
    RequestEvent,
    Send,
    Submitted,
    TimePassed,
)
from loopmux.messages import Done, Failure, Hello, Status, Welcome
from loopmux.presence import Presence, State
from loopmux.stream import Exchange, Stage
from loopmux.wire import Header, Kind, Message

MOST_WAITING, MOST_BYTES = 10_000, 128 * 1024 * 1024
"""Requests, and bytes of them, that a client keeps while no broker has taken them. By its defaults a broker queues no
more requests and holds no more bytes of one client: it would refuse what is beyond."""
_STALE_TIMERS = 64
"""Timers of ended requests that may lie in the heap before it is swept."""


@dataclass(slots=True)
class _Question:
    asked: Asked
    deadline: float
    resend_at: float = math.inf

    def ask(self, now: float) -> Send:
        """Put it to the broker, and again in a while."""
        self.resend_at = now + RESEND
        return Send(Message(Header(self.asked.kind, self.asked.id), self.asked.route))


class Connection:
    """All requests of one client over one socket.

    ``instance`` (16 bytes) names the client over its reconnections. ``connect_timeout``, seconds, bounds the wait for a
    broker that never answered; once one did, requests wait for its return within their deadline. ``malformed`` counts
    messages that were dropped.
    """

    def __init__(self, endpoint: str, instance: bytes, connect_timeout: float, software: str = "") -> None:
        self._endpoint = endpoint
        self._hello = codec.pack(Hello(wire.VERSIONS, instance, software))
        self._connect_timeout = connect_timeout
        self._presence = Presence(f"the broker at {endpoint}")
        self.malformed = 0
        self._welcome: Welcome | None = None
        self._exchanges: dict[bytes, Exchange] = {}
        self._untaken: set[bytes] = set()  # those that no broker has said anything of
        self._untaken_bytes = 0
        self._questions: dict[bytes, _Question] = {}
        self._timers: list[tuple[float, bytes]] = []
        self._armed: dict[bytes, float] = {}  # the earliest timer of each request that is in the heap

    @property
    def state(self) -> State:
        """What is known about the broker."""
        return self._presence.state

    def handle(self, event: ConnectionEvent, now: float) -> list[Action]:
        """Take an event in and say what to do about it."""
        self._presence.turn(now)
        match event:
            case Received(data):
                return self._received(data, now)
            case CancelAsked(id_) if id_ in self._questions:
                del self._questions[id_]
                return []
            case Consumed(request) | CancelAsked(request):
                return self._tell(request, event, now)
            case TimePassed():
                return self._time_passed(now)
            case Submitted(request):
                return self._submitted(request, now)
            case Asked():
                return self._asked(event, now)
            case Hinted(hint):
                session = Send(Message(Header(Kind.SESSION), codec.pack(hint)))
                return [session] if self.state is State.READY else []  # a hint to nobody helps nobody
            case Disconnected():
                return self._lose(now)
            case Connected():
                return self._greet(now) if self.state is State.GREETING else []
            case Barred(reason):
                return self._refuse(AuthError(reason))
            case Closed():
                return self._closed(now)
            case _:
                assert_never(event)

    def next_timer(self) -> float:
        """When ``TimePassed`` is to be handled next; infinity for never."""
        requests = self._timers[0][0] if self._timers else math.inf
        asked = self._questions.values()
        questions = min(min(q.deadline, q.resend_at) for q in asked) if asked else math.inf
        return min(requests, questions, self._presence.next_timer(), self._unreachable_at())

    # --- callers ------------------------------------------------------------------------------------------------------

    def _submitted(self, request: Request, now: float) -> list[Action]:
        if (error := self._crowded(request)) is not None:
            return [Fail(request.id, error)]
        exchange = self._exchanges[request.id] = Exchange(request, now)
        if self.state is State.READY and self._welcome is not None:
            return self._tell(request.id, _attached(self._welcome, fresh=False), now)
        self._follow(exchange)
        return self._greet(now) if self.state is State.IDLE else []

    def _crowded(self, request: Request) -> OverloadedError | None:
        """Why a request is not kept until a broker takes it."""
        waiting, held, size = len(self._untaken), self._untaken_bytes, len(request.body)
        if waiting < MOST_WAITING and held + size <= MOST_BYTES:
            return None
        found = f"{waiting} requests of {held} bytes wait for the broker at {self._endpoint}, and this one has {size}"
        kept = f"a client keeps at most {MOST_WAITING} of {MOST_BYTES} bytes"
        return OverloadedError(
            f"{found}; {kept}: try again later, or see with `loopmux status` whether the broker answers",
            request_id=request.id.hex(),
            model=request.submit.model,
            retry_after=RESEND,
        )

    def _asked(self, event: Asked, now: float) -> list[Action]:
        question = self._questions[event.id] = _Question(event, event.deadline)
        if self.state is State.IDLE:
            return self._greet(now)
        return [self._put(question, now)] if self.state is State.READY else []

    def _put(self, question: _Question, now: float) -> Send:
        """Ask a broker that is there; from the first time on it has the time that the answer may take."""
        if question.asked.patience and question.deadline == question.asked.deadline:
            question.deadline = now + question.asked.patience
        return question.ask(now)

    def _closed(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for request, exchange in list(self._exchanges.items()):
            if exchange.stage is not Stage.WAITING:  # else nobody has heard of it
                actions += self._tell(request, CancelAsked(request), now)
            actions += self._tell(request, Refused(CancelledError("the client was closed")), now)
        actions += [Fail(id_, CancelledError("the client was closed")) for id_ in self._questions]
        self._questions.clear()
        self._timers.clear()
        if self.state is State.READY:
            actions.append(Send(Message(Header(Kind.BYE))))
        self._presence.enter(State.CLOSED)
        return actions

    # --- requests -----------------------------------------------------------------------------------------------------

    def _tell(self, request: bytes, event: RequestEvent, now: float) -> list[Action]:
        exchange = self._exchanges.get(request)
        if exchange is None:
            return []
        actions: list[Action] = [*exchange.handle(event, now)]
        self._follow(exchange)
        return actions

    def _tell_all(self, event: RequestEvent, now: float) -> list[Action]:
        return [action for request in list(self._exchanges) for action in self._tell(request, event, now)]

    def _follow(self, exchange: Exchange) -> None:
        """Forget an ended request; see to it that a live one is woken when it is due."""
        id_ = exchange.request.id
        self._count(exchange)
        if exchange.stage is Stage.DONE:
            del self._exchanges[id_]
            self._armed.pop(id_, None)
            self._sweep()
        elif exchange.due < self._armed.get(id_, math.inf):
            self._armed[id_] = exchange.due
            heapq.heappush(self._timers, (exchange.due, id_))

    def _count(self, exchange: Exchange) -> None:
        """Note whether a request still waits for a broker to take it."""
        id_, waits = exchange.request.id, exchange.stage in (Stage.WAITING, Stage.SUBMITTED)
        if waits and id_ not in self._untaken:
            self._untaken.add(id_)
            self._untaken_bytes += len(exchange.request.body)
        elif not waits and id_ in self._untaken:
            self._untaken.remove(id_)
            self._untaken_bytes -= len(exchange.request.body)

    def _sweep(self) -> None:
        if len(self._timers) > _STALE_TIMERS + 4 * len(self._exchanges):
            self._timers = [(due, id_) for due, id_ in self._timers if self._armed.get(id_) == due]
            heapq.heapify(self._timers)

    def _wake_due(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._timers and self._timers[0][0] <= now:
            due, id_ = heapq.heappop(self._timers)
            if self._armed.get(id_) == due:
                del self._armed[id_]
                actions += self._tell(id_, TimePassed(), now)
        return actions

    # --- what the broker says -----------------------------------------------------------------------------------------

    def _received(self, data: bytes, now: float) -> list[Action]:
        try:
            message = wire.from_bytes(data)
            self._presence.heard = now
            if message.header.request in self._exchanges:
                return self._tell(message.header.request, Arrived(message), now)
            return self._about_connection(message, now)
        except ProtocolError as error:
            self.malformed += 1  # whatever it was to be, its sender repeats it or the request's deadline ends the wait
            if self.state is State.GREETING and wire.foreign(data):
                return self._refuse(error)  # a broker of another release, to which HELLO says nothing
            return []

    def _about_connection(self, message: Message, now: float) -> list[Action]:
        match message.kind:
            case Kind.PONG:
                return self._tell_all(Ponged(), now)
            case Kind.WHO if self.state is State.READY and message.header.request == wire.NO_ID:
                return self._lose(now)
            case Kind.REPORT | Kind.DONE if message.header.request in self._questions:
                return self._reported(message)
            case Kind.ERROR if message.header.request in self._questions:
                return self._rejected(message)
            case Kind.WELCOME | Kind.ERROR if message.header.request == wire.NO_ID:
                return self._answered(self._presence.answered(message, now), now)
            case kind if kind in wire.TERMINALS:  # our ENDACK was lost
                return [Send(Message(Header(Kind.ENDACK, message.header.request)))]
        return []

    def _reported(self, message: Message) -> list[Action]:
        id_ = message.header.request
        del self._questions[id_]
        try:
            answer: type[Status | Done] = Status if message.kind is Kind.REPORT else Done
            return [Answer(id_, codec.unpack(answer, message.body, codec.BODY_LIMITS))]
        except ProtocolError as error:
            return [Fail(id_, error)]

    def _rejected(self, message: Message) -> list[Action]:
        error = _error(message)
        del self._questions[message.header.request]
        return [Fail(message.header.request, error)]

    def _answered(self, answer: Welcome | LoopmuxError | None, now: float) -> list[Action]:
        if not isinstance(answer, Welcome):
            return [] if answer is None else self._refuse(answer)
        known, self._welcome = self._welcome, answer
        fresh = known is None or known.epoch != answer.epoch
        actions = self._tell_all(_attached(answer, fresh=fresh), now)
        actions += [self._put(question, now) for question in self._questions.values()]
        return actions

    def _refuse(self, error: LoopmuxError) -> list[Action]:
        """Nobody will serve what waits now; the next request tries anew."""
        self._presence.enter(State.IDLE)
        actions: list[Action] = [Fail(id_, error) for id_ in self._questions]
        self._questions.clear()
        for request in list(self._exchanges):
            actions += self._tell(request, Refused(_again(error)), self._presence.heard)
        return actions

    # --- presence -----------------------------------------------------------------------------------------------------

    def _greet(self, now: float) -> list[Action]:
        self._presence.introduce()
        return self._speak(now)

    def _speak(self, now: float) -> list[Action]:
        if not self._presence.speaks(now):
            return []
        if self._presence.ready:
            return [Send(Message(Header(Kind.PING)))]
        return [Introduce(Message(Header(Kind.HELLO, seq=self._presence.introduction), self._hello))]

    def _lose(self, now: float) -> list[Action]:
        """HELLO is the first that goes over the next connection."""
        if not self._presence.disconnected():
            return []
        for question in self._questions.values():
            question.resend_at = math.inf
        return [*self._tell_all(Detached(), now), *self._speak(now)]

    def _unreachable_at(self) -> float:
        if self._welcome is not None or self.state is not State.GREETING or not self._exchanges:
            return math.inf
        return next(iter(self._exchanges.values())).born + self._connect_timeout  # the oldest comes first

    def _nobody(self) -> ConnectionLostError:
        return ConnectionLostError(
            f"no broker answers at {self._endpoint} (waited {self._connect_timeout:g} s): start one with `loopmux up`, "
            "or set $LOOPMUX_ENDPOINT to where one listens"
        )

    def _unanswered(self, question: _Question) -> ConnectionLostError:
        waited = question.asked.patience or self._connect_timeout
        return ConnectionLostError(
            f"the broker at {self._endpoint} did not answer {question.asked.kind.name} (waited {waited:g} s): see "
            "whether it runs with `loopmux status`, and try again"
        )

    def _time_passed(self, now: float) -> list[Action]:
        actions = self._lose(now) if self._presence.silent(now) else self._speak(now)
        while self._unreachable_at() <= now:
            oldest = next(iter(self._exchanges))
            actions += self._tell(oldest, Refused(self._nobody()), now)
        actions += self._wake_due(now)
        actions += self._ask_again(now)
        if self.state is State.GREETING and self._welcome is None and not self._exchanges and not self._questions:
            self._presence.enter(State.IDLE)
        return actions

    def _ask_again(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for id_, question in list(self._questions.items()):
            if now >= question.deadline:
                del self._questions[id_]
                actions.append(Fail(id_, self._nobody() if self._welcome is None else self._unanswered(question)))
            elif now >= question.resend_at:
                actions.append(question.ask(now))
        return actions


def _error(message: Message) -> LoopmuxError:
    return codec.unpack(Failure, message.body, codec.BODY_LIMITS).error()


def _attached(welcome: Welcome, *, fresh: bool) -> Attached:
    return Attached(welcome.window, welcome.max_body, fresh)


def _again(error: LoopmuxError) -> LoopmuxError:
    """A copy of an error that several callers get: each notes its own request on it."""
    return type(error)(error.message, retryable=error.retryable, retry_after=error.retry_after)
