"""Check a value against a JSON schema and say what is wrong, in words that a model can act on.

Covers the validation keywords of JSON Schema 2020-12 that tool parameters use, with local ``$ref``; keywords that only
describe (``description``, ``format``, ``default`` …) and unknown ones are ignored, as the standard asks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: (isinstance(v, int) and not isinstance(v, bool)) or (isinstance(v, float) and v.is_integer()),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, Mapping),
}
_WORDS = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "an object",
}
_LONGEST_SHOWN = 60
_DEEPEST = 64
"""Levels of nesting that are checked; deeper values and schemas are refused instead of exhausting the stack."""


def problems(schema: Any, value: Any, *, closed: bool = False) -> list[str]:
    """Everything wrong with ``value``, ``[]`` if it fits; each entry is ``path: found …, expected …``.

    Args:
        schema: a JSON schema, a mapping or a boolean.
        value: what ``json.loads`` gives.
        closed: refuse properties that an object schema does not name, unless its ``additionalProperties`` says more.
    """
    return list(_Check(schema, closed).walk(schema, value, "", 0))


def show(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


class _Check:
    """One check: the root schema for ``$ref``, and the rule for unnamed properties."""

    def __init__(self, root: Any, closed: bool) -> None:
        self.root = root
        self.closed = closed

    def walk(self, schema: Any, value: Any, path: str, depth: int) -> Iterator[str]:
        if depth > _DEEPEST:
            yield f"{path or 'value'}: nested deeper than {_DEEPEST} levels"
            return
        if isinstance(schema, bool):
            if not schema:
                yield f"{path or 'value'}: found {show(value)}, expected nothing here"
            return
        if "$ref" in schema:
            yield from self.walk(self._resolve(schema["$ref"]), value, path, depth + 1)
        wrong = _wrong_type(schema, value)
        if wrong:
            yield f"{path or 'value'}: found {show(value)}, expected {wrong}"
            return
        yield from self._combined(schema, value, path, depth)
        match value:
            case str():
                yield from _text(schema, value, path)
            case bool() | None:
                pass
            case int() | float():
                yield from _number(schema, value, path)
            case list():
                yield from self._list(schema, value, path, depth)
            case Mapping():
                yield from self._object(schema, value, path, depth)

    def _resolve(self, reference: str) -> Any:
        node = self.root
        if not reference.startswith("#"):
            return True  # another document: nothing here can judge it
        for part in reference.removeprefix("#").split("/")[1:]:
            node = node.get(part.replace("~1", "/").replace("~0", "~"), True) if isinstance(node, Mapping) else True
        return node

    def _combined(self, schema: Mapping[str, Any], value: Any, path: str, depth: int) -> Iterator[str]:
        for part in schema.get("allOf", ()):
            yield from self.walk(part, value, path, depth + 1)
        if "anyOf" in schema:
            attempts = [list(self.walk(part, value, path, depth + 1)) for part in schema["anyOf"]]
            if all(attempts):
                yield _closest(attempts, value, path, schema["anyOf"])
        if "oneOf" in schema:
            attempts = [list(self.walk(part, value, path, depth + 1)) for part in schema["oneOf"]]
            fitting = sum(not attempt for attempt in attempts)
            if fitting == 0:
                yield _closest(attempts, value, path, schema["oneOf"])
            elif fitting > 1:
                yield f"{path or 'value'}: found {show(value)}, which fits {fitting} alternatives, expected exactly one"
        if "not" in schema and not list(self.walk(schema["not"], value, path, depth + 1)):
            yield f"{path or 'value'}: found {show(value)}, which is excluded"

    def _list(self, schema: Mapping[str, Any], value: list[Any], path: str, depth: int) -> Iterator[str]:
        yield from _size(schema, "Items", len(value), "entries", path)
        if schema.get("uniqueItems") and len({json.dumps(v, sort_keys=True) for v in value}) < len(value):
            yield f"{path or 'value'}: found repeated entries, expected each once"
        prefix, rest = schema.get("prefixItems", ()), schema.get("items", True)
        if isinstance(rest, list):  # how drafts before 2020-12 write it
            prefix, rest = rest, schema.get("additionalItems", True)
        for at, entry in enumerate(value):
            part = prefix[at] if at < len(prefix) else rest
            yield from self.walk(part, entry, f"{path}[{at}]", depth + 1)

    def _object(self, schema: Mapping[str, Any], value: Mapping[str, Any], path: str, depth: int) -> Iterator[str]:
        yield from _size(schema, "Properties", len(value), "properties", path)
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{_join(path, name)}: missing, expected {expected(known.get(name, True))}"
        patterns = schema.get("patternProperties", {})
        rest = schema.get("additionalProperties", not (self.closed and "properties" in schema))
        for name, entry in value.items():
            matching = [part for pattern, part in patterns.items() if _matches(pattern, name)]
            if name in known:
                matching.append(known[name])
            if not matching and rest is False:
                names = ", ".join(known) or "no arguments at all"
                yield f"{_join(path, name)}: unknown, expected {names}"
                continue
            for part in matching or [rest]:
                yield from self.walk(part, entry, _join(path, name), depth + 1)


def expected(schema: Any) -> str:
    """What a schema accepts, in a few words."""
    if not isinstance(schema, Mapping):
        return "a value"
    if "const" in schema:
        return show(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(show(v) for v in schema["enum"])
    kinds = schema.get("type")
    if kinds is None:
        parts = schema.get("anyOf") or schema.get("oneOf")
        return " or ".join(dict.fromkeys(map(expected, parts))) if parts else "a value"
    names = [kinds] if isinstance(kinds, str) else kinds
    return " or ".join(_WORDS.get(name, name) for name in names)


def _wrong_type(schema: Mapping[str, Any], value: Any) -> str | None:
    """What was expected where type, enum or const do not fit; None where they do."""
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    fits = not kinds or any(_TYPES.get(kind, _anything)(value) for kind in kinds)
    if fits and "enum" in schema:
        fits = any(_same(value, choice) for choice in schema["enum"])
    if fits and "const" in schema:
        fits = _same(value, schema["const"])
    return None if fits else expected(schema)


def _anything(value: Any) -> bool:  # noqa: ARG001 - an unknown type name decides nothing
    return True


def _same(a: Any, b: Any) -> bool:
    """JSON equality: unlike Python's, true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _closest(attempts: list[list[str]], value: Any, path: str, parts: list[Any]) -> str:
    """The report for a value that fits no alternative: what is wrong inside the one that it nearly fits, if any."""
    here = f"{path or 'value'}: found "
    inside = [attempt for attempt in attempts if not attempt[0].startswith(here)]
    if inside:
        return min(inside, key=len)[0]
    return f"{here}{show(value)}, expected {' or '.join(dict.fromkeys(map(expected, parts)))}"


def _text(schema: Mapping[str, Any], value: str, path: str) -> Iterator[str]:
    yield from _size(schema, "Length", len(value), "characters", path)
    if "pattern" in schema and not _matches(schema["pattern"], value):
        yield f"{path or 'value'}: found {show(value)}, expected a text that matches {schema['pattern']}"


def _matches(pattern: str, text: str) -> bool:
    try:
        return re.search(pattern, text) is not None
    except re.error:
        return True  # schemas are written for ECMAScript: what Python cannot read, the tool itself has to judge


def _number(schema: Mapping[str, Any], value: float, path: str) -> Iterator[str]:
    rules: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
        ("minimum", "at least", lambda v, bound: v >= bound),
        ("maximum", "at most", lambda v, bound: v <= bound),
        ("exclusiveMinimum", "more than", lambda v, bound: v > bound),
        ("exclusiveMaximum", "less than", lambda v, bound: v < bound),
        ("multipleOf", "a multiple of", _is_multiple),
    )
    for keyword, words, fits in rules:
        bound = schema.get(keyword)
        # draft 4 has true and false for the exclusive ones: then the bound itself is left to the tool to refuse
        if bound is not None and not isinstance(bound, bool) and not fits(value, bound):
            yield f"{path or 'value'}: found {show(value)}, expected {words} {bound}"


def _is_multiple(value: float, of: float) -> bool:
    return of == 0 or math.isclose(value / of, round(value / of), abs_tol=1e-9)


def _size(schema: Mapping[str, Any], suffix: str, size: int, unit: str, path: str) -> Iterator[str]:
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    if low is not None and size < low:
        yield f"{path or 'value'}: found {size} {unit}, expected at least {low}"
    if high is not None and size > high:
        yield f"{path or 'value'}: found {size} {unit}, expected at most {high}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
