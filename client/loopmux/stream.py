"""One request as the client sees it: submitted until somebody answers, output taken in order, one outcome.

A pure core: ``Exchange.handle(event, now)`` returns what to do. It does no I/O and reads no clock.

::

                              ┌───────────────────┐ another broker: SUBMITTED again, with the tokens that are here
                              ▼                   │
    WAITING ──connected──▶ SUBMITTED ──anything──▶ OPEN ──terminal──▶ DONE
       │                        └─────────┬──────────┘                  ▲
       │ deadline, cancel                 └─deadline, violation─▶ CLOSING (CANCEL until a terminal)
       └────────────────────────────────────────────────────────────────┘

The caller's outcome (``Finish`` or ``Fail``, exactly one) and the end of the conversation with the broker are two
things: a request that timed out here is cancelled there until the broker confirms.
"""

from __future__ import annotations

import dataclasses
import math
from enum import Enum, auto
from typing import assert_never

from loopmux import codec, wire
from loopmux.cadence import KEPT, RESEND
from loopmux.errors import (
    CancelledError,
    ConnectionLostError,
    DeadlineExceededError,
    LoopmuxError,
    PayloadTooLargeError,
    ProtocolError,
)
from loopmux.events import (
    Arrived,
    Attached,
    CancelAsked,
    Consumed,
    Deliver,
    Detached,
    Fail,
    Finish,
    Ponged,
    Refused,
    Request,
    RequestAction,
    RequestEvent,
    Send,
    TimePassed,
)
from loopmux.messages import End, Failure, Phase, Tok
from loopmux.results import ReasoningDelta, Result, StreamEvent, TextDelta, TokenLogprob, ToolCall, Waiting
from loopmux.wire import Header, Kind, Message

GRACE = 1.0
"""Seconds after the deadline that a reachable broker gets to say so itself, with usage; half of the promised two."""
PATIENCE = 2.0
"""Seconds that a cancelled request waits for the broker's word before its caller is told."""
GAP_PAUSE = 0.25
"""Seconds between two requests to resend from the same position: the chunks behind a lost one all show the gap."""


class Stage(Enum):
    """Where a request stands between client and broker."""

    WAITING = auto()
    SUBMITTED = auto()
    OPEN = auto()
    CLOSING = auto()
    DONE = auto()


class Exchange:
    """A request on its way. ``received`` counts tokens, ``stage`` says where it stands, ``due`` when time matters."""

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.born = now
        self.stage = Stage.WAITING
        self.received = 0
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._ids: list[int] = []
        self._calls: list[ToolCall] = []
        self._logprobs: list[TokenLogprob] = []
        self._window = 1
        self._limit = 0  # first index that the broker may not send yet
        self._consumed = 0
        self._reported = 0  # position up to which the reader was asked to report
        self._connected = False
        self._cancelling = False  # the broker is asked to cancel it, as in all of CLOSING
        self._attaching = False  # SUBMIT was sent to a broker that is gone
        self._fingerprint: str | None = None  # of the weights that the tokens came from
        self._attempt = 0  # the highest one that anything came from
        self._submitted = 0  # times
        self._quiet = False  # nothing came since the last PONG
        self._early: Message | None = None  # a terminal that came before the tokens it counts
        self._resend_at = math.inf
        self._idle_at = math.inf
        self._give_up_at = math.inf
        self._gap_asked = (-1, -math.inf)

    @property
    def due(self) -> float:
        """When ``TimePassed`` is to be handled next; infinity for never."""
        return min(self._resend_at, self._idle_at, self._give_up_at, self._expires_at())

    @property
    def text(self) -> str:
        """The text received so far."""
        return "".join(self._texts)

    def handle(self, event: RequestEvent, now: float) -> list[RequestAction]:
        """Take an event in and say what to do about it."""
        match event:
            case Arrived(message):
                return self._arrived(message, now)
            case Consumed(total=total):
                return self._consume(total)
            case TimePassed():
                return self._time_passed(now)
            case CancelAsked():
                return self._cancel(now)
            case Ponged():
                return self._ponged()
            case Attached():
                return self._attached(event, now)
            case Detached():
                self._connected = False
                self._resend_at = math.inf
                return []
            case Refused(error):
                return self._end(error)
            case _:
                assert_never(event)

    # --- the connection under it --------------------------------------------------------------------------------------

    def _attached(self, event: Attached, now: float) -> list[RequestAction]:
        self._connected, self._window = True, event.window
        if self._cancelling:
            # A broker that was started again may hear of the request from its worker: it has to be told too.
            self._resend_at = now + RESEND
            return [self._bare(Kind.CANCEL)]
        begins = self.stage is Stage.WAITING or event.fresh
        if begins and len(self.request.body) > event.max_body:
            size, limit = len(self.request.body), event.max_body
            return self._end(PayloadTooLargeError(f"the request has {size} bytes, this broker accepts {limit}"))
        if event.fresh and self.stage is not Stage.WAITING:
            return [self._reattach(now)]
        return [self._submit(now) if self.stage in (Stage.WAITING, Stage.SUBMITTED) else self._credit()]

    def _reattach(self, now: float) -> Send:
        """This broker does not know the request (any more): submit it with what is here, for others to go on."""
        self._early = None
        self._give_up_at = math.inf
        self._attaching = True
        return self._submit(now)

    def _submit(self, now: float) -> Send:
        self.stage = Stage.SUBMITTED
        self._submitted += 1
        self._resend_at = now + RESEND
        left = max(self.request.deadline - now, 0.001)  # the broker takes no time that is not positive
        submit = dataclasses.replace(self.request.submit, timeout=left, fingerprint=self._fingerprint)
        route = codec.pack(submit)
        self._limit = self._allowed()
        if not self._attaching:
            return Send(Message(Header(Kind.SUBMIT, self.request.id), route, self.request.body))
        header = Header(Kind.ATTACH, self.request.id, self.received, self._limit, self._attempt)
        return Send(Message(header, route, self.request.body, wire.pack_tokens(self._ids)))

    def _allowed(self) -> int:
        """The first index that the broker may not send, whatever window it has."""
        return min(self._consumed + self._window, wire.MOST_TOKENS)

    def _credit(self) -> Send:
        self._limit = self._allowed()
        return Send(Message(Header(Kind.CREDIT, self.request.id, seq=self._limit, arg=self.received)))

    def _bare(self, kind: Kind) -> Send:
        return Send(Message(Header(kind, self.request.id)))

    def _ponged(self) -> list[RequestAction]:
        repeat = self._quiet and self.stage is Stage.OPEN
        self._quiet = True
        return [self._credit()] if repeat else []

    # --- what the broker says -----------------------------------------------------------------------------------------

    def _arrived(self, message: Message, now: float) -> list[RequestAction]:
        if message.kind is Kind.WHO:
            return [] if self._cancelling else [self._reattach(now)]
        self._quiet = False
        self._attempt = max(self._attempt, message.header.attempt)
        if self.stage is Stage.SUBMITTED:
            self.stage = Stage.OPEN
            self._resend_at = self._resend_at if self._cancelling else math.inf
        try:
            match message.kind:
                case Kind.TOK:
                    return self._tokens(message, now)
                case Kind.ACCEPTED:
                    position = message.header.arg
                    return self._deliver(Waiting("queued", position)) if position else []
                case Kind.PHASE:
                    phase = codec.unpack(Phase, message.route)
                    return self._deliver(Waiting(phase.phase, phase.position, phase.elapsed, phase.detail))
                case kind if kind in wire.TERMINALS:
                    return self._terminal(message, now)
        except ProtocolError as error:
            return self._abort(error, now)
        return []

    def _tokens(self, message: Message, now: float) -> list[RequestAction]:
        start, count = message.header.seq, message.header.arg
        if self._settled or start + count <= self.received:
            return []
        if start > self.received:
            return self._ask_again(now)
        ids = wire.unpack_tokens(message.tokens)
        if start < self.received or len(ids) != count:
            raise ProtocolError(
                f"found a chunk of {len(ids)} tokens said to be {start} to {start + count - 1}, "
                f"expected one that starts at {self.received}"
            )
        tok = codec.unpack(Tok, message.body, codec.BODY_LIMITS)
        self._fingerprint = tok.fingerprint or self._fingerprint
        self.received += count
        self._texts.append(tok.text)
        self._reasoning.append(tok.reasoning)
        self._ids += ids
        self._calls += tok.calls
        self._logprobs += tok.logprobs
        self._restart_idle(now)
        return self._pass_on(tok, ids, start) + self._conclude_early(now)

    def _pass_on(self, tok: Tok, ids: list[int], start: int) -> list[RequestAction]:
        """Tokens go to the reader, or count as read at once when nobody reads along."""
        if self.request.collect:
            return self._consume(self.received) if self._report_due() else []
        report = self.received if self._report_due() else 0
        delta = TextDelta(tok.text, tuple(ids), start, tok.logprobs)
        thought = [ReasoningDelta(tok.reasoning)] if tok.reasoning else []
        deliveries: list[RequestAction] = [Deliver(self.request.id, one) for one in thought]
        deliveries.append(Deliver(self.request.id, delta, report))
        deliveries += [Deliver(self.request.id, call) for call in tok.calls]
        return deliveries

    def _report_due(self) -> bool:
        """Whether half a window came since the last report: then the reader's progress is worth a CREDIT."""
        if self.received - self._reported < self._window // 2:
            return False
        self._reported = self.received
        return True

    def _consume(self, total: int) -> list[RequestAction]:
        self._consumed = max(self._consumed, total)
        if self._settled or not self._connected or self._consumed + self._window <= self._limit:
            return []
        return [self._credit()]

    def _ask_again(self, now: float) -> list[RequestAction]:
        position, asked = self._gap_asked
        if not self._connected or (position == self.received and now < asked + GAP_PAUSE):
            return []
        self._gap_asked = (self.received, now)
        return [self._credit()]

    def _terminal(self, message: Message, now: float) -> list[RequestAction]:
        total = message.header.seq
        if self._cancelling or total == self.received:
            return self._conclude(message)
        if total < self.received:
            raise ProtocolError(f"the broker ended the request at {total} tokens after {self.received} had arrived")
        if self._early is None:
            self._early = message
            self._give_up_at = now + KEPT
        return self._ask_again(now)

    def _conclude_early(self, now: float) -> list[RequestAction]:
        """A terminal that overtook its tokens counts as soon as they are here."""
        if self._early is None or self._early.header.seq > self.received:
            return []
        return self._terminal(self._early, now)

    def _conclude(self, message: Message) -> list[RequestAction]:
        outcome = [] if self._settled else self._outcome(message)
        self.stage = Stage.DONE
        acknowledged = [self._bare(Kind.ENDACK)]
        if message.kind is Kind.ERROR and self._submitted > 1:
            # A refusal may have crossed the repeated SUBMIT, and that one may have been let in.
            acknowledged.append(self._bare(Kind.CANCEL))
        return [*acknowledged, *outcome]

    def _outcome(self, message: Message) -> list[RequestAction]:
        if message.kind is not Kind.END:
            return self._failed(codec.unpack(Failure, message.body, codec.BODY_LIMITS).error())
        if message.header.seq != self.received:
            return self._failed(CancelledError("the request was cancelled before all of its output was here"))
        end = codec.unpack(End, message.body, codec.BODY_LIMITS)
        usage = self._deliver(end.usage)
        return [*usage, Finish(self.request.id, self._result(end, message.header.attempt))]

    def _result(self, end: End, attempt: int) -> Result:
        return Result(
            text=self.text,
            token_ids=tuple(self._ids),
            finish_reason=end.finish_reason,
            usage=end.usage,
            timing=end.timing,
            model=end.model,
            adapter=end.adapter,
            worker=end.worker,
            request_id=self.request.id.hex(),
            tool_calls=tuple(self._calls),
            logprobs=tuple(self._logprobs),
            attempts=max(attempt, 1),
            reasoning="".join(self._reasoning),
        )

    def _deliver(self, event: StreamEvent) -> list[RequestAction]:
        return [] if self._settled or self.request.collect else [Deliver(self.request.id, event)]

    # --- the end ------------------------------------------------------------------------------------------------------

    @property
    def _settled(self) -> bool:
        """Whether the caller has an outcome."""
        return self.stage in (Stage.CLOSING, Stage.DONE)

    def _failed(self, error: LoopmuxError) -> list[RequestAction]:
        """The caller's outcome is this error; nothing if there was an outcome already."""
        if self._settled:
            return []
        error.request_id = self.request.id.hex()
        error.model = error.model or self.request.submit.model
        error.partial_text = self.text
        return [Fail(self.request.id, error)]

    def _end(self, error: LoopmuxError) -> list[RequestAction]:
        """It fails, and the broker need not be told."""
        failed = self._failed(error)
        self.stage = Stage.DONE
        return failed

    def _abort(self, error: LoopmuxError, now: float) -> list[RequestAction]:
        """It fails; the broker is told until it confirms, unless it never heard of the request."""
        if self.stage is Stage.WAITING:
            return self._end(error)
        failed = self._failed(error)
        self.stage, self._idle_at = Stage.CLOSING, math.inf
        return failed + self._call_off(KEPT, now)

    def _cancel(self, now: float) -> list[RequestAction]:
        if self._cancelling:
            return []
        if self.stage is Stage.WAITING:
            return self._end(CancelledError("the request was cancelled before it was sent"))
        return self._call_off(PATIENCE, now)

    def _call_off(self, patience: float, now: float) -> list[RequestAction]:
        """Ask the broker to cancel it, again and again for as long as there is patience."""
        self._cancelling = True
        self._give_up_at = now + patience
        self._resend_at = now + RESEND if self._connected else math.inf
        return [self._bare(Kind.CANCEL)] if self._connected else []

    # --- time ---------------------------------------------------------------------------------------------------------

    def _expires_at(self) -> float:
        if self._settled:
            return math.inf
        asked = self._connected and self.stage is not Stage.WAITING
        return self.request.deadline + (GRACE if asked else 0.0)

    def _restart_idle(self, now: float) -> None:
        if self.request.idle_timeout is not None:
            self._idle_at = now + self.request.idle_timeout

    def _time_passed(self, now: float) -> list[RequestAction]:
        if now >= self._expires_at():
            return self._abort(DeadlineExceededError(self._late()), now)
        if now >= self._idle_at:
            return self._idle(now)
        if now >= self._give_up_at:
            return self._give_up(now)
        if now < self._resend_at:
            return []
        if self._cancelling:
            self._resend_at = now + RESEND
            return [self._bare(Kind.CANCEL)]
        return [self._submit(now)]

    def _late(self) -> str:
        stage = "no broker had taken it yet" if self.stage is Stage.WAITING else f"{self.received} tokens had arrived"
        return f"the deadline of {self.request.submit.timeout:g} s passed; {stage}"

    def _idle(self, now: float) -> list[RequestAction]:
        self._restart_idle(now)
        if self.received >= self._limit:  # it is the reader who does not take what is there
            return []
        quiet = f"no token came for {self.request.idle_timeout:g} s after {self.received} tokens"
        return self._abort(DeadlineExceededError(f"{quiet} (idle_timeout)"), now)

    def _give_up(self, now: float) -> list[RequestAction]:
        """The broker had its time: to confirm a cancellation, or to send the tokens that its terminal counts."""
        self._give_up_at = math.inf
        if self._settled:
            self.stage = Stage.DONE
            return []
        if self._cancelling or self._early is None:
            return self._abort(CancelledError("the request was cancelled"), now)
        missing = f"{self._early.header.seq - self.received} tokens at the end of the output were lost"
        return self._abort(ConnectionLostError(missing), now)
