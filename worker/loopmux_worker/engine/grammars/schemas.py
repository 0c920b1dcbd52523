"""JSON schemas as outputs are held to them: what they allow, less what could not be read back. Pure.

Two things are narrower than the schema says. Numbers stay within what the wire has room for. And an object has no
properties that its schema does not name, unless that has ``additionalProperties``: so do the client's own checks read
the parameters of a function, and a model left to itself would invent some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from loopmux.errors import BadRequestError

_LARGEST = 2**62
"""What llguidance makes ranges of; the wire has twice as much."""
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space where chat templates write it. Left to the model it may go on for ever."""
_MOST = 1000
"""Objects in one schema. Alternatives that refer to each other make a step slower by the square of their number."""
_COARSEST = 5000
"""The digits of ``multipleOf`` as a whole number: llguidance has a state for each remainder, and compiles millions of
them without an end."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
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
        narrowed = _narrowed(schema, close=not _intersects(schema))
        coarsest = max(_steps(schema), key=_remainders, default=1)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequestError(f"{path}: expected a JSON schema, found something that is none: {error}") from None
    if (parts := text.count("{")) > _MOST:
        raise BadRequestError(f"{path}: found {parts} objects in it, expected at most {_MOST}: use a smaller schema")
    if _remainders(coarsest) > _COARSEST:
        raise BadRequestError(
            f"{path}: found multipleOf {coarsest}, expected at most {_COARSEST}, decimals counted as digits: leave it "
            "out and check the value"
        )
    return {**narrowed, "x-guidance": LAYOUT}


def _steps(schema: Any) -> Iterator[float]:
    """Every ``multipleOf`` in it; what is no number is llguidance's to refuse."""
    if isinstance(schema, (list, tuple)):
        for part in schema:
            yield from _steps(part)
    elif isinstance(schema, Mapping):
        if isinstance(step := schema.get("multipleOf"), int | float) and not isinstance(step, bool):
            yield step
        for part in schema.values():
            yield from _steps(part)


def _remainders(step: float) -> int:
    """How many there are when numbers are divided by it, as llguidance counts: 25 for 0.25."""
    number = Decimal(str(step)).as_tuple()
    assert isinstance(number.exponent, int)
    return int("".join(map(str, number.digits)) + "0" * number.exponent)


def _intersects(schema: Any) -> bool:
    """Whether an object's properties are named in several places: closed, each would exclude those of the others."""
    if isinstance(schema, (list, tuple)):
        return any(map(_intersects, schema))
    if not isinstance(schema, Mapping):
        return False
    own = "properties" in schema and not schema.keys().isdisjoint(("anyOf", "oneOf", "$ref"))
    return own or "allOf" in schema or any(map(_intersects, schema.values()))


def _narrowed(schema: Any, *, close: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in _BY_NAME:
        if isinstance(parts := made.get(key), Mapping):
            made[key] = {name: _narrowed(part, close=close) for name, part in parts.items()}
    for key in _LISTS:
        if isinstance(parts := made.get(key), (list, tuple)):
            made[key] = [_narrowed(part, close=close) for part in parts]
    for key in _SINGLE:
        if key in made:
            made[key] = _narrowed(made[key], close=close)
    kinds = made.get("type")
    kinds = kinds if isinstance(kinds, (list, tuple)) else [kinds]
    if close and "properties" in made:
        made.setdefault("additionalProperties", False)
    if any(kind in ("integer", "number") for kind in kinds) and not made.keys() & {"enum", "const"}:
        if "exclusiveMinimum" not in made:
            made.setdefault("minimum", -_LARGEST)
        if "exclusiveMaximum" not in made:
            made.setdefault("maximum", _LARGEST)
    return made
