"""Every kind of type hint: the schema that a model sees, and the value that the function gets."""

from __future__ import annotations

import datetime
import decimal
import enum
import pathlib
import sys
import typing
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, TypedDict, Union

import pydantic
import pytest

from loopmux import schemacheck
from loopmux.shapes import HintError, Shapes


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Handler(enum.Enum):
    LIST = list
    DICT = dict


class Mixed(enum.Enum):
    """Values of which not all have a JSON form: then all go by their names."""

    ONE = 1
    PAIR = (1, 2)


@dataclass
class Painted:
    colour: Colour = Colour.BLUE
    level: Level = Level.LOW
    handler: Handler | None = Handler.DICT
    mixed: Mixed = Mixed.ONE
    only: Literal[Mixed.ONE] = Mixed.ONE


@dataclass
class Point:
    """A place.

    Attributes:
        x: to the right
    """

    x: int
    y: float = 0.0
    tags: list[str] = field(default_factory=list)


@dataclass
class Tree:
    name: str
    children: list[Tree] = field(default_factory=list)


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


class Address(pydantic.BaseModel):
    city: str = pydantic.Field(description="where")
    zip: int | None = None


class Person(pydantic.BaseModel):
    name: str
    home: Address
    friends: list[Person] = []


UserId = NewType("UserId", int)


class Alias:
    """What the statement ``type Json = …`` of Python 3.12 makes: its value is looked at when it is asked for."""

    __value__ = property(lambda self: dict[str, Json] | list[Json] | Colour)


Json: Any = Alias()
if sys.version_info >= (3, 12):
    exec("type Json = dict[str, Json] | list[Json] | Colour")


ReadOnly: Any = getattr(typing, "ReadOnly", typing.Required)  # Python 3.13 has it


class Fixed(TypedDict):
    year: ReadOnly[int]


CASES: list[tuple[Any, dict[str, Any], Any, Any]] = [
    (int, {"type": "integer"}, 3.0, 3),
    (float, {"type": "number"}, 3, 3.0),
    (bool, {"type": "boolean"}, True, True),
    (str, {"type": "string"}, "a", "a"),
    (None, {"type": "null"}, None, None),
    (Any, {}, {"free": 1}, {"free": 1}),
    (UserId, {"type": "integer"}, 3, 3),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}, "b", "b"),
    (Literal[1, "x", None], {"enum": [1, "x", None]}, None, None),
    (Literal[True], {"type": "boolean", "enum": [True]}, True, True),
    (Colour, {"type": "string", "enum": ["red", "blue"]}, "blue", Colour.BLUE),
    (Level, {"type": "integer", "enum": [1, 2]}, 2, Level.HIGH),
    (Handler, {"type": "string", "enum": ["LIST", "DICT"]}, "DICT", Handler.DICT),
    (Literal[Colour.RED], {"type": "string", "enum": ["red"]}, "red", Colour.RED),
    (Optional[int], {"type": ["integer", "null"]}, None, None),  # noqa: UP045 - both spellings
    (int | None, {"type": ["integer", "null"]}, 4, 4),
    (Union[int, str], {"type": ["integer", "string"]}, "x", "x"),  # noqa: UP007 - both spellings
    (
        Colour | None,
        {"anyOf": [{"type": "string", "enum": ["red", "blue"]}, {"type": "null"}]},
        "red",
        Colour.RED,
    ),
    (int | list[int], {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}, [1], [1]),
    (list, {"type": "array"}, [1, "a"], [1, "a"]),
    (list[int], {"type": "array", "items": {"type": "integer"}}, [1], [1]),
    (Sequence[Colour], {"type": "array", "items": {"type": "string", "enum": ["red", "blue"]}}, ["red"], [Colour.RED]),
    (set[str], {"type": "array", "items": {"type": "string"}, "uniqueItems": True}, ["a"], {"a"}),
    (frozenset[int], {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [1], frozenset([1])),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}, [1, 2], (1, 2)),
    (
        tuple[int, str],
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
        [1, "a"],
        (1, "a"),
    ),
    (dict, {"type": "object"}, {"a": 1}, {"a": 1}),
    (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1}, {"a": 1}),
    (
        Mapping[str, list[float]],
        {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
        {"a": [1]},
        {"a": [1.0]},
    ),
    (pathlib.Path, {"type": "string"}, "/tmp", pathlib.Path("/tmp")),
    (datetime.date, {"type": "string", "format": "date"}, "2026-01-02", datetime.date(2026, 1, 2)),
    (
        datetime.datetime,
        {"type": "string", "format": "date-time"},
        "2026-01-02T03:04:05",
        datetime.datetime(2026, 1, 2, 3, 4, 5),
    ),
    (decimal.Decimal, {"type": "string", "format": "decimal"}, "1.10", decimal.Decimal("1.10")),
    (uuid.UUID, {"type": "string", "format": "uuid"}, "0" * 32, uuid.UUID(int=0)),
    (Annotated[int, "how many"], {"type": "integer", "description": "how many"}, 1, 1),
    (
        Annotated[int, pydantic.Field(description="how many", ge=1, lt=10)],
        {"type": "integer", "description": "how many", "minimum": 1, "exclusiveMaximum": 10},
        1,
        1,
    ),
    (Annotated[str, pydantic.Field(min_length=2)], {"type": "string", "minLength": 2}, "ab", "ab"),
    (
        Annotated[list[int], pydantic.Field(max_length=3)],
        {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        [1],
        [1],
    ),
    (
        Point,
        {
            "type": "object",
            "properties": {
                "x": {"type": "integer", "description": "to the right"},
                "y": {"type": "number", "default": 0.0},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["x"],
        },
        {"x": 1, "tags": ["a"]},
        Point(1, 0.0, ["a"]),
    ),
    (
        Painted,
        {
            "type": "object",
            "properties": {
                "colour": {"type": "string", "enum": ["red", "blue"], "default": "blue"},
                "level": {"type": "integer", "enum": [1, 2], "default": 1},
                "handler": {
                    "anyOf": [{"type": "string", "enum": ["LIST", "DICT"]}, {"type": "null"}],
                    "default": "DICT",
                },
                "mixed": {"type": "string", "enum": ["ONE", "PAIR"], "default": "ONE"},
                "only": {"type": "string", "enum": ["ONE"], "default": "ONE"},
            },
        },
        {"colour": "red", "mixed": "PAIR", "only": "ONE"},
        Painted(Colour.RED, mixed=Mixed.PAIR),
    ),
    (
        Tree,
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"type": "object"}},
            },
            "required": ["name"],
        },
        {"name": "a", "children": [{"name": "b"}]},
        Tree("a", [Tree("b")]),
    ),
    (
        Fixed,
        {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]},
        {"year": 2026},
        {"year": 2026},
    ),
    (
        Json,
        {"anyOf": [{"type": "object"}, {"type": "array"}, {"type": "string", "enum": ["red", "blue"]}]},
        {"a": ["red", {"b": "blue"}]},
        {"a": [Colour.RED, {"b": Colour.BLUE}]},
    ),
    (
        Movie,
        {
            "type": "object",
            "properties": {"title": {"type": "string"}, "year": {"type": "integer"}},
            "required": ["title"],
        },
        {"title": "M", "year": 1931.0},
        {"title": "M", "year": 1931},
    ),
    (
        Person,
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "home": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "where"},
                        "zip": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
                    },
                    "required": ["city"],
                },
                "friends": None,
            },
            "required": ["name", "home"],
        },
        {"name": "A", "home": {"city": "B"}},
        Person(name="A", home=Address(city="B")),
    ),
]


@pytest.mark.parametrize(("hint", "schema", "sent", "got"), CASES, ids=lambda v: str(v)[:30])
def test_a_hint_in_both_directions(hint: Any, schema: dict[str, Any], sent: Any, got: Any):
    shape = Shapes().of(hint)
    if hint is Person:  # a model that contains itself: how deep pydantic unrolls it is its own affair
        friends = shape.schema["properties"].pop("friends")
        schema["properties"].pop("friends", None)
        assert "$ref" not in str(friends)
        assert friends["type"] == "array"
    assert shape.schema == schema
    assert schemacheck.problems(shape.schema, sent, closed=True) == []
    made = shape.convert(sent)
    assert made == got
    assert type(made) is type(got)


@pytest.mark.parametrize("hint", [bytes, complex, memoryview, type, dict[int, str], Literal[b"x"], list[object()]])
def test_a_hint_without_a_json_form_is_refused(hint: Any):
    with pytest.raises(HintError):
        Shapes().of(hint)


def test_nested_values_are_converted_deep_down():
    shape = Shapes().of(dict[str, list[tuple[Colour, Point]] | None])
    assert shape.convert({"a": [["red", {"x": 1}]], "b": None}) == {"a": [(Colour.RED, Point(1))], "b": None}


def test_a_union_takes_the_first_alternative_that_fits():
    shape = Shapes().of(Point | Movie | Colour)
    assert shape.convert({"x": 1}) == Point(1)
    assert shape.convert({"title": "M"}) == {"title": "M"}
    assert shape.convert("red") is Colour.RED


@pytest.mark.parametrize("hint", [datetime.date | Literal["today"], datetime.date | str, decimal.Decimal | Colour])
def test_a_text_that_one_alternative_cannot_read_is_the_next_ones(hint: Any):
    text, value = {decimal.Decimal | Colour: ("red", Colour.RED)}.get(hint, ("today", "today"))
    assert Shapes().of(hint).convert(text) == value


def test_a_text_that_no_alternative_can_read_is_told_by_the_first():
    with pytest.raises(ValueError, match="Invalid isoformat string: 'soon'"):
        Shapes().of(datetime.date | None).convert("soon")


@pytest.mark.parametrize(
    ("child", "problem"),
    [
        ({"title": "b"}, "name: missing, expected a text; title: unknown, expected name, children"),
        ({"name": 1}, "name: "),
    ],
)
def test_what_a_type_holds_of_itself_is_checked_in_words(child: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        Shapes().of(Tree).convert({"name": "a", "children": [child]})


@dataclass
class Flat:
    x: int


def test_what_an_alias_holds_of_itself_is_checked_in_words():
    with pytest.raises(ValueError, match="found 1, expected"):
        Shapes().of(Json).convert({"a": ["red", 1]})


def test_an_alternative_does_not_fit_a_value_with_more_than_it_knows():
    shape = Shapes().of(Flat | Point)
    assert shape.convert({"x": 1}) == Flat(1)
    assert shape.convert({"x": 1, "y": 2}) == Point(1, 2.0)
