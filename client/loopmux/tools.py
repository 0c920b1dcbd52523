"""Tools: functions that a model may call, with the schema it is shown and the check of what it sends.

A plain function is enough; its name, hints and docstring become the schema::

    def add(a: int, b: int) -> int:
        \"\"\"Add two numbers.\"\"\"
        return a + b

    client.run_tools("add 12 and 30", tools=[add])

``Tool`` sets more: a name, how dangerous it is, a time limit, or a hand-written schema.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, overload, runtime_checkable

from loopmux import codec, docstrings, schemacheck, shapes
from loopmux.errors import BadRequestError

Danger = Literal["safe", "warning", "dangerous"]
"""How careful a caller should be with a tool. A loop itself runs all alike: it is for ``before_tool`` to look at."""
DANGERS: tuple[Danger, ...] = ("safe", "warning", "dangerous")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What chat templates and other servers agree on for a function's name."""
LATER = 1.0
"""Seconds that a loop waits longer for a call than the server's own limit: that one's error names the server."""
_MOST_PROBLEMS = 5
"""Problems of one call that are told at once: more would not fit a small model's attention."""


class ToolError(Exception):
    """Raise it in a tool to tell the model why it failed, word for word; other exceptions are told with their type."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with everything that the model and the loop need to know of it.

    Attributes:
        name: letters, digits, ``_`` and ``-``, at most 64.
        description: what it is for, for the model.
        parameters: JSON schema of its arguments, of type object.
        function: called with the arguments by name; may be a coroutine function. Its result becomes text or JSON.
        danger: ``safe``, ``warning`` or ``dangerous``.
        timeout: seconds for one call; None takes the loop's ``tool_timeout``.
        strict: whether a model is held to the parameters, which the worker can guarantee; None: where a call is forced.
        convert: JSON arguments to what the function wants; set for tools made from functions, whose schema then is
            closed: arguments that it does not name are refused.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]
    danger: Danger = "safe"
    timeout: float | None = None
    strict: bool | None = None
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise BadRequestError(
                f"tool name {self.name!r}: expected 1 to 64 letters, digits, '_' and '-': "
                "give it another name with Tool.from_function(function, name='…')"
            )
        if not callable(self.function):
            raise BadRequestError(f"tool {self.name!r}: found {type(self.function).__name__}, expected a function")
        if not isinstance(self.parameters, Mapping) or self.parameters.get("type") != "object":
            raise BadRequestError(f'tool {self.name!r}: parameters must be a JSON schema with "type": "object"')
        if self.danger not in DANGERS:
            raise BadRequestError(f"tool {self.name!r}: danger is {self.danger!r}, expected {', '.join(DANGERS)}")
        if self.timeout is not None:
            check_seconds(self.timeout, f"tool {self.name!r}: timeout")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, unchecked: a decorated function stays usable."""
        return self.function(*args, **kwargs)

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        danger: Danger = "safe",
        timeout: float | None = None,
        strict: bool | None = None,
    ) -> Tool:
        """Make a tool of a function from its hints and docstring.

        Raises:
            BadRequestError: a parameter has no hint or one without a JSON form, or cannot be passed by name; the
                message names tool, parameter and remedy.
        """
        name = name or str(getattr(getattr(function, "func", function), "__name__", type(function).__name__))
        doc = docstrings.parse(_docstring(function))
        shape = _parameters(function, name, doc.parameters)
        text = doc.description if description is None else description
        return cls(name, text, shape.schema, function, danger, timeout, strict, shape.convert)

    @property
    def schema(self) -> dict[str, Any]:
        """The form in which chat templates take a tool."""
        function: dict[str, Any] = {"name": self.name, "description": self.description, "parameters": self.parameters}
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}

    def problems(self, arguments: dict[str, Any]) -> str | None:
        """What is wrong with a model's arguments, in one line for the model; None if they fit."""
        try:
            found = schemacheck.problems(self.parameters, arguments, closed=self.convert is not None)
        except Exception as error:  # noqa: BLE001 - servers bring schemas, and one that is none must not end a loop
            return f"none can be right, since the tool's JSON schema is malformed ({type(error).__name__}: {error})"
        return "; ".join(found[:_MOST_PROBLEMS]) or None

    def bind(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Checked arguments as the function wants them; always a copy, so that a tool may change what it gets.

        Raises:
            Exception: whatever a type in the hints raises for a value it does not take.
        """
        mine = copy.deepcopy(arguments)
        return self.convert(mine) if self.convert else mine


@runtime_checkable
class ToolSource(Protocol):
    """Something that has tools to offer, such as ``ToolServer``."""

    def tools(self) -> Sequence[Tool]:
        """Its tools, asked for once at the start of a loop."""
        ...


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    danger: Danger = "safe",
    timeout: float | None = None,
    strict: bool | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(function: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
    """Decorator that makes a function a ``Tool``: ``@tool`` or ``@tool(danger="dangerous", timeout=5)``."""
    if function is not None:
        return Tool.from_function(function)
    return lambda decorated: Tool.from_function(decorated, **settings)


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def check_seconds(value: Any, what: str) -> None:
    """Refuse a time limit that is none.

    Raises:
        BadRequestError: it is no number above 0.
    """
    if not is_positive(value) or sys.float_info.max < value < math.inf:  # an int may be larger than any time
        raise BadRequestError(f"{what}: found {codec.show(value)}, expected seconds above 0")


def collect(tools: Iterable[Any] | None) -> dict[str, Tool]:
    """Tools by name, from functions, ``Tool`` objects and sources.

    Raises:
        BadRequestError: something that cannot be run, a function that makes no tool, or a name used twice.
    """
    found = [made for entry in _entries(tools) for made in _made(entry)]
    _refuse_repeated([made.name for made in found])
    return {made.name: made for made in found}


def schemas(tools: Iterable[Any] | None) -> list[dict[str, Any]]:
    """What a model is shown: ``{"type": "function", "function": {…}}`` for each tool. Ready-made schemas pass through.

    Raises:
        BadRequestError: as ``collect``.
    """
    result: list[dict[str, Any]] = []
    for entry in _entries(tools):
        result += [_checked_schema(entry)] if isinstance(entry, Mapping) else [made.schema for made in _made(entry)]
    _refuse_repeated([schema["function"]["name"] for schema in result])
    return result


def _refuse_repeated(names: list[str]) -> None:
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise BadRequestError(
            f"two tools are named {repeated!r}: rename one with Tool.from_function(function, name='…'), "
            "or those of a server with MCPServer(…, name='…')"
        )


def _entries(tools: Iterable[Any] | None) -> list[Any]:
    if tools is None:
        return []
    if isinstance(tools, (Mapping, str, Tool)) or not isinstance(tools, Iterable):
        raise BadRequestError(f"tools: found {type(tools).__name__}, expected a list such as tools=[add]")
    return list(tools)


def _made(entry: Any) -> Sequence[Tool]:
    if isinstance(entry, Tool):
        return [entry]
    if isinstance(entry, Mapping):
        name = _checked_schema(entry)["function"]["name"]
        raise BadRequestError(
            f"tool {name!r} is a schema without a function, so no loop can run it: "
            "hand over the function, or Tool(name, description, parameters, function)"
        )
    if isinstance(entry, ToolSource) and not isinstance(entry, type):
        return entry.tools()
    if callable(entry):
        return [Tool.from_function(entry)]
    raise BadRequestError(f"tools: found {codec.show(entry)}, expected functions, Tool objects or tool sources")


def _checked_schema(entry: Mapping[str, Any]) -> dict[str, Any]:
    inner = entry.get("function", entry)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise BadRequestError(
            f"tools: found {codec.show(dict(entry))}, "
            'expected {"type": "function", "function": {"name": …, "description": …, "parameters": …}}'
        )
    return {"type": "function", "function": dict(inner)}


def _docstring(function: Any) -> str | None:
    target = getattr(function, "func", function)
    if inspect.isroutine(target) or inspect.isclass(target):
        return inspect.getdoc(target)
    return inspect.getdoc(type(target).__call__) or inspect.getdoc(target)


def _parameters(function: Callable[..., Any], name: str, docs: Mapping[str, str]) -> shapes.Shape:
    """The object shape of a function's parameters."""
    try:
        signature = inspect.signature(function)
        hints = shapes.hints_of(function)
    except (TypeError, ValueError) as error:
        raise BadRequestError(f"tool {name!r}: its parameters cannot be read: {error}") from error
    named: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        _check_parameter(parameter, name, hints)
        named[parameter.name] = hints[parameter.name]
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
    try:
        return shapes.Shapes().fields(named, docs, defaults)
    except shapes.HintError as error:
        guilty = next((p for p, hint in named.items() if _fails(hint)), "?")
        raise BadRequestError(f"tool {name!r}, parameter {guilty!r}: {error}") from error


def _check_parameter(parameter: inspect.Parameter, name: str, hints: Mapping[str, Any]) -> None:
    what = f"tool {name!r}, parameter {parameter}"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise BadRequestError(f"{what}: a model can only pass arguments that have names: write each one out")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise BadRequestError(f"{what}: it can only be passed by position: remove the '/' after it")
    if parameter.name not in hints and parameter.name in ("self", "cls"):
        raise BadRequestError(
            f"{what}: a method is a tool once it is bound: hand over that of an object, tools=[it.{name}]"
        )
    if parameter.name not in hints:
        raise BadRequestError(f"{what}: it has no type hint: write for example '{parameter.name}: str'")


def _fails(hint: Any) -> bool:
    try:
        shapes.Shapes().of(hint)
    except shapes.HintError:
        return True
    return False
