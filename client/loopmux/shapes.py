"""Type hints as JSON schemas, and JSON values back as what the hints say.

``Shapes().of(hint)`` gives both directions at once: the schema that a model is shown, and the conversion of a value
that fits it (an Enum member, a dataclass, a set …). Pydantic models are taken by their methods, without importing it.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import inspect
import json
import pathlib
import types
import typing
import uuid
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loopmux import docstrings, schemacheck


class HintError(TypeError):
    """A type hint has no JSON form; the message says which, and what would do."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A type in both directions: ``schema`` for the model, ``convert`` for a JSON value that fits it."""

    schema: dict[str, Any]
    convert: Callable[[Any], Any]

    def checked(self, value: Any) -> Any:
        """``convert`` for a value that was not checked yet.

        Raises:
            ValueError: it does not fit.
        """
        if found := schemacheck.problems(self.schema, value, closed=True):
            raise ValueError("; ".join(found))
        return self.convert(value)


def _same(value: Any) -> Any:
    return value


_PLAIN: dict[Any, Shape] = {
    Any: Shape({}, _same),
    object: Shape({}, _same),
    None: Shape({"type": "null"}, _same),
    types.NoneType: Shape({"type": "null"}, _same),
    bool: Shape({"type": "boolean"}, _same),
    int: Shape({"type": "integer"}, int),
    float: Shape({"type": "number"}, float),
    str: Shape({"type": "string"}, _same),
    pathlib.Path: Shape({"type": "string"}, pathlib.Path),
    uuid.UUID: Shape({"type": "string", "format": "uuid"}, uuid.UUID),
    decimal.Decimal: Shape({"type": "string", "format": "decimal"}, decimal.Decimal),
    datetime.date: Shape({"type": "string", "format": "date"}, datetime.date.fromisoformat),
    datetime.datetime: Shape({"type": "string", "format": "date-time"}, datetime.datetime.fromisoformat),
}
_LISTS: dict[Any, Callable[[Iterable[Any]], Any]] = {
    list: list,
    set: set,
    frozenset: frozenset,
    abc.Sequence: list,
    abc.Iterable: list,
    abc.Collection: list,
}
_MAPS = (dict, abc.Mapping, abc.MutableMapping)
_QUALIFIERS = {typing.Required, typing.NotRequired, typing.Final, getattr(typing, "ReadOnly", typing.Final)}
"""What changes nothing about a value; Python 3.13 has ``ReadOnly``."""
_BOUNDS = {
    "ge": "minimum",
    "le": "maximum",
    "gt": "exclusiveMinimum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "pattern": "pattern",
}
"""What the metadata objects of Annotated call a bound, and its keyword."""


class Shapes:
    """Makes shapes; one instance follows the nesting of one hint, so that a type that contains itself ends."""

    def __init__(self) -> None:
        self._made: dict[Any, Shape] = {}
        self._open: set[Any] = set()

    def of(self, hint: Any) -> Shape:
        """The shape of a type hint.

        Raises:
            HintError: it has no JSON form.
        """
        if typing.get_origin(hint) is None and _hashable(hint) and hint in _PLAIN:
            return _PLAIN[hint]
        if hasattr(hint, "__supertype__"):  # NewType
            return self.of(hint.__supertype__)
        if hasattr(hint, "__value__"):  # type X = ...
            return self._named(hint, {}, lambda alias: self.of(alias.__value__))
        if isinstance(hint, type) and typing.get_origin(hint) is None:
            return self._named(hint, {"type": "object"}, self._new_class)
        return self._generic(typing.get_origin(hint), typing.get_args(hint), hint)

    def fields(self, hints: Mapping[str, Any], docs: Mapping[str, str], defaults: Mapping[str, Any]) -> Shape:
        """An object with these fields; those without a default are required. Converts to a dict of the given fields."""
        shapes = {name: self.of(hint) for name, hint in hints.items()}
        properties = {name: _annotate(shape.schema, docs.get(name), defaults, name) for name, shape in shapes.items()}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if required := [name for name in shapes if name not in defaults]:
            schema["required"] = required
        return Shape(schema, lambda value: {name: shapes[name].convert(entry) for name, entry in value.items()})

    def _named(self, hint: Any, within: dict[str, Any], make: Callable[[Any], Shape]) -> Shape:
        """The shape of what may contain itself: the inner one is shown as ``within``, and checked when it is made."""
        if hint in self._open:
            return Shape(within, lambda value: self._made[hint].checked(value))
        self._open.add(hint)
        try:
            self._made[hint] = make(hint)
        finally:
            self._open.discard(hint)
        return self._made[hint]

    def _new_class(self, kind: type[Any]) -> Shape:
        if issubclass(kind, enum.Enum):
            return _choice([(_written(member), member) for member in kind])
        if hasattr(kind, "model_json_schema") and hasattr(kind, "model_validate"):
            schema = kind.model_json_schema()
            return Shape(_inlined(schema, schema.get("$defs", {}), frozenset()), kind.model_validate)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind)
        if typing.is_typeddict(kind):
            hints, docs = _hints(kind), docstrings.parse(kind.__doc__).parameters
            return self.fields(hints, docs, dict.fromkeys(_optional(kind, hints), dataclasses.MISSING))
        if kind in _LISTS or kind in _MAPS or kind is tuple:
            return self._generic(kind, (), kind)
        raise HintError(f"{kind.__name__} has no JSON form: {_REMEDY}")

    def _dataclass(self, kind: type[Any]) -> Shape:
        hints = _hints(kind)
        parts = [f for f in dataclasses.fields(kind) if f.init]
        defaults = {
            f.name: f.default
            for f in parts
            if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        }
        docs = docstrings.parse(kind.__doc__).parameters
        inner = self.fields({f.name: hints[f.name] for f in parts}, docs, defaults)
        return Shape(inner.schema, lambda value: kind(**inner.convert(value)))

    def _generic(self, origin: Any, args: tuple[Any, ...], hint: Any) -> Shape:
        if origin is typing.Annotated:
            return self._annotated(args[0], args[1:])
        if origin in _QUALIFIERS:
            return self.of(args[0])
        if origin is typing.Literal:
            return _choice([(_written(arg), arg) for arg in args])
        if origin in (typing.Union, types.UnionType):
            return self._union(args)
        if origin in _LISTS:
            return self._list(args[0] if args else Any, origin)
        if origin is tuple:
            return self._tuple(args)
        if origin in _MAPS:
            return self._map(args, hint)
        raise HintError(f"{hint!r} has no JSON form: {_REMEDY}")

    def _annotated(self, hint: Any, extras: tuple[Any, ...]) -> Shape:
        inner = self.of(hint)
        schema = dict(inner.schema)
        for extra in extras:
            _constrain(schema, extra)
        return Shape(schema, inner.convert)

    def _union(self, args: tuple[Any, ...]) -> Shape:
        arms = [self.of(arg) for arg in args]
        if all(list(arm.schema) == ["type"] and isinstance(arm.schema["type"], str) for arm in arms):
            schema: dict[str, Any] = {"type": list(dict.fromkeys(arm.schema["type"] for arm in arms))}
        else:
            schema = {"anyOf": [arm.schema for arm in arms]}

        def convert(value: Any) -> Any:
            refused: list[Exception] = []
            for arm in arms:
                if not schemacheck.problems(arm.schema, value, closed=True):
                    try:
                        return arm.convert(value)
                    except Exception as error:  # noqa: BLE001 - a text that is no date may be another arm's
                        refused.append(error)
            found = f"found {schemacheck.show(value)}, expected {schemacheck.expected(schema)}"
            raise refused[0] if refused else ValueError(found)

        return Shape(schema, convert)

    def _list(self, item: Any, origin: Any) -> Shape:
        inner, make = self.of(item), _LISTS[origin]
        schema: dict[str, Any] = {"type": "array"} | ({"items": inner.schema} if inner.schema else {})
        if make in (set, frozenset):
            schema["uniqueItems"] = True
        return Shape(schema, lambda value: make(map(inner.convert, value)))

    def _tuple(self, args: tuple[Any, ...]) -> Shape:
        if not args or args[-1] is Ellipsis:
            inner = self._list(args[0] if args else Any, list)
            return Shape(inner.schema, lambda value: tuple(inner.convert(value)))
        parts = [self.of(arg) for arg in args]
        schema = {
            "type": "array",
            "prefixItems": [part.schema for part in parts],
            "minItems": len(parts),
            "maxItems": len(parts),
        }
        return Shape(schema, lambda value: tuple(p.convert(v) for p, v in zip(parts, value, strict=True)))

    def _map(self, args: tuple[Any, ...], hint: Any) -> Shape:
        key, item = args or (str, Any)
        if key not in (str, Any):
            raise HintError(f"{hint!r} has keys that are not texts, which JSON does not know: write dict[str, …]")
        inner = self.of(item)
        schema: dict[str, Any] = {"type": "object"} | ({"additionalProperties": inner.schema} if inner.schema else {})
        return Shape(schema, lambda value: {k: inner.convert(v) for k, v in value.items()})


_REMEDY = (
    "use str, int, float, bool, None, Literal, Enum, list, tuple, set, dict[str, …], unions of these, a dataclass, "
    "a TypedDict or a pydantic model"
)


def _hashable(hint: Any) -> bool:
    return isinstance(hint, abc.Hashable)


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except NameError as error:
        name = getattr(kind, "__name__", kind)
        raise HintError(
            f"{name} has a hint that cannot be resolved ({error}): import its type at module level"
        ) from error


def _optional(kind: Any, hints: Mapping[str, Any]) -> list[str]:
    """The keys that a TypedDict may lack; ``__optional_keys__`` misses qualifiers in hints that are texts."""
    qualifiers = {name: typing.get_origin(hint) for name, hint in hints.items()}
    marked = {typing.NotRequired: True, typing.Required: False}
    return [name for name, mark in qualifiers.items() if marked.get(mark, name in kind.__optional_keys__)]


def hints_of(function: Any) -> dict[str, Any]:
    """The resolved hints of a callable's parameters, ``Annotated`` kept. That of its result is not looked at.

    Raises:
        HintError: a hint is a text that names nothing.
    """
    target = getattr(function, "func", function)  # functools.partial
    if inspect.isclass(target):
        return _hints(target) | hints_of(target.__init__)
    if not (inspect.isroutine(target) or "__annotations__" in getattr(target, "__dict__", ())):
        target = type(target).__call__
    hints = {name: hint for name, hint in getattr(target, "__annotations__", {}).items() if name != "return"}
    name = getattr(target, "__name__", target)
    return _hints(types.SimpleNamespace(__name__=name, __wrapped__=target, __annotations__=hints))


def _written(value: Any) -> Any:
    """What stands for a value: for an Enum member its own, or its name where that of another one has no JSON form."""
    if not isinstance(value, enum.Enum):
        return value
    by_value = all(isinstance(member.value, (str, int, float)) for member in type(value))
    return value.value if by_value else value.name


def _choice(pairs: list[tuple[Any, Any]]) -> Shape:
    """A fixed set of JSON values and what each stands for."""
    values = [value for value, _ in pairs]
    if bad := [v for v in values if not isinstance(v, (str, int, float, bool, types.NoneType))]:
        raise HintError(f"the choice {bad[0]!r} has no JSON form: use texts or numbers")
    schema: dict[str, Any] = {"enum": values}
    for kind, name in ((str, "string"), (bool, "boolean"), (int, "integer")):
        if all(type(v) is kind or (kind is str and isinstance(v, str)) for v in values):
            schema = {"type": name, "enum": values}
    chosen = {json.dumps(value): meant for value, meant in pairs}
    return Shape(schema, lambda value: chosen[json.dumps(value)])


def _annotate(schema: dict[str, Any], doc: str | None, defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field's schema with its description and its default, where the default has a JSON form."""
    extra: dict[str, Any] = {}
    if doc and "description" not in schema:
        extra["description"] = doc
    default = _written(defaults.get(name))
    if isinstance(default, (str, int, float, bool)):
        extra["default"] = default
    return schema | extra


def _constrain(schema: dict[str, Any], extra: Any) -> None:
    """Add what one piece of ``Annotated`` metadata says: a text describes; bounds are taken by their names."""
    if isinstance(extra, str):
        schema.setdefault("description", extra)
        return
    if isinstance(description := getattr(extra, "description", None), str):
        schema["description"] = description
    for name, keyword in _BOUNDS.items():
        if isinstance(bound := getattr(extra, name, None), (int, float, str)):
            schema[keyword] = bound
    suffix = "Items" if schema.get("type") == "array" else "Length"
    for name, low in (("min_length", "min"), ("max_length", "max")):
        if isinstance(bound := getattr(extra, name, None), int):
            schema[low + suffix] = bound
    for part in getattr(extra, "metadata", None) or ():
        _constrain(schema, part)


_SCHEMA_MAPS = {"properties", "patternProperties", "dependentSchemas"}
_VALUES = {"default", "const", "enum", "examples", "required"}


def _inlined(node: Any, definitions: Mapping[str, Any], inside: frozenset[str]) -> Any:
    """A schema without ``$ref`` and generated titles: small models read it more easily, and prompts are shorter."""
    if isinstance(node, list):
        return [_inlined(part, definitions, inside) for part in node]
    if not isinstance(node, Mapping):
        return node
    reference = str(node.get("$ref", "")).removeprefix("#/$defs/")
    if reference in inside:
        return {"type": "object"}
    if reference in definitions:
        target = _inlined(definitions[reference], definitions, inside | {reference})
        return target | _inlined({k: v for k, v in node.items() if k != "$ref"}, definitions, inside)
    result: dict[str, Any] = {}
    for key, part in node.items():
        if key in _SCHEMA_MAPS:
            result[key] = {name: _inlined(schema, definitions, inside) for name, schema in part.items()}
        elif key in _VALUES:
            result[key] = part
        elif key not in ("$defs", "title"):
            result[key] = _inlined(part, definitions, inside)
    return result
