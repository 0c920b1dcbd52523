"""A tool loop's turns as chat messages, and its calls as log entries."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

from loopmux.errors import BadRequestError
from loopmux.loopevents import ChatMessage
from loopmux.outcome import Outcome
from loopmux.results import ToolCall


def assistant_message(text: str, calls: Iterable[ToolCall], reasoning: str = "") -> ChatMessage:
    """A turn as a message. A malformed call stays in the text as the model wrote it; the others are listed."""
    calls = list(calls)
    raw = [call.raw for call in calls if call.error is not None and call.raw]
    message: ChatMessage = {"role": "assistant", "content": "\n".join([text, *raw] if text else raw)}
    if reasoning:
        message["reasoning_content"] = reasoning
    if listed := [_listed(call) for call in calls if call.error is None]:
        message["tool_calls"] = listed
    return message


def _listed(call: ToolCall) -> dict[str, Any]:
    # a copy: the transcript keeps what the model wrote, whatever becomes of the arguments
    function = {"name": call.name, "arguments": copy.deepcopy(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def tool_message(call: ToolCall, content: str) -> ChatMessage:
    """The answer to a call as a message."""
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


def skipped(why: str) -> Outcome:
    """The outcome of a call that a limit kept from running."""
    return Outcome("skipped", f"Not run: {why}.", error=why)


def cut(outcome: Outcome, size: int) -> Outcome:
    """An outcome whose text has at most ``size`` characters, and a note where it was longer."""
    length = len(outcome.content)
    if length <= size:
        return outcome
    text = f"{outcome.content[:size]}\n[cut: {length} characters, only the first {size} are shown]"
    result = text if outcome.result is not None else None  # the log does not keep what the model never saw
    return Outcome(outcome.status, text, result, outcome.error and outcome.error[:size])


def log_entry(call: ToolCall, outcome: Outcome, turn: int) -> dict[str, Any]:
    """A call's entry in ``ToolLoopResult.tool_log``."""
    entry: dict[str, Any] = {"tool": call.name, "args": copy.deepcopy(call.arguments), "status": outcome.status}
    if outcome.status != "denied":
        entry |= {"result": outcome.result, "error": outcome.error}
    elif outcome.error:
        entry["error"] = outcome.error
    return entry | {"iteration": turn}


def call_key(call: ToolCall) -> str:
    """What makes two calls the same."""
    what = call.raw if call.error is not None else json.dumps(call.arguments, sort_keys=True, default=repr)
    return f"{call.name} {what}"


def check_answered(messages: list[ChatMessage]) -> None:
    """Refuse a transcript that no model could continue.

    Raises:
        BadRequestError: it is empty, has something that is no message, or ends in calls without answers.
    """
    if not messages:
        raise BadRequestError("messages: found an empty list, expected at least one message")
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequestError(f"messages[{at}]: found {message!r:.80}, expected a dict with role and content")
    last = max((at for at, m in enumerate(messages) if m.get("tool_calls")), default=None)
    if last is None:
        return
    calls = messages[last]["tool_calls"]
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise BadRequestError(f"messages[{last}].tool_calls: found {calls!r:.80}, expected a list of dicts")
    answered = [m.get("tool_call_id") for m in messages[last + 1 :] if m["role"] == "tool"]  # ids may be anything
    for identity in (call.get("id") for call in calls):
        if identity not in answered:
            raise BadRequestError(
                f"messages[{last}]: its tool call {identity!r} has no answer: append "
                '{"role": "tool", "tool_call_id": …, "name": …, "content": …} for it'
            )
