"""Model outputs through the parser of a family, in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from loopmux_worker.engine.calls import Parsed, Parser, family_of

REQUEST = bytes(range(16))
PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "exact": {"type": "boolean"},
    "points": {"type": "array", "items": {"type": "number"}},
    "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "level": {"enum": [1, 2]},
}
TOOLS = (
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
)


def parser(name: str, tools: Sequence[Mapping[str, Any]] = TOOLS, template: str = "", **options: Any) -> Parser:
    """The parser of a family."""
    made = family_of(template, name).parser(REQUEST, tools, **options)
    assert made is not None
    return made


def parse(name: str, text: str, *sizes: int, **options: Any) -> Parsed:
    """All that comes of a text in pieces of these sizes, over and over; in one piece without any."""
    one = parser(name, **options)
    parts, at = [], 0
    for size in cycle(sizes or (len(text) or 1,)):
        if at >= len(text):
            break
        parts.append(one.push(text[at : at + size]))
        at += size
    parts.append(one.flush())
    return Parsed(
        "".join(part.text for part in parts),
        tuple(call for part in parts for call in part.calls),
        "".join(part.reasoning for part in parts),
    )


def results(parsed: Parsed) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of each call, none of which is malformed."""
    assert [call.error for call in parsed.calls if call.error] == []
    return [(call.name, call.arguments) for call in parsed.calls]
