"""What is promised to callers: exact streams, one end each, in time, and no failure without a cause."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loopmux import messages
from loopmux.errors import LoopmuxError
from loopmux.results import Result, StreamEvent, TextDelta, ToolCall
from loopmux_worker.engine.echo import echo_token
from simulation.broken import broken, hold

if TYPE_CHECKING:
    from simulation.client import Call, ClientProcess
    from simulation.promise import Promise

LATE = 2.0
"""P3: seconds after the deadline, or after a frozen client goes on, by which a terminal is there."""
TICK = 0.01
"""Seconds within which two clocks of a run may differ over one moment (polls are rounded up)."""
MOST_LOSSES = 3
"""Workers that may be lost with a request."""
HURT = (
    "kill worker",
    "kill launcher",
    "snap worker",
    "hold worker",
    "freeze worker",
    "hang",
    "clog worker",
    "bad starts",
)
"""Faults by which a worker may be lost."""
AWAY = ("kill broker", "freeze client", "freeze broker", "snap client", "hold client", "clog client")
"""Faults by which a client may be away for longer than its requests live on."""
LUMPS = ("freeze", "snap", "hold", "clog", "kill broker")
"""Faults after which output, or credit, comes all at once."""


class Callers:
    """Watches what goes to callers."""

    def __init__(self, promise: Promise) -> None:
        self._promise, self._world, self._clock = promise, promise.world, promise.world.clock

    def delivered(self, call: Call, event: StreamEvent) -> None:
        """An event goes to the reader."""
        hold(call.outcome is None, "P2 nothing follows the end", lambda: f"{call} got {event} after {call.outcome}")
        hold(not call.collect, "no events for who does not read along", lambda: f"{call} got {event}")
        call.moved = self._clock.now
        if isinstance(event, TextDelta):
            self._tokens(call, event.position, event.token_ids, event.text)
        elif isinstance(event, ToolCall):
            known = {c.id for c in call.calls}
            hold(event.id not in known, "P5 each tool call comes once", lambda: f"{call} got {event} again")
            call.calls.append(event)

    def _tokens(self, call: Call, position: int, ids: tuple[int, ...], text: str) -> None:
        have = len(call.tokens)
        hold(position == have, "P1 no gap, no repetition", lambda: f"{call} got position {position} having {have}")
        hold(bool(ids), "P1 a delta has tokens", lambda: f"{call} at {position}")
        right = tuple(echo_token(call.id, position + i) for i in range(len(ids)))
        hold(ids == right, "P1 token i is f(request, i)", lambda: f"{call} at {position}: {ids}, expected {right}")
        call.came = self._clock.now
        call.tokens += ids
        call.text += text
        if call.plain:
            self._fenced(call, text, ids)

    def unended(self, call: Call) -> None:
        """A call is still open."""
        in_time = self._clock.now <= latest_end(call) or not call.client.running
        hold(in_time, "P3 ends in time", lambda: f"{call} has no end, deadline {call.deadline:.3f}")

    def _fenced(self, call: Call, text: str, ids: tuple[int, ...]) -> None:
        """Each token's text names the attempt it is of: they never go back."""
        marks = [mark.partition(".") for mark in text.split()]
        found = tuple(int(token) for token, _, _ in marks)
        hold(found == ids, "P1 text and tokens belong together", lambda: f"{call}: {text!r} came with {ids}")
        for _, _, attempt in marks:
            hold(int(attempt) >= call.attempt, "P4 superseded output is fenced off", lambda: f"{call}: {text!r}")
            call.attempt = int(attempt)

    def ended(self, call: Call, outcome: Result | LoopmuxError) -> None:
        """A caller gets its outcome."""
        hold(call.outcome is None, "P2 one end", lambda: f"{call}: {call.outcome!r}, then {outcome!r}")
        call.outcome, call.ended = outcome, self._clock.now
        told = f"{len(call.tokens)} tokens" if isinstance(outcome, Result) else f"{outcome.code}: {outcome}"
        self._world.story.tell(call.client, f"{call} ends: {told}")
        self._in_time(call)
        if isinstance(outcome, Result):
            self._whole(call, outcome)
        else:
            hold(
                call.collect or outcome.partial_text == call.text,
                "P1 an error has the text so far",
                lambda: f"{call}: {outcome.partial_text!r}, seen {call.text!r}",
            )
            hold(outcome.request_id == call.id.hex(), "an error names its request", lambda: f"{call}: {outcome!r}")
            if not self._excused(call, outcome):
                broken(
                    "P6 nothing is lost without a cause", f"{call} ({call.about}) ended with {outcome.code}: {outcome}"
                )

    def _in_time(self, call: Call) -> None:
        now = self._clock.now
        hold(now <= latest_end(call), "P3 ends in time", lambda: f"{call} ended, deadline {call.deadline:.3f}")

    def _whole(self, call: Call, result: Result) -> None:
        n = len(result.token_ids)
        right = tuple(echo_token(call.id, i) for i in range(n))
        hold(result.token_ids == right, "P1 token i is f(request, i)", lambda: f"the result of {call}")
        hold(not call.must_fail, "a bad request is refused", lambda: f"{call} ({call.about}) succeeded")
        hold(result.usage.completion_tokens == n, "usage counts tokens", lambda: f"{call}: {result.usage}, {n} tokens")
        hold(
            (result.model, result.adapter) == (call.submit.model, call.submit.adapter),
            "a request runs with the model and adapter that it names",
            lambda: f"{call}: {result.model}, {result.adapter}",
        )
        hold(result.attempts == max(call.attempt, result.attempts), "attempts are counted", lambda: f"{call}")
        if not call.collect:
            hold(list(result.token_ids) == call.tokens, "P1 a result is what was streamed", lambda: f"{call}")
            hold(result.text == call.text, "P1 a result is what was streamed", lambda: f"the text of {call}")
            hold(list(result.tool_calls) == call.calls, "P5 each tool call comes once", lambda: f"{call}")
        if call.plain:
            hold(
                (n, result.finish_reason) == (call.wanted, "length"),
                "P1 a result is whole",
                lambda: f"{call}: {n} tokens ({result.finish_reason}), asked for {call.wanted}",
            )
        else:
            hold(
                len({c.id for c in result.tool_calls}) == call.tools, "P5 each tool call comes once", lambda: f"{call}"
            )

    def answered(self, client: ClientProcess, question: bytes, status: messages.Status | None) -> None:
        """A question for the broker's status has its answer, or none."""
        deadline = client.questions.pop(question, None)
        hold(deadline is not None, "P2 one answer", f"{client} got another one")
        hindered = self._promise.journal.count(
            ("kill broker", "freeze", "snap client", "hold client", "clog"), 0, math.inf
        )
        hindered += client.gone <= self._clock.now  # it left with the question open
        hold(status is not None or hindered > 0, "a question is answered", f"that of {client} was not")
        if self._promise.resting and status is not None:
            told = (status.queued, status.running, {worker.name for worker in status.workers})
            right = (0, 0, {worker.name for worker in self._world.workers})
            hold(told == right, "status tells what is", f"{told}, expected {right}")

    # --- reasons

    def _excused(self, call: Call, error: LoopmuxError) -> bool:
        """Whether an error has a cause in the request or in what was done to the world."""
        if error.code in call.may_fail:
            return True
        match error.code:
            case "cancelled":
                slow = "slow_client" in error.message and (call.slow or self._promise.hit(call, *LUMPS) > 0)
                return min(call.cancelled, call.client.gone) <= self._clock.now or slow
            case "bad_request":  # who may queue no more requests may cancel no unknown ones either
                crowded = call.cancelled <= self._clock.now and self._world.profile.narrow
                # A new broker keeps the id for who names it first.
                return crowded or (call.meddled and self._promise.hit(call, "kill broker") > 0)
            case "deadline":
                quiet = call.idle_timeout is not None and self._clock.now >= call.came + call.idle_timeout - TICK
                return quiet or self._clock.now >= call.deadline - TICK
            case "connection_lost":
                return self._promise.hit(call, *AWAY, before=5.0) > 0
            case "worker_lost":
                hurt = self._promise.hit(call, *HURT, before=5.0)
                # A broker that stops itself loses no worker; but it may take the answer to its first RUN for late.
                late = self._promise.hit(call, "freeze broker", before=5.0) > 0
                return hurt + late >= MOST_LOSSES
            case "overloaded":
                return self._world.profile.narrow
            case "engine":
                # One time of it is long enough to give up. Who was ready once is never given up.
                return self._promise.hit(call, "bad starts", before=60.0) > 0 and "start" in error.message
            case "model_not_found":
                return (
                    self._promise.hit(call, "kill launcher", "stop launcher", "kill broker", "freeze", before=15.0) > 0
                )
        return False


def latest_end(call: Call) -> float:
    """When a caller has its outcome at the latest."""
    return max(call.deadline, call.client.thawed_at) + LATE + TICK
