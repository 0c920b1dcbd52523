"""The two forms that programs of the replaced system taught their models, also inside of code fences."""

from __future__ import annotations

import re

from loopmux_worker.engine.calls.bodies import bare_object, enclosed
from loopmux_worker.engine.calls.jsoncalls import CLOSE, OPEN
from loopmux_worker.engine.calls.output import Output
from loopmux_worker.engine.calls.pythoncalls import python_calls
from loopmux_worker.engine.calls.source import Source, Waiting, marks
from loopmux_worker.engine.calls.values import Call, as_arguments, named, read_json

FENCE = "```"

_KEYS = ("tool", "args", "id")
_SIGN = re.compile(r'"tool"\s*:')


def envelope(source: Source, output: Output, mark: str, before: str = "") -> Waiting[None]:
    """``{"tool": …, "args": {…}, "id": …}``, ``<tool_call>name(key="value")</tool_call>``, or the form of Hermes.

    ``before`` was read in front of it, and is text unless a call follows.
    """
    whole: bool | None
    if mark == "{":
        raw, whole = yield from bare_object(source, _KEYS, _SIGN)
        if whole is None:
            output.say(before + raw)
            return
        output.call(raw, _json_call, whole=whole)
        return
    yield from source.space()
    if (yield from source.starts("{")):
        raw, whole = yield from enclosed(source, (CLOSE,), OPEN)
        output.call(raw, _json_call, whole=whole)
    else:
        yield from python_calls(source, output, CLOSE)


def _json_call(raw: str) -> Call:
    value = read_json(raw)
    if isinstance(value, dict) and "tool" in value:
        return value["tool"], as_arguments(value.get("args", {}), "args")
    return named(raw)


def fence(source: Source, output: Output, mark: str) -> Waiting[None]:
    """A code fence: it goes with the calls in it, or it is text."""
    head = [mark]
    opener = yield from source.until(marks("\n", "{", OPEN, FENCE), head.append)
    if opener in ("\n", FENCE, ""):
        head.append(opener)
        opener = (yield from _opener(source, head)) if opener == "\n" else ""
    before, calls = "".join(head), output.count
    while opener:
        yield from envelope(source, output, opener, before)
        if output.count == calls:
            return
        calls, before = output.count, ""
        yield from source.space()
        opener = "" if (yield from source.accept(FENCE)) else (yield from _opener(source, []))
    output.say(before)


def _opener(source: Source, space: list[str]) -> Waiting[str]:
    """Read what begins a call, and white space in front of it."""
    space.append((yield from source.space()))
    for mark in ("{", OPEN):
        if (yield from source.accept(mark)):
            return mark
    return ""
