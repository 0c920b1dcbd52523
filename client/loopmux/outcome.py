"""What came of a tool call, and a tool's result as the text that the model reads."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loopmux.tools import ToolError

Status = Literal["success", "error", "denied", "substituted", "skipped"]
"""How a call ended: it ran; it could not be run or failed; the caller said no, or gave a result itself; a limit."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one call.

    Attributes:
        content: the text that the model gets as the tool's message.
        result: the tool's result as JSON values, None unless it ran or was substituted.
        error: why it did not succeed, or None.
    """

    status: Status
    content: str
    result: Any = None
    error: str | None = None


def succeeded(value: Any, status: Status = "success") -> Outcome:
    """The outcome of a result.

    Raises:
        TypeError, ValueError: it has no JSON form.
    """
    result = plain(value)
    return Outcome(status, readable(as_text(result)), result)


def failed(error: str) -> Outcome:
    """The outcome of a call that could not be run or raised."""
    return Outcome("error", readable(f"Error: {error}"), error=error)


def described(error: BaseException) -> str:
    """An exception as one text: its type and what it says."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - a broken __str__ must not hide the failure it tells of
        text = "(its text cannot be shown)"
    if isinstance(error, ToolError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def plain(value: Any) -> Any:
    """A tool's result as JSON values.

    Dataclasses, pydantic models, enums, sets, dates, paths and arrays have a form; others do not.

    Raises:
        TypeError: for a value without a JSON form.
    """
    match value:
        case enum.Enum():
            return plain(value.value)
        case None | str() | bool() | int() | float():
            return value
        case Mapping():
            return {str(plain(key)): plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [plain(entry) for entry in value]
        case set() | frozenset():
            return sorted((plain(entry) for entry in value), key=repr)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case pathlib.PurePath() | uuid.UUID() | decimal.Decimal():
            return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"the result is a {type(value).__name__}, expected text, numbers, lists, dicts or a dataclass")


def readable(text: str) -> str:
    """A text that can be sent: lone surrogates, as of names of files that are not UTF-8, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def as_text(value: Any) -> str:
    """JSON values as the model reads them: a text as it is, everything else as JSON."""
    return str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
