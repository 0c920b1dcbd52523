"""One call run: whatever a tool does, the model gets a text."""

from __future__ import annotations

import datetime
import enum
import json
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import pydantic
import pytest

from loopmux.outcome import Outcome
from loopmux.toolrun import perform
from loopmux.tools import Tool, ToolError
from scripted import call


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: float = 0.0


class Model(pydantic.BaseModel):
    when: datetime.date


class Array:
    def tolist(self) -> list[int]:
        return [1, 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (3, "3"),
        (2.5, "2.5"),
        (None, "null"),
        (True, "true"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ((1, "ü"), '[1, "ü"]'),
        ({"b", "a"}, '["a", "b"]'),
        (Colour.RED, "red"),
        ({Colour.RED: 1}, '{"red": 1}'),
        (Point(1), '{"x": 1, "y": 0.0}'),
        ([Point(1)], '[{"x": 1, "y": 0.0}]'),
        (Model(when=datetime.date(2026, 1, 2)), '{"when": "2026-01-02"}'),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (pathlib.Path("/tmp"), "/tmp"),
        (Array(), "[1, 2]"),
        ("caf\udce9", "caf?"),
    ],
)
def test_a_result_as_the_model_reads_it(value: Any, text: str):
    outcome = perform(Tool("t", "", {"type": "object"}, lambda: value), call("t"))
    assert (outcome.status, outcome.content, outcome.error) == ("success", text, None)
    json.dumps(outcome.result)


class BrokenText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


class Leaving(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


def forever_nested() -> list[Any]:
    nested: list[Any] = []
    nested.append(nested)
    return nested


def raise_it(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("act", "content"),
    [
        (lambda: 1 / 0, "Error: ZeroDivisionError: division by zero"),
        (lambda: raise_it(KeyError()), "Error: KeyError"),
        (lambda: raise_it(ToolError("the shop is closed")), "Error: the shop is closed"),
        (lambda: sys.exit(3), "Error: SystemExit: 3"),
        (lambda: raise_it(KeyboardInterrupt()), "Error: KeyboardInterrupt"),
        (lambda: raise_it(BrokenText()), "Error: BrokenText: (its text cannot be shown)"),
        (lambda: raise_it(Leaving()), "Error: Leaving: (its text cannot be shown)"),
        (lambda: raise_it(ValueError("caf\udce9")), "Error: ValueError: caf?"),
        (
            lambda: [object()],
            "Error: TypeError: the result is a object, expected text, numbers, lists, dicts or a dataclass",
        ),
        (
            lambda: b"raw",
            "Error: TypeError: the result is a bytes, expected text, numbers, lists, dicts or a dataclass",
        ),
    ],
)
def test_a_hostile_tool_is_told_to_the_model(act: Any, content: str):
    outcome = perform(Tool("t", "", {"type": "object"}, act), call("t"))
    assert outcome == Outcome("error", content, None, outcome.error)
    assert outcome.error


def test_a_result_that_contains_itself():
    assert perform(Tool("t", "", {"type": "object"}, forever_nested), call("t")).content.startswith(
        "Error: RecursionError"
    )


def test_a_tool_gets_what_its_hints_say():
    seen: list[Any] = []

    def paint(colour: Colour, at: Point) -> None:
        seen.append((colour, at))

    perform(Tool.from_function(paint), call("paint", colour="red", at={"x": 1}))
    assert seen == [(Colour.RED, Point(1))]


def test_a_value_that_its_type_refuses_is_told_to_the_model():
    def on(day: datetime.date) -> None: ...

    assert perform(Tool.from_function(on), call("on", day="soon")).content.startswith("Error: ValueError: Invalid iso")


def test_a_tool_that_changes_its_arguments_changes_only_its_own():
    made = call("t", entries=[1])
    perform(Tool("t", "", {"type": "object"}, lambda entries: entries.append(2)), made)
    assert made.arguments == {"entries": [1]}


def test_a_coroutine_function_is_awaited():
    async def later(x: int) -> int:
        return x + 1

    assert perform(Tool.from_function(later), call("later", x=1)).content == "2"
