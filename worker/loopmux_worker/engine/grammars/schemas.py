"""JSON schemas as outputs are held to them: what they allow, less what could not be read back. Pure.

Two things are narrower than the schema says. Numbers stay within what the wire has room for, also in values of which it
says nothing. And an object has no properties that its schema does not name, unless that has ``additionalProperties``:
so do the client's own checks read the parameters of a function, and a model left to itself would invent some.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any
from urllib.parse import unquote

from loopmux.errors import BadRequestError

_LARGEST = 2**62
"""What llguidance makes ranges of; the wire has twice as much."""
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space where chat templates write it. Left to the model it may go on for ever."""
_MOST = 1000
"""Objects in one schema. Alternatives that refer to each other make a step slower by the square of their number."""
_COARSEST = 1000
"""The digits of ``multipleOf`` as a whole number: llguidance has a state for each remainder, and compiles millions of
them without an end."""
_LONGEST = 8192
"""Characters of one text that a schema spells out, in a pattern counted as often as it repeats them. A step takes time
in proportion: 10 ms for so many."""
_MANY = 8
"""Alternatives that cost nothing worth a look."""
DESCRIBE = frozenset(
    {"title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id", "$defs", "definitions"}
)
"""Keywords that allow everything."""
_COMBINE = frozenset({"allOf", "anyOf", "oneOf", "$ref", "enum", "const"})
_OPEN = {"object": "additionalProperties", "array": "items"}
_KINDS = ("null", "boolean", "number", "string", "array", "object")
_SHARED = {kind: {"$ref": f"#/$defs/loopmux-{kind}"} for kind in ("integer", "number", "any")}
"""What is the same wherever a schema has it; ranges of numbers cost so much that a few hundred are too many."""
_DEFINITIONS: dict[str, Any] = {
    **{f"loopmux-{kind}": {"type": kind, "minimum": -_LARGEST, "maximum": _LARGEST} for kind in ("integer", "number")},
    "loopmux-any": {
        "anyOf": [
            *({"type": kind} for kind in ("null", "boolean", "string")),
            _SHARED["number"],
            {"type": "array", "items": _SHARED["any"]},
            {"type": "object", "additionalProperties": _SHARED["any"]},
        ]
    },
}
_PARTS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d{1,9})(?:,(\d{0,9}))?\}|.", re.DOTALL)
"""Of a regular expression: an escape, a class, a counted repetition, a character."""
_CLASSES = frozenset(f"\\{letter}" for letter in "dDwWsSbBpP")
_VALUES = frozenset({"enum", "const", "default", "examples"})
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")


def arguments(parameters: object, path: str) -> dict[str, Any]:
    """The schema that the arguments of a call are held to.

    Raises:
        BadRequestError: it is no schema of an object.
    """
    if not isinstance(parameters, Mapping):
        raise BadRequestError(f"{path}: found {type(parameters).__name__}, expected a JSON schema")
    if (kind := parameters.get("type", "object")) != "object":
        raise BadRequestError(f"{path}.type: found {kind!r}, expected 'object': arguments are given by name")
    return held({"type": "object", **parameters}, path)


def held(schema: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A schema as a grammar is made from it, its layout included.

    Raises:
        BadRequestError: it holds something that is no JSON, is nested too deep, or has too many parts or remainders.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
        intersects = _intersects(schema)
        closed = dict(schema) if intersects else _closed(schema)
        steps = list(_steps(schema))
        coarsest = max([steps] if intersects else [[step] for step in steps], key=_remainders, default=[])
        required, longest = _most_required(schema), max(_lengths(schema), default=0)
        strays = [part["$ref"] for part in _mappings(schema) if _strays(part.get("$ref"))]
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequestError(f"{path}: expected a JSON schema, found something that is none: {error}") from None
    for found, what in ((text.count("{"), "objects"), (required, "required properties in one object")):
        if found > _MOST:
            raise BadRequestError(f"{path}: found {found} {what}, expected at most {_MOST}: use a smaller schema")
    if longest > _LONGEST:
        raise BadRequestError(
            f"{path}: found a text or pattern that spells out {longest} characters, expected at most {_LONGEST}: use a "
            "shorter one, or minLength and maxLength"
        )
    if strays:
        raise BadRequestError(
            f"{path}: found $ref {strays[0]!r}, expected one that leads to a schema: put it into $defs"
        )
    if _remainders(coarsest) > _COARSEST:
        raise BadRequestError(
            f"{path}: found multipleOf {' and '.join(map(str, coarsest))}, expected at most {_COARSEST}, decimals "
            "counted as digits: leave it out and check the value"
        )
    return {**closed, "x-guidance": LAYOUT}


def bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema as JSON is written by it: no number, also in what it leaves open, is too large to be read."""
    if _intersects(schema):  # what it leaves open in one place may be named in another
        return dict(_bounded(schema, shared=False))
    made = _bounded(schema, shared=True)
    if "#/$defs/loopmux-" not in json.dumps(made):
        return dict(made)
    return {**made, "$defs": {**made.get("$defs", {}), **_DEFINITIONS}}


def _bounded(schema: Any, *, shared: bool) -> Any:
    """``shared``: with references to ``_DEFINITIONS``; else what is left open stays as it is."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        return schema
    apart = {key: part for key, part in schema.items() if key == "oneOf"}  # by what they are, not by references
    made = _mapped({key: part for key, part in schema.items() if key != "oneOf"}, partial(_bounded, shared=shared))
    made |= _mapped(apart, partial(_bounded, shared=False))
    kinds = made.get("type", _KINDS if shared and not made.keys() & _COMBINE else ())
    if shared and not made.keys() - DESCRIBE - {"type"}:
        if "type" not in made:
            return _SHARED["any"]
        if kinds in ("integer", "number"):
            return _SHARED[kinds]
    kinds = kinds if isinstance(kinds, (list, tuple)) else [kinds]
    if shared and not made.keys() & _COMBINE:
        made["type"] = kinds
        made |= {key: made.get(key, _SHARED["any"]) for kind, key in _OPEN.items() if kind in kinds}
    if any(kind in ("integer", "number") for kind in kinds) and not made.keys() & {"enum", "const"}:
        made["minimum"] = _within(made.get("minimum", -_LARGEST), max)
        made["maximum"] = _within(made.get("maximum", _LARGEST), min)
    return made


def _within(bound: Any, nearer: Callable[[float, float], float]) -> Any:
    """A bound that is no farther than numbers may be; what is none is llguidance's to refuse."""
    if not isinstance(bound, int | float) or isinstance(bound, bool):
        return bound
    return nearer(bound, _LARGEST if nearer is min else -_LARGEST)


def costly(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a schema that may take long to compile or to follow, as schemas of their own, innermost first."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    found = {}
    for part in _parts(schema):
        if _is_costly(part):
            own = {key: value for key, value in part.items() if key not in DESCRIBE}
            text = json.dumps(own, sort_keys=True)
            found[text] = {**(definitions if '"$ref"' in text else {}), **own, "x-guidance": LAYOUT}
    return list(found.values())


def _is_costly(part: Mapping[str, Any]) -> bool:
    """Whether it has a pattern, a range, remainders, a format with bounds, many alternatives, or is an intersection."""
    keys = part.keys()
    choices = [part[key] for key in ("allOf", "anyOf", "oneOf") if isinstance(part.get(key), list | tuple)]
    return (
        isinstance(part.get("pattern"), str)
        or isinstance(part.get("patternProperties"), Mapping)
        or any(isinstance(part.get(key), int | float) for key in _NUMERIC)
        or (isinstance(part.get("format"), str) and not keys.isdisjoint(("minLength", "maxLength")))
        or (max(map(len, choices), default=0) > _MANY and '"$ref"' not in json.dumps(choices))
        or (bool(choices) and len(keys & {"allOf", "anyOf", "oneOf", "$ref", "properties"}) > 1)
        or len(part.get("allOf", ()) if choices else ()) > 1
    )


def _parts(schema: Any, *, named: bool = False) -> Iterator[Mapping[str, Any]]:
    """A schema and those in it, the innermost first. ``named``: it is none itself, but has some by name."""
    if isinstance(schema, (list, tuple)):
        for part in schema:
            yield from _parts(part)
    elif isinstance(schema, Mapping):
        for key, part in schema.items():
            if named or key not in _VALUES:
                yield from _parts(part, named=not named and key in _BY_NAME)
        if not named:
            yield schema


def _strays(reference: object) -> bool:
    """Whether a reference leads into a value, where nobody looks for schemas."""
    return isinstance(reference, str) and not _VALUES.isdisjoint(unquote(reference).split("/"))


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every mapping in a value, the innermost first."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _mappings(entry)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _mappings(entry)
        yield value


def _most_required(schema: Any) -> int:
    """The names of the longest list of required properties."""
    lists = (part.get("required") for part in _mappings(schema))
    return max((len(names) for names in lists if isinstance(names, (list, tuple))), default=0)


def _lengths(schema: Any) -> Iterator[int]:
    """How many characters each text has that is to be written as it stands, and each pattern."""
    for part in _mappings(schema):
        for key, value in part.items():
            yield _spelled(key)
            if key == "pattern" and isinstance(value, str):
                yield _spelled(value)
            elif key == "const" or (key == "enum" and isinstance(value, (list, tuple))):
                yield from map(len, _strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(entry)


def _spelled(pattern: str) -> int:
    """How many characters a pattern spells out one after the other: those that are no class, as often as repeated."""
    groups, last = [[0, 0]], 0  # the longest alternative before, and the one that is read
    for part in _PARTS.finditer(pattern):
        text = part.group()
        if part[1] is not None:
            times = max(int(part[1]), int(part[2] or 0))
            groups[-1][1] += last * (times - 1)
            last *= times
        elif text == "(":
            groups.append([0, 0])
        elif text == ")" and len(groups) > 1:
            last = max(groups.pop())
            groups[-1][1] += last
        elif text == "|":
            groups[-1] = [max(groups[-1]), 0]
        elif text not in "*+?^$":
            last = int(text[0] not in ".[" and text[:2] not in _CLASSES)
            groups[-1][1] += last
    return sum(map(max, groups))


def _steps(schema: Any) -> Iterator[float]:
    """Every ``multipleOf`` in it; what is no number is llguidance's to refuse."""
    for part in _mappings(schema):
        if isinstance(step := part.get("multipleOf"), int | float) and not isinstance(step, bool):
            yield step


def _remainders(steps: Sequence[float]) -> int:
    """How many there are when numbers are divided by these at once, as llguidance counts: 25 for 0.25."""
    numbers = [Decimal(str(step)) for step in steps]
    places = max((-int(number.as_tuple().exponent) for number in numbers), default=0)
    return math.lcm(*(int(number.scaleb(max(places, 0))) for number in numbers))


def _intersects(schema: Any) -> bool:
    """Whether an object's properties are named in several places: closed, each would exclude those of the others."""
    if isinstance(schema, (list, tuple)):
        return any(map(_intersects, schema))
    if not isinstance(schema, Mapping):
        return False
    own = "properties" in schema and not schema.keys().isdisjoint(("allOf", "anyOf", "oneOf", "$ref"))
    every = schema.get("allOf")
    # of one alone nothing is combined: so libraries write a reference with a description or a default beside it
    several = isinstance(every, (list, tuple)) and len(every) > 1
    return own or several or any(map(_intersects, schema.values()))


def _closed(schema: Any) -> Any:
    """Without properties that it does not name."""
    if not isinstance(schema, Mapping):
        return schema
    made = _mapped(schema, _closed)
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


def _mapped(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A schema with those changed that it is made of."""
    made = dict(schema)
    for key in _BY_NAME:
        if isinstance(parts := made.get(key), Mapping):
            made[key] = {name: change(part) for name, part in parts.items()}
    for key in _LISTS:
        if isinstance(parts := made.get(key), (list, tuple)):
            made[key] = [change(part) for part in parts]
    for key in _SINGLE:
        if key in made:
            made[key] = change(made[key])
    return made
