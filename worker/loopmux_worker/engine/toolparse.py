"""Tool calls in the text of a model: a streaming parser of ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.

Hermes, Qwen2.5 and Qwen3 write calls so. Pure; the result does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from loopmux.results import ToolCall

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
_DEEPEST = 64
"""Nesting of arguments; more is a model gone astray, and MessagePack refuses a few hundred."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What came of a piece: text outside of calls, and the calls that were completed by it."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


class MalformedCall(ValueError):
    """What the model wrote is no call; the message tells it why."""


class _In(Enum):
    TEXT = auto()
    BEFORE = auto()  # after the opening tag, in front of the JSON
    JSON = auto()
    STRING = auto()  # inside a JSON string, where tags mean nothing
    ESCAPE = auto()  # behind a backslash in one
    AFTER = auto()  # the JSON is complete, the closing tag is due
    LOOSE = auto()  # not JSON: whatever comes, up to the next closing tag


class CallParser:
    """Splits a model's text into text and calls.

    Each call is given out whole, with an id that is unique in the request. One that is malformed or cut has ``error``
    and ``raw`` set. White space around calls belongs to their layout and is dropped.

    Args:
        request: the request's id; the call ids carry its first two bytes, so that calls of several turns differ.
    """

    def __init__(self, request: bytes) -> None:
        self._suffix = request[:2].hex()
        self._count = 0
        self._state = _In.TEXT
        self._text: list[str] = []  # text that is certain, until the end of this piece
        self._calls: list[ToolCall] = []
        self._space = ""  # white space whose fate is open
        self._tag = ""  # the beginning of a tag, perhaps
        self._raw: list[str] = []
        self._depth = 0
        self._after_call = False  # behind a call, white space is layout until text begins

    @property
    def count(self) -> int:
        """Calls so far, malformed ones included."""
        return self._count

    def push(self, piece: str) -> Parsed:
        """Take a piece of text."""
        for char in piece:
            self._take(char)
        return self._taken()

    def flush(self) -> Parsed:
        """The end of the output: held text is text, an unfinished call is an error."""
        if self._state is _In.TEXT:
            self._keep_text(self._tag)
            if not self._count:
                self._text.append(self._space)
            self._tag = self._space = ""
        else:
            self._raw.append(self._tag)
            self._end_call(complete=self._state is _In.AFTER and not self._tag)
        return self._taken()

    def _taken(self) -> Parsed:
        parsed = Parsed("".join(self._text), tuple(self._calls))
        self._text, self._calls = [], []
        return parsed

    def _take(self, char: str) -> None:
        if self._state is _In.TEXT:
            self._take_text(char)
        elif self._state in (_In.STRING, _In.ESCAPE):
            self._take_in_string(char)
        elif self._state is _In.JSON and not self._tag and char != "<":
            self._take_json(char)
        else:
            self._take_towards_close(char)

    def _take_text(self, char: str) -> None:
        candidate = self._tag + char
        if candidate == OPEN:
            self._tag = self._space = ""
            self._begin_call()
        elif OPEN.startswith(candidate):
            self._tag = candidate
        elif self._tag:
            self._keep_text(self._tag)
            self._tag = ""
            self._take_text(char)
        elif char.isspace():
            self._space += char
        else:
            self._keep_text(char)

    def _keep_text(self, text: str) -> None:
        if text:
            self._text.append(text if self._after_call else self._space + text)
            self._space, self._after_call = "", False

    def _begin_call(self) -> None:
        self._state, self._raw, self._depth = _In.BEFORE, [], 0

    def _take_in_string(self, char: str) -> None:
        self._raw.append(char)
        if self._state is _In.ESCAPE:
            self._state = _In.STRING
        elif char == "\\":
            self._state = _In.ESCAPE
        elif char == '"':
            self._state = _In.JSON
        elif char == "\n":
            # JSON has no raw line ends in strings: a quote was left open, and the next closing tag is a tag again.
            self._state = _In.LOOSE

    def _take_json(self, char: str) -> None:
        self._raw.append(char)
        if char == '"':
            self._state = _In.STRING
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._state = _In.AFTER

    def _take_towards_close(self, char: str) -> None:
        """Outside of strings: look for a tag that ends the call."""
        candidate = self._tag + char
        if candidate == CLOSE:
            self._tag = ""
            self._end_call(complete=True)
        elif candidate == OPEN and self._state is _In.AFTER:
            self._tag = ""  # the closing tag was forgotten, the next call begins
            self._end_call(complete=True)
            self._begin_call()
        elif CLOSE.startswith(candidate) or (self._state is _In.AFTER and OPEN.startswith(candidate)):
            self._tag = candidate
        elif self._tag:
            self._raw.append(self._tag)
            self._tag, self._state = "", _In.LOOSE
            self._take(char)
        else:
            self._raw.append(char)
            self._note_outside(char)

    def _note_outside(self, char: str) -> None:
        if char.isspace() or self._state is _In.LOOSE:
            return
        if self._state is _In.BEFORE and char == "{":
            self._state, self._depth = _In.JSON, 1
        else:
            self._state = _In.LOOSE

    def _end_call(self, *, complete: bool) -> None:
        raw = "".join(self._raw).strip()
        call_id = f"call_{self._count}_{self._suffix}"
        self._count += 1
        self._calls.append(read_call(raw, call_id) if complete else _cut_call(raw, call_id))
        self._state, self._tag, self._raw, self._after_call = _In.TEXT, "", [], True


def _cut_call(raw: str, call_id: str) -> ToolCall:
    return ToolCall(call_id, "", error="the call was cut off before its end: write it again, whole", raw=raw)


def read_call(raw: str, call_id: str) -> ToolCall:
    """The call that a JSON text describes, or one with ``error`` set that says what is wrong with it."""
    try:
        name, arguments = _name_and_arguments(raw)
    except (ValueError, RecursionError) as error:
        return ToolCall(call_id, "", error=f"malformed tool call: {error}", raw=raw)
    return ToolCall(call_id, name, arguments, raw=raw)


def _name_and_arguments(raw: str) -> tuple[str, dict[str, Any]]:
    """Raises MalformedCall or JSONDecodeError with the reason, RecursionError for absurd nesting."""
    value = _json(raw)
    if not isinstance(value, dict):
        raise MalformedCall(f'found {type(value).__name__}, expected {{"name": …, "arguments": {{…}}}}')
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise MalformedCall('"name" is missing or no text')
    if isinstance(arguments, str):  # some models write the arguments as a JSON text once more
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        raise MalformedCall(f'"arguments" is {type(arguments).__name__}, expected an object')
    _check_text_and_depth([name, arguments], 0)
    return name, arguments


def _json(text: str) -> Any:
    # strict=False takes raw line ends inside strings, which small models write in code
    return json.loads(text, strict=False, parse_int=_whole_number, parse_float=_number, parse_constant=_no_constant)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise MalformedCall(f"the number {digits[:24]} is too large")
    return number


def _whole_number(digits: str) -> int:
    # The wire's numbers have 64 bits; the length goes first, because converting thousands of digits is slow
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise MalformedCall(f"the number {digits[:24]}… is too large")
    return int(digits)


def _no_constant(name: str) -> float:
    raise MalformedCall(f"{name} is not JSON")


def _check_text_and_depth(value: object, depth: int) -> None:
    if depth > _DEEPEST:
        raise MalformedCall(f"nested deeper than {_DEEPEST}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MalformedCall("a text holds half a surrogate pair") from None
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_text_and_depth(key, depth)
            _check_text_and_depth(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _check_text_and_depth(entry, depth + 1)
