"""The tool loop's core: a model's turn or a tool's outcome in, what to do next out. No I/O, no clock, no threads.

``Loop.start`` and ``Loop.handle`` return actions; a shell (``loop``, ``aioloop``) carries them out in their order, says
``Loop.began`` of each call that it runs, and feeds back what happened. ``now`` is a monotonic time in seconds. The
transcript that the core keeps is whole whenever the loop ends: every call of an assistant message has exactly one tool
message, in call order.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loopmux.errors import DeadlineExceededError, LoopmuxError, MaxTurnsError
from loopmux.loopevents import (
    AbandonTool,
    Action,
    AskApproval,
    AskModel,
    ChatMessage,
    Decided,
    Decision,
    Deny,
    Event,
    Fail,
    Finish,
    HintWaiting,
    Limits,
    Report,
    Run,
    RunTool,
    Substitute,
    TimePassed,
    ToolFinished,
    ToolLoopResult,
    ToolResult,
    TurnFinished,
)
from loopmux.outcome import Outcome, failed, succeeded
from loopmux.results import Result, ToolCall, Usage
from loopmux.tools import Tool
from loopmux.transcript import assistant_message, call_key, check_answered, cut, log_entry, skipped, tool_message


@dataclass(slots=True)
class _Pending:
    """A call of the current turn: its outcome once it has one."""

    call: ToolCall
    outcome: Outcome | None = None


@dataclass(slots=True)
class Loop:
    """One tool loop.

    Attributes:
        messages: the transcript; the caller's own list and messages are copied, never changed.
        approval: ask about each call that could be run.
        deadline: when the whole loop must be over; set by ``start``.
    """

    messages: list[ChatMessage]
    tools: Mapping[str, Tool]
    limits: Limits = field(default_factory=Limits)
    approval: bool = False
    session: str = ""
    turn: int = 0
    text: str = ""
    usage: Usage = field(default_factory=Usage)
    tool_log: list[dict[str, Any]] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    deadline: float | None = None
    _finish_reason: str = ""  # of the turn under way, where it is the last one
    _calls: int = 0
    _numbered: int = 0
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _unasked: deque[int] = field(default_factory=deque)  # about the first of them the caller is being asked
    _queue: deque[int] = field(default_factory=deque)
    _running: dict[int, float] = field(default_factory=dict)  # until when; infinite before it began
    _began: dict[int, float] = field(default_factory=dict)
    _took: dict[str, float] = field(default_factory=dict)  # seconds, by tool, the last time
    _produced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _failures: Counter[str] = field(default_factory=Counter)
    _last: tuple[int, dict[int, _Pending]] = field(init=False)  # where the last turn's answers begin, and its calls

    def __post_init__(self) -> None:
        self.messages = copy.deepcopy(list(self.messages))
        self._last = len(self.messages), {}
        check_answered(self.messages)

    @property
    def wake(self) -> float | None:
        """When ``TimePassed`` is due, unless something else happens first."""
        return min(self._running.values(), default=None)

    def start(self, now: float) -> list[Action]:
        """The first actions."""
        if self.limits.timeout is not None:
            self.deadline = now + self.limits.timeout
        return self._ask(now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do after an event."""
        match event:
            case TurnFinished():
                return self._turn_finished(event, now)
            case Decided(number, decision):
                return self._decided(number, decision, now)
            case ToolFinished(number, outcome):
                if number not in self._running:
                    return []  # abandoned before it came back
                self._took[self._pending[number].call.name] = now - self._began[number]
                return [*self._settle(number, outcome), *self._advance(now)]
            case TimePassed():
                return [*self._abandon_late(now), *self._advance(now)]

    def began(self, number: int, now: float) -> None:
        """A call is being run from now on: before that, observers and whoever is asked may have taken their time."""
        self._began[number] = now
        self._running[number] = min(now + self._limit(number), self.deadline or math.inf)

    def transcript(self) -> list[ChatMessage]:
        """The conversation as it stands, fit for resuming: a call that has no outcome yet is answered with that.

        It may be asked for from another thread, or after Ctrl-C stopped this one anywhere.
        """
        answered, calls = self._last
        messages = self.messages[:answered]
        if len(messages) < answered:  # the turn is on its way in
            return messages
        return [*messages, *(tool_message(p.call, self._so_far(number, p).content) for number, p in calls.items())]

    def _so_far(self, number: int, pending: _Pending) -> Outcome:
        if pending.outcome:
            return pending.outcome
        if number in self._began:
            return failed("the loop was stopped while this ran; whether it did its work is not known")
        return skipped("the loop was stopped")

    def result(self, finish_reason: str) -> ToolLoopResult:
        """The loop so far."""
        return ToolLoopResult(
            self.text,
            list(self.messages),
            list(self.tool_log),
            self.turn,
            finish_reason,
            self.usage,
            self._calls,
            tuple(self.request_ids),
            self.session,
        )

    def _ask(self, now: float) -> list[Action]:
        if self._late(now):
            return [Fail(self._with_transcript(DeadlineExceededError(self._deadline_text())))]
        self.turn += 1
        left = None if self.deadline is None else self.deadline - now
        return [AskModel(self.turn, list(self.messages), left, dict(self._produced))]

    def _with_transcript(self, error: LoopmuxError) -> LoopmuxError:
        error.messages = list(self.messages)
        return error

    def _late(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline

    def _deadline_text(self) -> str:
        return f"the tool loop's deadline of {self.limits.timeout:g} s passed after {self.turn} turns"

    def _turn_finished(self, event: TurnFinished, now: float) -> list[Action]:
        result = event.result
        self.text = result.text
        self.usage += result.usage
        self.request_ids.append(result.request_id)
        if result.token_ids:
            self._produced[len(self.messages)] = result.token_ids
        first = self._numbered
        self._numbered += len(result.tool_calls)
        self._pending = {first + at: _Pending(call) for at, call in enumerate(result.tool_calls)}
        self._last = len(self.messages) + 1, self._pending
        self.messages.append(assistant_message(result.text, result.tool_calls, result.reasoning))
        actions: list[Action] = [Report(event)]
        if not result.tool_calls:
            return [*actions, Finish(self.result(result.finish_reason))]
        if stop := self._reason_to_run_nothing(result):
            self._finish_reason, why = stop
            for number in self._pending:
                actions += self._settle(number, skipped(why))
            return [*actions, *self._advance(now)]
        admitted = [action for number, pending in self._pending.items() for action in self._admit(number, pending.call)]
        admitted += self._question(now)
        if any(pending.outcome is None for pending in self._pending.values()):
            actions.append(HintWaiting(self._expected()))
        return [*actions, *admitted, *self._advance(now)]

    def _expected(self) -> float | None:
        """How long the turn's calls take, as its tools did last; nobody knows where somebody is asked first."""
        waited = (p.call.name for p in self._pending.values() if p.outcome is None)
        took = [self._took[name] for name in waited if name in self._took and not self.approval]
        return max(took, default=None)

    def _reason_to_run_nothing(self, result: Result) -> tuple[str, str] | None:
        if result.finish_reason == "length":
            return "length", "the answer was cut at max_new_tokens"
        if self.turn >= self.limits.max_turns:
            return "max_turns", f"the limit of {self.limits.max_turns} turns was reached"
        return None

    def _admit(self, number: int, call: ToolCall) -> list[Action]:
        """Refuse a call at once, ask about it, or queue it."""
        tool = self.tools.get(call.name)
        if call.error is not None:
            return self._settle(number, failed(f"the call could not be read: {call.error}"))
        if tool is None:
            names = ", ".join(self.tools) or "there are none"
            return self._settle(number, failed(f"unknown tool {call.name!r}, expected one of: {names}"))
        if problems := tool.problems(call.arguments):
            return self._settle(number, failed(f"bad arguments for {call.name}: {problems}"))
        if self.approval:
            self._unasked.append(number)
            return []
        return self._allow(number)

    def _allow(self, number: int) -> list[Action]:
        """Queue a call, unless as many were run as may be."""
        if self._calls >= self.limits.max_tool_calls:
            self._finish_reason = "max_tool_calls"
            return self._settle(number, skipped(f"the limit of {self.limits.max_tool_calls} tool calls was reached"))
        self._calls += 1
        self._queue.append(number)
        return []

    def _question(self, now: float) -> list[Action]:
        """Ask about the next call. Not before the one in front is decided: only what runs counts for the limit."""
        actions: list[Action] = []
        while self._unasked and (self._calls >= self.limits.max_tool_calls or self._late(now)):
            actions += self._allow(self._unasked.popleft())
        if self._unasked:
            call = self._pending[self._unasked[0]].call
            # a copy: whoever is asked must not change what was checked
            actions.append(AskApproval(self._unasked[0], replace(call, arguments=copy.deepcopy(call.arguments))))
        return actions

    def _decided(self, number: int, decision: Decision, now: float) -> list[Action]:
        self._unasked.remove(number)
        actions: list[Action] = []
        match decision:
            case Run():
                actions = self._allow(number)
            case Deny(reason):
                text = f"Denied: {reason}" if reason else "Denied: the user did not allow this call."
                actions = self._settle(number, Outcome("denied", text, error=reason or None))
            case Substitute(result):
                actions = self._settle(number, succeeded(result, "substituted"))
        return [*actions, *self._question(now), *self._advance(now)]

    def _advance(self, now: float) -> list[Action]:
        """Start what may run; when nothing is left of the turn, close it."""
        actions: list[Action] = []
        while self._queue and not self._unasked and len(self._running) < self.limits.concurrency:
            number = self._queue.popleft()
            if self._late(now):
                actions += self._settle(number, failed("not run: the loop's deadline passed"))
                continue
            self._running[number] = math.inf
            actions.append(RunTool(number, self.turn, self._pending[number].call, self._tool(number)))
        if self._pending and all(pending.outcome for pending in self._pending.values()):
            actions += self._close_turn(now)
        return actions

    def _tool(self, number: int) -> Tool:
        return self.tools[self._pending[number].call.name]

    def _limit(self, number: int) -> float:
        return self._tool(number).timeout or self.limits.tool_timeout

    def _abandon_late(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for number in [n for n, until in self._running.items() if until <= now]:
            late = self._late(now)
            limit = "the loop's deadline" if late else f"{self._limit(number):g} s"
            actions += [AbandonTool(number), *self._settle(number, failed(f"no result within {limit}"))]
        return actions

    def _settle(self, number: int, outcome: Outcome) -> list[Action]:
        """Give a call its one outcome, its text within the limit."""
        self._running.pop(number, None)
        outcome = cut(outcome, self.limits.max_result_size)
        pending = self._pending[number]
        pending.outcome = outcome
        report = ToolResult(self.turn, pending.call, outcome.status, outcome.content, outcome.result, outcome.error)
        return [Report(report)]

    def _close_turn(self, now: float) -> list[Action]:
        """Append the turn's tool messages in call order and decide how to go on."""
        done = [(pending.call, pending.outcome) for pending in self._pending.values() if pending.outcome]
        self._pending = {}
        for call, outcome in done:
            self.messages.append(tool_message(call, outcome.content))
            self.tool_log.append(log_entry(call, outcome, self.turn))
        if self.limits.stop_when_denied and all(outcome.status == "denied" for _, outcome in done):
            return [Finish(self.result("denied"))]
        if self._repeats(done) and not self._late(now):
            return [Finish(self.result("repeat"))]
        match self._finish_reason:
            case "":
                return self._ask(now)
            case "length":
                return [Finish(self.result("length"))]
            case reason:
                return [Fail(self._exhausted(reason))]

    def _repeats(self, done: list[tuple[ToolCall, Outcome]]) -> bool:
        """Count what failed, once per turn: the model has to see a failure before repeating it means anything."""
        keys = {call_key(call): outcome.status in ("error", "denied") for call, outcome in done}
        for key, bad in keys.items():
            self._failures[key] = self._failures[key] + 1 if bad else 0
        return any(self._failures[key] >= self.limits.max_failures for key in keys)

    def _exhausted(self, reason: str) -> LoopmuxError:
        limit = f"{reason}={getattr(self.limits, reason)}"
        text = (
            f"the tool loop used up {limit} and the model still asks for tools: raise the limit, "
            "or run on from the error's .messages"
        )
        return MaxTurnsError(text, result=self.result(reason), messages=list(self.messages))
