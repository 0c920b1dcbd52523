"""From the text of a call to name and arguments that can be sent: JSON, and values that get their type from schemas."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loopmux.codec import BODY_LIMITS

Call = tuple[str, dict[str, Any]]
"""A tool's name and the arguments."""
Schemas = Mapping[str, Mapping[str, set[str]]]
"""The JSON types of each parameter, by the tool's name."""

_DEEPEST = 64
"""Nesting of arguments; more is a model gone astray, and MessagePack refuses a few hundred."""
_WORDS = {"True": "true", "False": "false", "None": "null"}
"""What models that were trained on Python write for JSON's words."""
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


class MalformedCall(ValueError):
    """What the model wrote is no call; the message tells it why."""


def named(raw: str) -> Call:
    """A call as one JSON object: ``name``, and ``arguments`` or ``parameters``.

    Raises:
        ValueError: it is none; the message says why.
        RecursionError: it is nested absurdly deep.
    """
    value = read_json(raw)
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise MalformedCall(f'found {type(value).__name__}, expected {{"name": …, "arguments": {{…}}}}')
    key = "parameters" if "parameters" in value and "arguments" not in value else "arguments"
    return value.get("name", ""), as_arguments(value.get(key, {}), key)


def arguments(raw: str) -> dict[str, Any]:
    """Arguments as one JSON object, none at all for no text. Raises as ``named``."""
    return as_arguments(read_json(raw) if raw.strip() else {}, "arguments")


def as_arguments(value: object, key: str) -> dict[str, Any]:
    """Arguments that were found under ``key``. Raises as ``named``."""
    if isinstance(value, str):  # some models write the arguments as a JSON text once more
        value = read_json(value)
    if not isinstance(value, dict):
        raise MalformedCall(f'"{key}" is {type(value).__name__}, expected an object')
    return value


def read_json(text: str) -> Any:
    """A JSON value; raw line ends inside strings are taken, which small models write in code. Raises as ``named``."""
    return json.loads(text, strict=False, parse_constant=_no_constant)


def _no_constant(name: str) -> float:
    raise MalformedCall(f"{name} is not JSON")


def check(name: object, value: object) -> None:
    """Refuse what cannot be sent, or is no call at all.

    Raises:
        MalformedCall: it says why.
    """
    if not isinstance(name, str) or not name:
        raise MalformedCall('"name" is missing or no text')
    _check_value([name, value], 0)


def _check_value(value: object, depth: int) -> None:
    if depth > _DEEPEST:
        raise MalformedCall(f"nested deeper than {_DEEPEST}")
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise MalformedCall("a text holds half a surrogate pair") from None
        case float() if not math.isfinite(value):
            raise MalformedCall("a number is too large")
        case int() if not -(2**63) <= value < 2**64:  # the wire's numbers have 64 bits
            raise MalformedCall("a number is too large")
        case dict() if len(value) > BODY_LIMITS.map:  # else the client could not read the whole chunk
            raise MalformedCall(f"an object has more than {BODY_LIMITS.map} entries")
        case list() if len(value) > BODY_LIMITS.array:
            raise MalformedCall(f"a list has more than {BODY_LIMITS.array} entries")
        case dict():
            for key, entry in value.items():
                _check_value(key, depth)
                _check_value(entry, depth + 1)
        case list():
            for entry in value:
                _check_value(entry, depth + 1)


def schemas(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """The JSON types of each parameter of each tool."""
    functions = [_map(tool.get("function", tool)) for tool in tools]
    return {str(one.get("name")): _types_by_name(_map(one.get("parameters"))) for one in functions}


def _types_by_name(parameters: Mapping[str, Any]) -> dict[str, set[str]]:
    return {key: types_of(schema, parameters) for key, schema in _map(parameters.get("properties")).items()}


def _map(value: object) -> Mapping[str, Any]:
    """A schema comes from outside: what is no mapping says nothing."""
    return value if isinstance(value, Mapping) else {}


def typed(text: str, types: set[str]) -> Any:
    """A value that was written without quotes, of one of the types; what does not fit stays the text that it is."""
    if "string" in types:
        return None if "null" in types and text in ("null", "None") else text
    try:
        value = read_json(_WORDS.get(text.strip(), text))
    except (ValueError, RecursionError):
        return text
    return value if types or isinstance(value, (dict, list)) else text


def types_of(schema: object, root: Mapping[str, Any], seen: set[str] | None = None) -> set[str]:
    """The JSON types that a schema names, which is a part of ``root``; empty where it names none.

    Args:
        seen: references that were followed: each is, once, so that those in circles end.
    """
    known, seen = _map(schema), set() if seen is None else seen
    given = known.get("type")
    found = {kind for kind in ([given] if isinstance(given, str) else _list(given)) if isinstance(kind, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        for choice in _list(known.get(key)):
            found |= types_of(choice, root, seen)
    reference = known.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        found |= types_of(referred(reference, root), root, seen)
    literals = [known["const"]] if "const" in known else _list(known.get("enum"))
    return found or {_TYPES.get(type(one), "null") for one in literals}


def referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference to one of the definitions of ``root`` means; None where there is none."""
    start, _, rest = reference.partition("#/")
    kind, _, name = rest.partition("/")
    return _map(root.get(kind)).get(name) if not start and kind in ("$defs", "definitions") else None


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()
