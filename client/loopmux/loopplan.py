"""What both shells of the tool loop begin with: all that it is started with, checked, and what a caller decides."""

from __future__ import annotations

import dataclasses
import inspect
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loopmux import codec, tools
from loopmux.errors import BadRequestError, LoopmuxError, ToolLoopError, ToolNotFoundError
from loopmux.loopevents import AskModel, ChatMessage, Decision, Deny, Limits, LoopEvent, Run, Substitute
from loopmux.options import KNOWN, check_known, check_plain
from loopmux.outcome import readable, succeeded
from loopmux.results import ToolCall
from loopmux.turns import Loop

BeforeTool = Callable[[ToolCall], Any]
"""Gives a ``Decision``, or True, False or a text for short; a coroutine function is awaited by ``arun``."""
OnEvent = Callable[[LoopEvent], Any]

_UNFORCED = ("auto", "none")
"""The choices that leave the model free to answer; every other one forces a call."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A loop that is ready to start: its core, what every turn is asked with, and whether its session ends with it."""

    loop: Loop
    schemas: list[dict[str, Any]]
    options: dict[str, Any]
    ends_session: bool

    def turn_options(self, ask: AskModel) -> dict[str, Any]:
        """The arguments of ``client.stream`` for one turn."""
        options = dict(self.options)
        if ask.turn > 1 and options.get("tool_choice", "auto") not in _UNFORCED:
            options["tool_choice"] = "auto"
        if ask.timeout is not None:
            options["timeout"] = ask.timeout
        return {
            "messages": ask.sent(),
            "tools": self.schemas,
            "session": self.loop.session,
            "continues": ask.turn > 1,
            **options,
        }


def prepare(
    prompt_or_messages: str | Iterable[Mapping[str, Any]],
    given: Iterable[Any] | None,
    session: str | None,
    approval: bool,
    settings: dict[str, Any],
) -> Plan:
    """Check everything a loop is started with; nothing has been sent when it raises, and the error has the messages.

    Raises:
        BadRequestError: messages, tools or limits are wrong.
        ToolNotFoundError: ``tool_choice`` names a tool that is not among them.
        LoopmuxError: a source of tools cannot say what it has.
    """
    messages = messages_of(prompt_or_messages)
    try:
        return _plan(messages, given, session, approval, settings)
    except LoopmuxError as error:
        error.messages = messages
        raise


def _plan(
    messages: list[ChatMessage],
    given: Iterable[Any] | None,
    session: str | None,
    approval: bool,
    settings: dict[str, Any],
) -> Plan:
    check_plain(messages, "messages", 0)
    known = {f.name for f in dataclasses.fields(Limits)}
    check_known(settings, known | KNOWN | {"before_tool"})
    limits = Limits(**{name: value for name, value in settings.items() if name in known})
    options = {name: value for name, value in settings.items() if name not in known}
    by_name = tools.collect(given)
    if "messages" in options:
        raise BadRequestError("messages: found them beside what the loop begins with: hand them over as that")
    choice = options.get("tool_choice")
    if choice not in (None, "auto", "none", "required", *by_name):
        names = ", ".join(by_name) or "there are none"
        raise ToolNotFoundError(f"tool_choice: found {choice!r}, expected auto, none, required or a tool of: {names}")
    loop = Loop(messages, by_name, limits, approval, session or secrets.token_hex(8))
    return Plan(loop, [tool.schema for tool in by_name.values()], options, ends_session=not session)


def messages_of(given: str | Iterable[Mapping[str, Any]]) -> list[ChatMessage]:
    """The messages that a loop begins with.

    Raises:
        BadRequestError: what was given is no prompt and no list.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, (dict, bytes)) or not isinstance(given, Iterable):
        raise BadRequestError(f"messages: found {type(given).__name__}, expected a prompt or a list of messages")
    return [dict(message) if isinstance(message, Mapping) else message for message in given]


def check_callback(name: str, callback: Callable[..., Any] | None, *, awaited: bool) -> None:
    """Refuse what cannot be called, or whose answer nobody would await.

    Raises:
        BadRequestError: naming the callback and what was found.
    """
    if callback is not None and not callable(callback):
        raise BadRequestError(f"{name}: found {codec.show(callback)}, expected a function")
    if not awaited and inspect.iscoroutinefunction(callback):
        raise BadRequestError(
            f"{name}: found a coroutine function, which AsyncClient awaits: use it, or a plain function"
        )


def decision(answer: Any, call: ToolCall) -> Decision:
    """What ``before_tool`` answered, spelled out.

    Raises:
        ToolLoopError: it is none of the known answers, or no result for a model; the call is not run.
    """
    match answer:
        case Run():
            return answer
        case Deny(reason):
            return Deny(readable(str(reason)) if reason else "")
        case Substitute(result):
            try:
                return Substitute(succeeded(result).result)
            except (TypeError, ValueError, RecursionError) as error:
                raise ToolLoopError(
                    f"before_tool substitutes a result for {call.name!r} that has no JSON form: {error}"
                ) from error
        case True:
            return Run()
        case False:
            return Deny()
        case str():
            return Substitute(answer)
    raise ToolLoopError(
        f"before_tool answered {answer!r:.80} for {call.name!r}, expected Run(), Deny(reason), Substitute(result), "
        "True, False or a text"
    )
