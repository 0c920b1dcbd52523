"""The JSON schema of the configuration file, made from its types, for editors that complete and check as one types."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from loopmux_launcher.schema import FileEntry

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def generate() -> dict[str, Any]:
    """The schema as plain values (JSON Schema draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Loopmux models and environments (llm_backends.yaml)",
        **_of(FileEntry),
    }


def text() -> str:
    """The schema as the file that is shipped."""
    return json.dumps(generate(), indent=2) + "\n"


def _of(kind: Any) -> dict[str, Any]:
    if is_dataclass(kind) and isinstance(kind, type):
        return _mapping(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_of(arg) for arg in args]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": _of(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(args[1])}
    return {"type": _SCALARS[kind]}


def _mapping(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    properties = {field.name: _property(field, hints[field.name]) for field in fields(cls)}
    doc = " ".join((cls.__doc__ or "").split())
    return {"type": "object", "description": doc, "properties": properties, "additionalProperties": False}


def _property(field: Field[Any], kind: Any) -> dict[str, Any]:
    rules = field.metadata
    found: dict[str, Any] = {"description": rules["doc"]}
    if field.default is not MISSING and field.default not in (None, ()):
        found["default"] = field.default
    # JSON Schema applies these to numbers and texts alone, so they may stand beside an `anyOf`
    bounds = {"minimum": rules["minimum"], "exclusiveMinimum": rules["above"], "maximum": rules["maximum"]}
    found |= {name: bound for name, bound in bounds.items() if bound is not None}
    if rules["pattern"]:
        found["pattern"] = f"^({rules['pattern']})$"
    return found | _of(kind)
