"""The worker's side of the wire. Pure: ``handle(event, now)`` returns what is to be done; nothing here does it.

States of the connection: *introducing* (REGISTER goes out until WELCOME comes) and *welcomed*. While introducing,
requests go on and their output is kept. With every WELCOME, whether of the same broker process or of another, the
worker says what it has (HELD), and sends nothing of a request until the broker asks for it (REPLAY) or drops it
(RESET): only the broker knows whether the request is still this worker's, and what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loopmux.cadence import KEPT, RESEND
from loopmux.codec import BODY_LIMITS, pack, shorten, unpack
from loopmux.errors import BadRequestError, ConfigError, EngineError, LoopmuxError, ProtocolError
from loopmux.messages import (
    AdapterOrder,
    Done,
    End,
    Failure,
    Generate,
    Heartbeat,
    Held,
    Register,
    Run,
    SessionHint,
    Welcome,
)
from loopmux.presence import Presence
from loopmux.results import Usage
from loopmux.wire import Header, Kind, Message, StopReason, unpack_tokens
from loopmux_worker.engine.base import Failed, Finished, Job, Key, Load, Output, Produced
from loopmux_worker.events import (
    Action,
    Adapt,
    Adapted,
    Asked,
    Cancel,
    Cancelled,
    Connected,
    Disconnected,
    Event,
    Hint,
    Leave,
    Received,
    Send,
    Stepped,
    Submit,
    Unsend,
    Woke,
)
from loopmux_worker.joining import described
from loopmux_worker.keeping import OutputStream

DEADLINE_GRACE = 1.0
"""Seconds that the broker is given to stop a request at its deadline before the worker does."""
BUFFER = 64 * 1024 * 1024
"""Bytes of output that are kept while no broker takes them; then the engine has to wait, but not long for one that is
there and does not know whether it wants them."""
ACKNOWLEDGE_WITHIN = 0.05
"""Seconds until RUNACK of a first attempt, unless output goes out before and says as much; far below ``RESEND``."""
_REASON = 2000
"""Bytes of a reason in DONE, which the broker reads."""
_MESSAGE = 64 * 1024
"""Bytes of the message of an error; a worker may send sixteen times as many."""


@dataclass(slots=True)
class _Request:
    """A request that this worker runs, or has run and is not rid of yet."""

    stream: OutputStream
    run: Run
    deadline: float
    epoch: bytes  # of the broker that last wanted it of this worker
    acknowledge_at: float = math.inf
    stopping: str | None = None  # the error code that the end is to carry once the engine let go
    offered: bool = False  # HELD was said, and the broker has not said yet what it wants of it
    asked: bool = False  # by the broker, which then gets CANCELLED; a deadline that the worker noticed is an ERROR


class Session:
    """What a worker knows of its broker and of the requests it runs for it.

    Args:
        register: how the worker introduces itself.
        report: what ``status`` shows of it.
        now: seconds on a clock that never goes back.
    """

    def __init__(self, register: Register, report: dict[str, Any], now: float) -> None:
        self._register, self._report = register, report
        self._name = register.name
        self._adapting: set[bytes] = set()  # operations that the engine is at
        self._requests: dict[Key, _Request] = {}
        self._load = Load(0, 0, 0)
        self._tokens = 0  # since the last heartbeat
        self._presence = Presence()
        self._presence.introduce()
        self._last_beat = now
        self._lost_since = now
        self._offer_at = now
        # These are infinity until it is asked to leave.
        self._leave_at = math.inf
        self._drain_at = math.inf
        self._signalled = math.inf  # until when a signal has given it time

    # --- what happened ------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in and return what is to be done, in order.

        Raises:
            ProtocolError: a message's contents are malformed; it changed nothing.
        """
        self._presence.turn(now)
        actions = self._handle(event, now)
        if self._leave_at < math.inf and not self._requests and not isinstance(event, Asked):
            actions += self._goodbye()
        return actions

    def _handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Received(message):
                self._presence.heard = now
                return self._received(message, now)
            case Connected():
                self._presence.introduce()
                return self._speak(now)
            case Disconnected():
                self._lost(now)
                return [Unsend()]
            case Stepped(outputs, load):
                self._load = load
                return [action for output in outputs for action in self._output(output, now)]
            case Cancelled(key, usage):
                return self._cancelled(key, usage, now)
            case Adapted():
                return self._adapted(event, now)
            case Asked(within):
                return self._asked(within, now)
            case Woke():
                return self._woke(now)

    def next_timer(self) -> float:
        """When to send ``Woke``."""
        times, welcomed = [self._presence.next_timer(), self._leave_at, self._drain_at], self.welcomed
        if not welcomed:
            times += [self._lost_since + KEPT] if self._requests else []
        elif any(request.offered for request in self._requests.values()):
            times.append(self._offer_at)
        for request in self._requests.values():
            # While the broker is away, output waits: only what expires needs the clock.
            if welcomed and not request.offered:
                times += (request.stream.due(), request.acknowledge_at)
            if request.stopping is None and request.stream.terminal is None:
                times.append(request.deadline)
        return min(times)

    @property
    def welcomed(self) -> bool:
        """Whether the broker knows this worker."""
        return self._presence.ready

    @property
    def requests(self) -> int:
        """Requests that run, or whose end is not acknowledged."""
        return len(self._requests)

    @property
    def full(self) -> bool:
        """Whether so much output waits for a broker that the engine is to wait too."""
        return sum(r.stream.held for r in self._requests.values() if not self._flows(r)) > BUFFER

    def _flows(self, request: _Request) -> bool:
        """Whether a request's output may be sent as it comes."""
        return self._presence.ready and not request.offered

    # --- the connection -----------------------------------------------------------------------------------------------

    def _received(self, message: Message, now: float) -> list[Action]:
        header = message.header
        match header.kind:
            case Kind.WELCOME | Kind.ERROR:
                return self._answered(self._presence.answered(message, now), now)
            case Kind.WHO if self.welcomed:  # else REGISTER is on its way, behind what this one answers
                self._lost(now)
                return self._speak(now)
            case Kind.RUN if self.welcomed:
                return self._run(message, now)
            case Kind.STOP:
                return self._stop(header, now)
            case Kind.RESET:
                return self._drop(Key(header.request, header.attempt))
            case Kind.REPLAY:
                return self._replay(header, now)
            case Kind.TOKACK:
                for request in self._meant(header):
                    request.stream.acknowledge(header.arg)
            case Kind.ENDACK:
                for request in self._meant(header):
                    if request.stream.terminal is not None:
                        del self._requests[request.stream.key]
            case Kind.SESSION:
                return [Hint(unpack(SessionHint, message.route))]
            case Kind.DRAIN:
                return self._leave_within(header.arg / 1000, now)
            case Kind.LOAD | Kind.UNLOAD if self.welcomed:
                return self._adapt(message)
            case Kind.DIE:
                return [Leave(EngineError("the broker found that its engine does not get on, and had it end"))]
            case _:
                pass  # PONG says that the broker is there, which was noted; other kinds are of a newer release
        return []

    def _meant(self, header: Header) -> list[_Request]:
        """The request that an acknowledgement is about; without an attempt (0) all attempts of it."""
        if header.attempt:
            request = self._requests.get(Key(header.request, header.attempt))
            return [request] if request else []
        return [request for key, request in self._requests.items() if key.request == header.request]

    def _speak(self, now: float) -> list[Action]:
        if not self._presence.speaks(now):
            return []
        if self.welcomed:
            return [self._beat(now)]
        self._forget_stopped()
        register = replace(self._register, held=len(self._requests))
        # It goes before all else, and waits for room where what the last connection left behind fills the socket.
        header = Header(Kind.REGISTER, seq=self._presence.introduction)
        return [Unsend(), Send(Message(header, pack(register), pack(self._report)))]

    def _lost(self, now: float) -> None:
        """Nothing but REGISTER goes out until the broker answers; output is kept."""
        if self._presence.disconnected():
            self._lost_since = now

    def _answered(self, answer: Welcome | LoopmuxError | None, now: float) -> list[Action]:
        if answer is None:
            return []
        if not isinstance(answer, Welcome):
            return [Leave(ProtocolError(f"the broker refused this worker: {answer.message}"))]
        self._last_beat = now
        self._forget_stopped()
        for request in self._requests.values():
            request.offered = True
        return self._offer(now)

    def _forget_stopped(self) -> None:
        """What a broker has stopped must not be offered: one that takes it up would take the end of it for its end.

        A broker that still waits for that end says STOP again.
        """
        for key in [key for key, request in self._requests.items() if request.asked]:
            del self._requests[key]

    def _offer(self, now: float) -> list[Action]:
        """Say what is here and may be nobody's, until the broker has said of each what it wants."""
        self._offer_at = now + RESEND
        return [self._held(request) for request in self._requests.values() if request.offered]

    def _held(self, request: _Request) -> Action:
        stream, run = request.stream, request.run
        header = Header(Kind.HELD, stream.key.request, stream.start, stream.end, stream.key.attempt)
        held = Held(run.client, run.model, run.adapter, request.epoch)
        return Send(Message(header, route=pack(held)), lasting=False)

    def _give_up_the_largest(self) -> list[Action]:
        """What the broker does not claim must not keep the engine waiting: others run here, whom it does."""
        given_up: list[Action] = []
        while self.full:
            offered = [request.stream for request in self._requests.values() if request.offered]
            key = max(offered, key=lambda stream: stream.held).key
            given_up += [*self._drop(key), _not_here(key)]
        return given_up

    def _replay(self, header: Header, now: float) -> list[Action]:
        request = self._requests.get(Key(header.request, header.attempt))
        if request is None:
            return self._unless_stale([_not_here(Key(header.request, header.attempt))])
        self._wanted(request)
        request.stream.acknowledge(header.arg)
        return self._send(request, request.stream.resend(header.seq, now))

    def _wanted(self, request: _Request) -> None:
        """The present broker wants it of this worker."""
        request.offered, request.epoch = False, self._presence.epoch

    def _asked(self, within: float, now: float) -> list[Action]:
        """Leave once nothing runs here any more; at once when that is so, or a signal was in as much hurry before."""
        leave_at = now + within
        if self._signalled <= leave_at or not self.welcomed or not self._requests:
            return self._goodbye()
        self._signalled = leave_at
        return self._leave_within(within, now)

    def _leave_within(self, within: float, now: float) -> list[Action]:
        """Take nothing more. Where an administrator wants that, the broker says it until it hears DRAIN itself."""
        self._leave_at = min(now + within, self._leave_at)
        return [self._drain(now)]

    def _drain(self, now: float) -> Action:
        left = max(self._leave_at - now, 0.0)
        self._drain_at = now + RESEND
        return Send(Message(Header(Kind.DRAIN, arg=round(1000 * left))), lasting=False)

    def _goodbye(self) -> list[Action]:
        return [Send(Message(Header(Kind.BYE)), lasting=False), Leave()]

    def _forget_all(self) -> list[Action]:
        cancels: list[Action] = [Cancel(key) for key, r in self._requests.items() if r.stream.terminal is None]
        self._requests.clear()
        return cancels

    # --- requests -----------------------------------------------------------------------------------------------------

    def _run(self, message: Message, now: float) -> list[Action]:
        header = message.header
        key = Key(header.request, header.attempt)
        prefix = tuple(unpack_tokens(message.tokens))
        known = self._requests.get(key)
        if known is not None and not known.offered:
            return [_acknowledged(known)]
        if known is not None and known.stream.start == len(prefix):  # a new broker asks for what is here already
            self._wanted(known)
            return [_acknowledged(known), *self._send(known, known.stream.resend(len(prefix), now))]
        if known is not None:  # numbered alike by two brokers that did not know of each other: another number, please
            return [*self._drop(key), _not_here(key)]
        epoch, acknowledge_at = self._presence.epoch, now + ACKNOWLEDGE_WITHIN
        request = _Request(OutputStream(key, len(prefix)), Run(model=""), math.inf, epoch, acknowledge_at)
        self._requests[key] = request
        try:
            request.run = run = unpack(Run, message.route)
            request.stream.fingerprint = self._register.fingerprint(run.model, run.adapter)
            request.deadline = now + request.run.timeout + DEADLINE_GRACE
            generate = unpack(Generate, message.body, BODY_LIMITS)
        except ProtocolError as error:
            refusal = BadRequestError(f"the request cannot be read: {error.message}")
            return self._fail(request, refusal, Usage(), now)
        # Where a worker was lost before, the broker judges by this whether the next one is lost by the request.
        acknowledged = [_acknowledged(request)] if key.attempt > 1 else []
        return [*acknowledged, Submit(Job(key, request.run, generate, prefix, now))]

    def _stop(self, header: Header, now: float) -> list[Action]:
        key = Key(header.request, header.attempt)
        request = self._requests.get(key)
        code = "deadline" if header.arg == StopReason.DEADLINE else "cancelled"
        if request is None:
            # Forgotten, or never here: the broker asks until it hears an end for this attempt
            unknown = Failure(code, "this worker does not run the request", worker=self._name)
            terminal = Header(Kind.CANCELLED, header.request, attempt=header.attempt)
            return self._unless_stale([Send(Message(terminal, body=pack(unknown)))])
        request.offered = False
        if request.stream.terminal is not None:
            return self._send(request, request.stream.terminal_again(now))  # who stops a request wants no output of it
        request.asked = True
        if request.stopping is not None:
            return []
        request.stopping = code
        return [Cancel(key)]

    def _unless_stale(self, answer: list[Action]) -> list[Action]:
        """The answer to what was asked before the broker knew this worker as it is now: behind REGISTER it might be
        taken for one about an attempt that is given out since.
        """
        return answer if self.welcomed else []

    def _drop(self, key: Key) -> list[Action]:
        request = self._requests.pop(key, None)
        return [Cancel(key)] if request is not None and request.stream.terminal is None else []

    def _cancelled(self, key: Key, usage: Usage | None, now: float) -> list[Action]:
        request = self._requests.get(key)
        if request is None or request.stream.terminal is not None or request.stopping is None:
            return []
        late = request.stopping == "deadline"
        text = "the deadline passed while the request ran" if late else "the request was cancelled"
        failure = Failure(request.stopping, text, model=request.run.model, worker=self._name, usage=usage or Usage())
        return self._finish(request, Kind.CANCELLED if request.asked else Kind.ERROR, failure, now)

    def _output(self, output: Output, now: float) -> list[Action]:
        request = self._requests.get(output.key)
        if request is None or request.stream.terminal is not None:
            return []  # dropped meanwhile; the engine hears of it by the Cancel that is on its way
        match output:
            case Produced():
                self._tokens += len(output.ids)
                return self._guarded(request, lambda: request.stream.add(output, now), now)
            case Failed():
                return self._fail(request, output.error, output.usage, now)
            case Finished():
                run = request.run
                end = End(output.reason, output.usage, output.timing, run.model, self._name, run.adapter)
                if output.total != request.stream.end:
                    found = f"the engine ended at {output.total} tokens after producing {request.stream.end}"
                    return self._fail(request, EngineError(found), output.usage, now)
                return self._finish(request, Kind.END, end, now)

    def _fail(self, request: _Request, error: LoopmuxError, usage: Usage, now: float) -> list[Action]:
        failure = Failure(
            error.code,
            shorten(error.message, _MESSAGE),  # what cannot be sent must not fail to be reported
            error.retryable,
            request.run.model or None,
            self._name,
            error.retry_after,
            usage,
        )
        return self._finish(request, Kind.ERROR, failure, now)

    def _finish(self, request: _Request, kind: Kind, body: End | Failure, now: float) -> list[Action]:
        return self._guarded(request, lambda: request.stream.finish(kind, pack(body), now), now)

    def _guarded(self, request: _Request, make: Callable[[], list[Message]], now: float) -> list[Action]:
        """The messages that ``make`` returns; output that cannot be sent ends its request with the reason."""
        try:
            return self._send(request, make())
        except (EngineError, ProtocolError) as error:
            failed = EngineError(error.message)
            return [Cancel(request.stream.key), *self._fail(request, failed, Usage(), now)]

    def _send(self, request: _Request, messages: list[Message]) -> list[Action]:
        if not messages or not self._flows(request):
            return []
        request.acknowledge_at = math.inf
        return [Send(message) for message in messages]

    # --- adapters -----------------------------------------------------------------------------------------------------

    def _adapt(self, message: Message) -> list[Action]:
        id_ = message.header.request
        if id_ in self._adapting:
            return []
        order = unpack(AdapterOrder, message.route)
        self._adapting.add(id_)
        return [Adapt(id_, order, message.kind is Kind.LOAD)]

    def _adapted(self, event: Adapted, now: float) -> list[Action]:
        """Tell the broker. Where it is away, REGISTER says what is served, and it asks again for what it wants."""
        self._adapting.discard(event.id)
        error, done, undo = event.error, Done(), list[Action]()
        if event.description is not None:
            try:
                self._register = described(self._register, event.description)
            except ConfigError as too_many:  # it cannot be announced, so nobody could ever use it
                error, undo = too_many, [Adapt(event.id, event.order, load=False)]
            else:
                self._report = self._report | event.description.report
                done = self._serves(event.order.name)
        if error is not None:
            reason = shorten(error.message, _REASON)
            done = Done(Failure(error.code, reason, error.retryable, event.order.model or None, self._name))
        if self.welcomed:
            return [*undo, Send(Message(Header(Kind.DONE, event.id), body=pack(done)))]
        self._lost(now)  # REGISTER may be on its way, and says what was served before
        return undo

    def _serves(self, name: str) -> Done:
        """DONE for a model that is served, or no longer."""
        served = next((model for model in self._register.models if model.id == name), None)
        contents = self._report.get("adapters")
        return Done(content=str(contents.get(name, "")) if isinstance(contents, dict) else "", served=served)

    # --- the clock ----------------------------------------------------------------------------------------------------

    def _woke(self, now: float) -> list[Action]:
        if self._presence.silent(now):
            self._lost(now)
        actions = self._speak(now)
        if not self.welcomed and now >= self._lost_since + KEPT:
            actions += self._forget_all()
        if self.welcomed and now >= self._offer_at:
            actions += self._give_up_the_largest()
            actions += self._offer(now)
        if now >= self._leave_at:
            return [*actions, *self._goodbye()]
        if now >= self._drain_at:
            actions.append(self._drain(now))
        for request in list(self._requests.values()):
            actions += self._tick(request, now)
        return actions

    def _tick(self, request: _Request, now: float) -> list[Action]:
        if self.welcomed and request.stream.expired(now):
            del self._requests[request.stream.key]
            return []
        if request.stream.terminal is None and request.stopping is None and now >= request.deadline:
            request.stopping = "deadline"
            return [Cancel(request.stream.key)]
        if not self._flows(request):
            return []
        if now >= request.acknowledge_at:
            return [_acknowledged(request)]
        return self._guarded(request, lambda: request.stream.tick(now), now)

    def _beat(self, now: float) -> Action:
        elapsed = max(now - self._last_beat, 1e-3)
        load = self._load
        rate = round(self._tokens / elapsed, 1)
        beat = Heartbeat(load.running, load.queued, rate, load.cached, load.computed)
        self._tokens, self._last_beat = 0, now
        header = Header(Kind.HB, seq=load.progress % 2**32)
        return Send(Message(header, route=pack(beat)), lasting=False)


def _acknowledged(request: _Request) -> Send:
    """This worker has the attempt."""
    request.acknowledge_at = math.inf
    key = request.stream.key
    return Send(Message(Header(Kind.RUNACK, key.request, attempt=key.attempt)))


def _not_here(key: Key) -> Send:
    """The broker is to give this attempt to somebody else."""
    return Send(Message(Header(Kind.RESET, key.request, attempt=key.attempt)))
