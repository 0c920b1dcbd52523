"""The check of values against JSON schemas: every keyword, and reports that a model can act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmux.schemacheck import problems

GOOD: list[tuple[Any, Any]] = [
    (True, 1),
    ({}, {"a": [1]}),
    ({"type": "integer"}, 3),
    ({"type": "integer"}, 3.0),
    ({"type": ["integer", "null"]}, None),
    ({"type": "number"}, 2.5),
    ({"type": "made-up"}, 1),
    ({"enum": [1, "a"]}, "a"),
    ({"const": {"a": 1}}, {"a": 1}),
    ({"type": "string", "minLength": 1, "maxLength": 2, "pattern": "^a"}, "ab"),
    ({"type": "string", "pattern": "\\p{L}"}, "no Python pattern"),
    ({"minimum": 1, "maximum": 3, "exclusiveMinimum": 0, "exclusiveMaximum": 4, "multipleOf": 0.1}, 2.3),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2, "uniqueItems": True}, [1, 2]),
    ({"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, [1, "a", "b"]),
    ({"items": [{"type": "integer"}, {"type": "string"}]}, [1, "a", None]),
    ({"minimum": 1, "exclusiveMinimum": True, "maximum": 2, "exclusiveMaximum": False}, 1.5),
    ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"a": 1, "b": 2}),
    ({"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}, {"xy": 1}),
    ({"additionalProperties": {"type": "integer"}}, {"a": 1}),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, 1),
    ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, 2),
    ({"not": {"type": "null"}}, 1),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, 1),
    ({"$ref": "https://elsewhere/schema"}, 1),
    ({"description": "d", "format": "date", "default": 3, "x-own": True}, "not a date"),
]


@pytest.mark.parametrize(("schema", "value"), GOOD)
def test_a_value_that_fits(schema: Any, value: Any):
    assert problems(schema, value) == []


BAD: list[tuple[Any, Any, str]] = [
    (False, 1, "value: found 1, expected nothing here"),
    ({"type": "integer"}, True, "value: found true, expected a whole number"),
    ({"type": "integer"}, 2.5, "value: found 2.5, expected a whole number"),
    ({"type": "number"}, float("nan"), "value: found NaN, expected a number"),
    ({"type": "boolean"}, 1, "value: found 1, expected true or false"),
    ({"type": ["integer", "null"]}, "a", 'value: found "a", expected a whole number or null'),
    ({"type": "object"}, [], "value: found [], expected an object"),
    ({"type": "null"}, "é", 'value: found "é", expected null'),
    ({"enum": [1, "a"]}, True, 'value: found true, expected one of 1, "a"'),
    ({"const": 1}, 2, "value: found 2, expected 1"),
    ({"minLength": 2}, "a", "value: found 1 characters, expected at least 2"),
    ({"maxLength": 2}, "abc", "value: found 3 characters, expected at most 2"),
    ({"pattern": "^a$"}, "b", 'value: found "b", expected a text that matches ^a$'),
    ({"minimum": 2}, 1, "value: found 1, expected at least 2"),
    ({"maximum": 2}, 3, "value: found 3, expected at most 2"),
    ({"exclusiveMinimum": 2}, 2, "value: found 2, expected more than 2"),
    ({"exclusiveMaximum": 2}, 2, "value: found 2, expected less than 2"),
    ({"multipleOf": 2}, 3, "value: found 3, expected a multiple of 2"),
    ({"minItems": 1}, [], "value: found 0 entries, expected at least 1"),
    ({"maxItems": 1}, [1, 2], "value: found 2 entries, expected at most 1"),
    ({"uniqueItems": True}, [{"a": 1}, {"a": 1}], "value: found repeated entries, expected each once"),
    ({"items": {"type": "integer"}}, [1, "a"], '[1]: found "a", expected a whole number'),
    ({"prefixItems": [{"type": "null"}]}, [1], "[0]: found 1, expected null"),
    ({"items": [{"type": "null"}]}, [1], "[0]: found 1, expected null"),
    ({"items": [{}], "additionalItems": False}, [1, 2], "[1]: found 2, expected nothing here"),
    ({"required": ["a"], "properties": {"a": {"type": "integer"}}}, {}, "a: missing, expected a whole number"),
    ({"additionalProperties": False, "properties": {"a": {}}}, {"b": 1}, "b: unknown, expected a"),
    ({"additionalProperties": False}, {"b": 1}, "b: unknown, expected no arguments at all"),
    ({"minProperties": 1}, {}, "value: found 0 properties, expected at least 1"),
    ({"properties": {"a": {"items": {"minimum": 1}}}}, {"a": [0]}, "a[0]: found 0, expected at least 1"),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "a", 'value: found "a", expected a whole number or null'),
    ({"anyOf": [{"type": "null"}, {"required": ["a"]}]}, {}, "a: missing, expected a value"),
    ({"oneOf": [{"minimum": 1}, {"minimum": 2}]}, 3, "value: found 3, which fits 2 alternatives, expected exactly one"),
    ({"not": {"type": "null"}}, None, "value: found null, which is excluded"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, "x", 'value: found "x", expected a whole number'),
]


@pytest.mark.parametrize(("schema", "value", "said"), BAD)
def test_a_value_that_does_not_fit(schema: Any, value: Any, said: str):
    assert problems(schema, value) == [said]


def test_every_problem_is_told():
    schema = {"properties": {"a": {"type": "integer"}, "b": {"minimum": 1}}, "required": ["c"]}
    assert problems(schema, {"a": "x", "b": 0}) == [
        "c: missing, expected a value",
        'a: found "x", expected a whole number',
        "b: found 0, expected at least 1",
    ]


def test_closed_schemas_refuse_what_they_do_not_name_at_every_depth():
    schema = {"properties": {"a": {"properties": {"b": {}}}, "free": {"type": "object"}}}
    value = {"a": {"c": 1}, "d": 2, "free": {"x": 1}}
    assert problems(schema, value) == []
    assert problems(schema, value, closed=True) == ["a.c: unknown, expected b", "d: unknown, expected a, free"]


def test_a_schema_that_refers_to_itself_ends():
    assert "nested deeper" in problems({"$ref": "#"}, 1)[0]
    tree = {"properties": {"kids": {"items": {"$ref": "#"}}, "n": {"type": "integer"}}}
    assert problems(tree, {"kids": [{"kids": [{"n": "x"}]}]}) == [
        'kids[0].kids[0].n: found "x", expected a whole number'
    ]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (lambda part: {"allOf": [part]}, lambda entry: entry),
        (lambda part: {"anyOf": [part]}, lambda entry: entry),
        (lambda part: {"oneOf": [part]}, lambda entry: entry),
        (lambda part: {"items": part}, lambda entry: [entry]),
        (lambda part: {"prefixItems": [part]}, lambda entry: [entry]),
        (lambda part: {"properties": {"a": part}}, lambda entry: {"a": entry}),
        (lambda part: {"patternProperties": {"a": part}}, lambda entry: {"a": entry}),
        (lambda part: {"additionalProperties": part}, lambda entry: {"a": entry}),
    ],
)
def test_sixty_four_levels_of_any_keyword_are_checked(schema: Callable[[Any], Any], value: Callable[[Any], Any]):
    deep_schema: Any = {"type": "null"}
    deep_value: Any = 1
    for _ in range(64):
        deep_schema, deep_value = schema(deep_schema), value(deep_value)
    assert problems(deep_schema, deep_value)[0].endswith("found 1, expected null")
    assert problems(schema(deep_schema), value(deep_value))[0].endswith("nested deeper than 64 levels")


def test_long_values_are_shortened():
    assert len(problems({"type": "null"}, "x" * 10_000)[0]) < 120


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_a_value_fits_its_own_const_and_enum(value: Any):
    assert problems({"const": value}, value) == []
    assert problems({"enum": ["other", value]}, value) == []
    assert problems({"not": {"const": value}}, value) != []
