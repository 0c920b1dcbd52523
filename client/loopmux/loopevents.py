"""The words between the tool loop's core and its shells: limits, events, actions, reports, the result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from loopmux.errors import BadRequestError, LoopmuxError
from loopmux.outcome import Outcome, Status
from loopmux.results import ReasoningDelta, Result, TextDelta, ToolCall, Usage, Waiting
from loopmux.tools import Tool, check_seconds, is_positive

ChatMessage = dict[str, Any]
"""A message as chat templates take it: ``role``, ``content``, and what belongs to the role."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a loop stops.

    Attributes:
        max_turns: answers of the model.
        max_tool_calls: calls that are run.
        tool_timeout: seconds for one call, unless its tool says otherwise.
        max_result_size: characters of a result that the model gets; the rest is cut and said to be.
        max_failures: turns in which the same call with the same arguments fails, or is denied, before the loop ends
            with ``repeat``.
        concurrency: calls that run at the same time.
        timeout: seconds for the whole loop; None for no limit beyond that of each turn.
        stop_when_denied: end the loop after a turn whose calls were all denied.
    """

    max_turns: int = 10
    max_tool_calls: int = 50
    tool_timeout: float = 30.0
    max_result_size: int = 16_384  # about 4 000 tokens, a whole context of the default size
    max_failures: int = 3
    concurrency: int = 4
    timeout: float | None = None
    stop_when_denied: bool = False

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tool_calls", "max_result_size", "max_failures", "concurrency"):
            count = getattr(self, name)
            if not (is_positive(count) and (isinstance(count, int) or count == math.inf)):
                raise BadRequestError(f"{name}: found {count!r}, expected a whole number above 0")
        check_seconds(self.tool_timeout, "tool_timeout")
        if self.timeout is not None:
            check_seconds(self.timeout, "timeout")


@dataclass(frozen=True, slots=True)
class ToolLoopResult:
    """A finished loop.

    Attributes:
        text: the last answer.
        messages: the whole transcript, the caller's messages first; append to it and run on.
        tool_log: one entry per call: ``tool``, ``args``, ``status``, ``result``, ``error``, ``iteration``; a denied one
            has no result, and an error only if a reason was given.
        turns: answers of the model.
        finish_reason: ``stop`` or ``length`` as the last turn; ``repeat``, ``denied``, ``max_turns``,
            ``max_tool_calls``.
        usage: the sum over all turns.
        tool_calls: calls that were run.
        request_ids: one per turn, as in logs.
        session: the session id of all turns.
    """

    text: str
    messages: list[ChatMessage]
    tool_log: list[dict[str, Any]]
    turns: int
    finish_reason: str
    usage: Usage
    tool_calls: int
    request_ids: tuple[str, ...]
    session: str = ""


# --- what a caller may answer when it is asked about a call ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Run the call."""


@dataclass(frozen=True, slots=True)
class Deny:
    """Do not run the call; the model is told, with the reason."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Substitute:
    """Do not run the call; the model gets this result."""

    result: Any


Decision = Run | Deny | Substitute


# --- events: what happened (TurnFinished is also told to observers) -------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The model's turn is complete."""

    turn: int
    result: Result


@dataclass(frozen=True, slots=True)
class Decided:
    """The caller decided about a call."""

    number: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class ToolFinished:
    """A call came to its end; one that was abandoned may come late and is ignored."""

    number: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class TimePassed:
    """``Loop.wake`` was reached."""


Event = TurnFinished | Decided | ToolFinished | TimePassed


# --- told to observers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The model is asked; ``turn`` counts from 1."""

    turn: int


@dataclass(frozen=True, slots=True)
class ToolStarted:
    """A call is being run."""

    turn: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of a call; ``content`` is what the model will read, the rest as in ``Outcome``."""

    turn: int
    call: ToolCall
    status: Status
    content: str
    result: Any = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LoopFinished:
    """The loop's result."""

    result: ToolLoopResult


LoopEvent = (
    TurnStarted
    | TextDelta
    | ReasoningDelta
    | ToolCall
    | Waiting
    | Usage
    | TurnFinished
    | ToolStarted
    | ToolResult
    | LoopFinished
)
"""What iterating over a loop yields: the streams of its turns, and what happens between them."""


# --- actions: what to do --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskModel:
    """Ask the model; answer with ``TurnFinished``.

    Attributes:
        timeout: what is left of the loop's, seconds.
        produced: by the index of an assistant message, the token ids that the model produced for it.
    """

    turn: int
    messages: list[ChatMessage]
    timeout: float | None = None
    produced: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def sent(self) -> list[ChatMessage]:
        """The messages as a worker is to get them: with the ids, so that it continues the conversation by them."""
        said = self.produced
        return [m | {"token_ids": list(said[i])} if i in said else m for i, m in enumerate(self.messages)]


@dataclass(frozen=True, slots=True)
class HintWaiting:
    """Tell the broker that the session waits on tools, so that its state is kept.

    ``expected`` are the seconds that they take, as far as this loop has seen; None where it has seen none of them.
    """

    expected: float | None = None


@dataclass(frozen=True, slots=True)
class AskApproval:
    """Ask the caller about a call; answer with ``Decided``."""

    number: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class RunTool:
    """Run a call; say ``Loop.began``, and answer with ``ToolFinished``."""

    number: int
    turn: int
    call: ToolCall
    tool: Tool


@dataclass(frozen=True, slots=True)
class AbandonTool:
    """A call took too long: stop it if that is possible, and forget it in any case."""

    number: int


@dataclass(frozen=True, slots=True)
class Report:
    """Tell observers."""

    event: TurnFinished | ToolResult


@dataclass(frozen=True, slots=True)
class Finish:
    """The loop is over."""

    result: ToolLoopResult


@dataclass(frozen=True, slots=True)
class Fail:
    """The loop is over with an error, which carries the transcript."""

    error: LoopmuxError


Action = AskModel | HintWaiting | AskApproval | RunTool | AbandonTool | Report | Finish | Fail
