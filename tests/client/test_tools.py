"""Functions and other things as tools: their schemas, and the errors of those that cannot be tools."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from loopmux.errors import BadRequestError
from loopmux.tools import Tool, collect, schemas, tool


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first one
        b: the second one
    """
    return a + b


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first one"},
                "b": {"type": "integer", "description": "the second one", "default": 2},
            },
            "required": ["a"],
        },
    },
}


def test_a_plain_function_becomes_a_schema():
    assert schemas([add]) == [ADD]


def test_a_function_without_parameters_has_an_empty_object():
    def now() -> str:
        return "noon"

    assert schemas([now])[0]["function"] == {
        "name": "now",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }


def test_schemas_pass_through_and_keep_their_place():
    bare = {"name": "other", "parameters": {"type": "object"}}
    assert schemas([bare, add, ADD | {"function": ADD["function"] | {"name": "third"}}]) == [
        {"type": "function", "function": bare},
        ADD,
        {"type": "function", "function": ADD["function"] | {"name": "third"}},
    ]


def test_no_tools():
    assert schemas(None) == schemas([]) == []
    assert collect(None) == {}


class Shop:
    def price(self, item: str) -> float:
        """Price of an item."""
        return len(item)

    def __call__(self, item: str) -> bool:
        """Buy an item."""
        return True


def test_bound_methods_partials_and_callable_objects():
    (price,) = collect([Shop().price]).values()
    assert price.name == "price"
    assert list(price.parameters["properties"]) == ["item"]
    partial = Tool.from_function(functools.partial(add, b=3))
    assert partial.name == "add"
    assert partial.parameters["required"] == ["a"]
    shop = Tool.from_function(Shop())
    assert (shop.name, shop.description) == ("Shop", "Buy an item.")


class Described:
    """An object with a docstring of its own and parameters to make it."""

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, more: int) -> int:
        """Add to it."""
        return self.base + more


def test_an_object_and_its_class_are_tools_with_the_hints_of_what_is_called():
    assert Described.__annotations__ == {}  # once it was asked for, its instances have it as well
    for made, parameter in ((Described(1), "more"), (Described, "base")):
        assert Tool.from_function(made).parameters["properties"] == {parameter: {"type": "integer"}}


def test_what_a_function_returns_need_not_be_known():
    def frame(rows: int) -> "Frame":  # noqa: F821, UP037
        return rows

    @functools.wraps(frame)
    def wrapped(*args: Any, **named: Any) -> Any:
        return frame(*args, **named)

    for made in (frame, wrapped):
        assert Tool.from_function(made).parameters["properties"] == {"rows": {"type": "integer"}}


def test_the_decorator_keeps_the_function_callable():
    @tool
    def twice(x: int) -> int:
        return 2 * x

    @tool(name="remove", danger="dangerous", timeout=5)
    def delete(path: str) -> None:
        """Delete a file."""

    assert twice(4) == 8
    assert (delete.name, delete.danger, delete.timeout, delete.description) == (
        "remove",
        "dangerous",
        5,
        "Delete a file.",
    )
    assert [s["function"]["name"] for s in schemas([twice, delete])] == ["twice", "remove"]


def test_a_source_of_tools():
    class Source:
        def tools(self) -> list[Tool]:
            return [Tool.from_function(add), Tool.from_function(add, name="plus")]

    assert list(collect([Source()])) == ["add", "plus"]


def no_hint(a, b: int):
    return a


def star(*numbers: int) -> int:
    return 0


def keywords(**options: str) -> int:
    return 0


def positional(a: int, /) -> int:
    return a


def odd_type(good: int, when: memoryview) -> int:
    return good


def unknown_name(a: "Missing") -> int:  # noqa: F821, UP037
    return 0


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (no_hint, ["'no_hint'", "parameter a", "no type hint", "'a: str'"]),
        (star, ["'star'", "*numbers", "write each one out"]),
        (keywords, ["'keywords'", "**options", "write each one out"]),
        (Shop.price, ["'price'", "parameter self", "hand over that of an object, tools=[it.price]"]),
        (positional, ["'positional'", "remove the '/'"]),
        (odd_type, ["'odd_type'", "'when'", "memoryview", "use str, int"]),
        (unknown_name, ["'unknown_name'", "Missing", "import its type"]),
        (lambda x: x, ["'<lambda>'"]),
    ],
)
def test_what_cannot_be_a_tool_is_named_with_the_remedy(function: Any, said: list[str]):
    with pytest.raises(BadRequestError) as caught:
        schemas([function])
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["read file", "größe", "", "a" * 65, "x.y", "<lambda>"])
def test_a_name_that_templates_do_not_take(name: str):
    with pytest.raises(BadRequestError, match="letters, digits"):
        Tool(name, "", {"type": "object"}, add)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parameters": {"type": "string"}}, '"type": "object"'),
        ({"parameters": []}, '"type": "object"'),
        ({"function": 3}, "expected a function"),
        ({"danger": "none"}, "safe, warning, dangerous"),
        ({"timeout": 0}, "above 0"),
    ],
)
def test_a_tool_with_wrong_settings(settings: dict[str, Any], said: str):
    good: dict[str, Any] = {"name": "t", "description": "", "parameters": {"type": "object"}, "function": add}
    with pytest.raises(BadRequestError, match="tool 't'") as caught:
        Tool(**(good | settings))
    assert said in str(caught.value)


def test_two_tools_of_one_name():
    for make in (collect, schemas):
        with pytest.raises(BadRequestError, match="two tools are named 'add'"):
            make([add, Tool.from_function(Shop().price, name="add")])
    with pytest.raises(BadRequestError, match="two tools are named 'add'"):
        schemas([add, ADD])


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (add, "tools=[add]"),
        (ADD, "tools=[add]"),
        ("add", "tools=[add]"),
        ([3], "expected functions"),
        (["add"], "expected functions"),
        ([ENDLESS], "expected functions"),
        ([{"type": "function"}], '"function": {"name"'),
        ([{"type": "function", "function": "add"}], '"function": {"name"'),
    ],
)
def test_tools_that_are_no_list_of_tools(tools: Any, said: str):
    with pytest.raises(BadRequestError) as caught:
        schemas(tools)
    assert said in str(caught.value)


def test_a_schema_alone_cannot_be_run():
    with pytest.raises(BadRequestError, match="schema without a function"):
        collect([ADD])


def test_arguments_are_checked_and_unknown_ones_refused():
    made = Tool.from_function(add)
    assert made.problems({"a": 1}) is None
    assert made.problems({"a": "1"}) == 'a: found "1", expected a whole number'
    assert made.problems({"b": 1, "c": 2}) == "a: missing, expected a whole number; c: unknown, expected a, b"


def test_a_hand_written_schema_says_itself_whether_it_is_closed():
    open_one = Tool("t", "", {"type": "object", "properties": {"a": {"type": "integer"}}}, add)
    closed = Tool("t", "", {**open_one.parameters, "additionalProperties": False}, add)
    assert open_one.problems({"b": 1}) is None
    assert closed.problems({"b": 1}) == "b: unknown, expected a"


@pytest.mark.parametrize("broken", [{"required": True}, {"properties": ["a"]}, {"properties": {"a": {"enum": 1}}}])
def test_a_schema_of_a_server_that_is_none_makes_its_calls_errors(broken: dict[str, Any]):
    made = Tool("t", "", {"type": "object"} | broken, add)
    assert "the tool's JSON schema is malformed (" in str(made.problems({"a": 1}))


def test_only_the_first_problems_are_told():
    def wide(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None: ...

    assert str(Tool.from_function(wide).problems({})).count("missing") == 5


def test_bound_arguments_are_copies():
    given = {"entries": [1, 2]}
    made = Tool("t", "", {"type": "object"}, add)
    made.bind(given)["entries"].append(3)
    assert given == {"entries": [1, 2]}


@pytest.mark.parametrize("strict", [True, False])
def test_strict_is_said_where_it_was_said(strict):
    assert schemas([tool(strict=strict)(add)]) == [ADD | {"function": ADD["function"] | {"strict": strict}}]
