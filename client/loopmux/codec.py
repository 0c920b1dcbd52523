"""MessagePack to dataclasses and back, checked at one choke point.

``build`` turns plain values into a typed dataclass and says exactly which field is wrong; ``unpack`` decodes bytes from
a peer first, within limits, and lets nothing but ``ProtocolError`` out. ``pack`` leaves out fields that have their
default value, so that messages stay small and an older peer is not told about newer fields.
"""

from __future__ import annotations

import functools
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

import msgpack

from loopmux.errors import ProtocolError

T = TypeVar("T")


class FieldError(ValueError):
    """A value does not fit its field.

    Attributes:
        path: where, as in ``models.default.workers``.
        found: the offending value, shortened.
        expected: what would have fitted.
        unknown: the field's name is not known (``expected`` then lists the known ones).
    """

    def __init__(self, path: str, found: str, expected: str, *, unknown: bool = False) -> None:
        super().__init__(f"{path or 'value'}: found {found}, expected {expected}")
        self.path, self.found, self.expected, self.unknown = path, found, expected, unknown


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a decoder accepts from a peer: entries of one array, of one map, bytes of one string or blob."""

    array: int
    map: int
    size: int


ROUTE_LIMITS = Limits(array=64, map=64, size=4 * 1024)
"""The broker decodes every ROUTE of every peer, so it takes little."""
BODY_LIMITS = Limits(array=64 * 1024, map=4 * 1024, size=4 * 1024 * 1024)
"""Endpoints decode the bodies of peers that the broker let through."""

DEEPEST = 72
"""Levels of lists and maps in a field that may hold anything: messages, schemas, reports. Real ones have under ten, and
whoever handles them calls itself for each. Workers read calls with arguments of 64 levels, which lie five deeper in a
message."""

_LONGEST_SHOWN = 80


def show(value: object) -> str:
    """A value for an error message: its text and type, shortened. Raises nothing and reads no more than it shows."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _LONGEST_SHOWN:
            text = text[: _LONGEST_SHOWN - 1] + "…"
            break
    return text if value is None else f"{text} ({type(value).__name__})"


def _pieces(value: object) -> Iterator[str]:
    """What ``repr`` says, bit by bit. Each level begins with a bracket, so who has read enough is not deep yet."""
    kind = type(value)
    if isinstance(value, dict) and kind is dict:
        yield "{"
        for i, (key, entry) in enumerate(value.items()):
            yield ", " if i else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(entry)
        yield "}"
    elif isinstance(value, (list, tuple)) and kind in (list, tuple):
        yield "[" if kind is list else "("
        for i, entry in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(entry)
        yield "]" if kind is list else ",)" if len(value) == 1 else ")"
    elif isinstance(value, (str, bytes)) and kind in (str, bytes):
        yield repr(value[:_LONGEST_SHOWN])
    else:
        try:
            yield repr(value)
        except Exception:  # noqa: BLE001 - what a program hands over may be of any class
            yield object.__repr__(value)


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` (8 or more) bytes of UTF-8, the middle left out: a reason comes first, its cause often last."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    half = (limit - len(_GAP)) // 2
    return data[:half].decode(errors="ignore") + _GAP.decode() + data[len(data) - half :].decode(errors="ignore")


_GAP = "\n…\n".encode()

_SCALARS = frozenset({str, int, float, bool, bytes, types.NoneType})


def plain(value: Any) -> Any:
    """A dataclass tree as maps, lists and scalars, fields at their default left out."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if is_dataclass(kind):
        return {name: plain(v) for name, default in _outline(kind) if (v := getattr(value, name)) != default}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


@functools.cache
def _outline(cls: type[Any]) -> list[tuple[str, Any]]:
    """Names and defaults of a dataclass's fields."""
    return [(f.name, _default(f)) for f in fields(cls)]


def pack(value: Any) -> bytes:
    """Encode a dataclass (or plain values) as MessagePack.

    Raises:
        ProtocolError: something in it has no MessagePack form, or a text is not valid Unicode.
    """
    try:
        packed: bytes = msgpack.packb(plain(value))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"cannot encode {type(value).__name__}: {error}") from error
    return packed


def decode(data: bytes, limits: Limits) -> Any:
    """Decode untrusted MessagePack within limits, extension types refused.

    Raises:
        ProtocolError: whatever the decoder finds wrong.
    """
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_extensions,
            max_array_len=limits.array,
            max_map_len=limits.map,
            max_str_len=limits.size,
            max_bin_len=limits.size,
            max_ext_len=0,
        )
    except Exception as error:
        raise ProtocolError(f"undecodable MessagePack ({type(error).__name__}: {error})") from error


def unpack(cls: type[T], data: bytes, limits: Limits = ROUTE_LIMITS) -> T:
    """Decode untrusted bytes into a dataclass. Unknown fields are ignored: a newer peer may know more.

    Raises:
        ProtocolError: undecodable, or a field is missing, of the wrong type or nested too deep.
    """
    value = decode(data, limits)
    try:
        return build(cls, value)
    except FieldError as error:
        raise ProtocolError(f"{cls.__name__}: {error}") from error


def build(cls: type[T], value: Any, path: str = "", *, strict: bool = False) -> T:
    """Turn plain values into ``cls`` (a dataclass or any annotated type it may use), checking every field.

    Supported: ``None``, bool, int, float (whole numbers accepted), str, bytes, Literal, Enum, Optional and unions,
    list, tuple[X, ...], tuple[X, Y], dict[str, X], dataclasses, and Any (taken as it is, up to ``DEEPEST`` levels of
    it). With ``strict`` an unknown key is an error.

    Raises:
        FieldError: naming the path, what was found and what was expected.
    """
    kind: Any = cls
    built: T = _builder(kind)(value, ((), path) if path else (), strict)
    return built


Path = tuple["Path", str | int] | tuple[()]
"""Where a value is: the path of what it is in, and its key or index there. Spelled only where something is wrong."""
Builder = Callable[[Any, Path, bool], Any]


def _spell(path: Path) -> str:
    if not path:
        return ""
    outer, step = path
    if isinstance(step, int):
        return f"{_spell(outer)}[{step}]"
    return f"{_spell(outer)}.{step}" if outer else step


def _no_extensions(code: int, data: bytes) -> Any:  # noqa: ARG001 - the hook's signature is msgpack's
    raise ValueError(f"extension type {code}")


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


@functools.cache
def _builder(kind: Any) -> Builder:
    """The checker for one annotated type, made once."""
    if kind is Any or kind is object:
        return _check_depth
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_builder(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice_builder({member.value: member for member in kind})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return _choice_builder({arg: arg for arg in args})
    if origin in (typing.Union, types.UnionType):
        return _union_builder(args)
    if origin is list:
        return _sequence_builder(args[0], list)
    if origin is tuple:
        return _sequence_builder(args[0], tuple) if args[-1] is Ellipsis else _fixed_builder(args)
    if origin in (dict, Mapping):
        return _map_builder(args[1])
    return _scalar_builder(kind)


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bytes: "bytes",
    bool: "true or false",
    types.NoneType: "nothing",
    dict: "a mapping",
    list: "a list",
}


def describe(kind: Any) -> str:
    """What a type accepts, in words, for error messages."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: " + ", ".join(map(describe, args))
    if origin in (list, tuple):
        return f"a list, each entry {describe(args[0])}"
    if origin in (dict, Mapping) or is_dataclass(kind):
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(m.value) for m in kind)
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _scalar_builder(kind: Any) -> Builder:
    def check(value: Any, path: Path, strict: bool) -> Any:  # noqa: ARG001
        # bool is a subclass of int, and `workers: true` is a mistake, not one worker
        if type(value) is kind:
            return value
        if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
            return float(value)
        raise FieldError(_spell(path), show(value), describe(kind))

    return check


def _check_depth(value: Any, path: Path, strict: bool) -> Any:  # noqa: ARG001
    """Anything is taken as it is, unless it is nested too deep."""
    if type(value) not in _NESTS:
        return value
    level = [value]
    for _ in range(DEEPEST):
        inner = [outer.values() if type(outer) is dict else outer for outer in level]
        level = [entry for entries in inner for entry in entries if type(entry) in _NESTS]
        if not level:
            return value
    raise FieldError(_spell(path), f"lists and maps nested more than {DEEPEST} levels deep", "fewer levels")


_NESTS = frozenset({dict, list, tuple})


def _choice_builder(choices: dict[Any, Any]) -> Builder:
    def check(value: Any, path: Path, strict: bool) -> Any:  # noqa: ARG001
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value in choices:
            return choices[value]
        raise FieldError(_spell(path), show(value), "one of " + ", ".join(map(str, choices)))

    return check


def _union_builder(args: Sequence[Any]) -> Builder:
    builders = [_builder(a) for a in args]
    expected = " or ".join(describe(a) for a in args)

    def check(value: Any, path: Path, strict: bool) -> Any:
        deeper: FieldError | None = None
        for builder in builders:
            try:
                return builder(value, path, strict)
            except FieldError as error:
                if error.path != _spell(path):  # it fitted but for something inside: that is the better report
                    deeper = error
        raise deeper or FieldError(_spell(path), show(value), expected)

    return check


def _sequence_builder(item: Any, make: Callable[[Any], Any]) -> Builder:
    builder = _builder(item)
    expected = f"a list, each entry {describe(item)}"

    def check(value: Any, path: Path, strict: bool) -> Any:
        if not isinstance(value, (list, tuple)):
            raise FieldError(_spell(path), show(value), expected)
        return make(builder(entry, (path, i), strict) for i, entry in enumerate(value))

    return check


def _fixed_builder(args: Sequence[Any]) -> Builder:
    builders = [_builder(a) for a in args]
    expected = f"a list of {len(args)}: " + ", ".join(map(describe, args))

    def check(value: Any, path: Path, strict: bool) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != len(builders):
            raise FieldError(_spell(path), show(value), expected)
        return tuple(b(entry, (path, i), strict) for i, (b, entry) in enumerate(zip(builders, value, strict=True)))

    return check


def _map_builder(item: Any) -> Builder:
    builder = _builder(item)

    def check(value: Any, path: Path, strict: bool) -> Any:
        if not isinstance(value, Mapping):
            raise FieldError(_spell(path), show(value), "a mapping")
        for key in value:
            if not isinstance(key, str):
                raise FieldError(_spell(path), f"the key {show(key)}", "keys that are texts")
        return {key: builder(entry, (path, key), strict) for key, entry in value.items()}

    return check


def _dataclass_builder(cls: type[Any]) -> Builder:
    hints = typing.get_type_hints(cls)
    known = {f.name: (_builder(hints[f.name]), f) for f in fields(cls)}
    needed = [name for name, (_, f) in known.items() if _default(f) is MISSING]

    def check(value: Any, path: Path, strict: bool) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, (dict, Mapping)):  # a dict mostly: asking an abstract class costs more
            raise FieldError(_spell(path), show(value), f"a mapping ({cls.__name__})")
        given = {}
        for key, entry in value.items():
            spec = known.get(key)
            if spec is not None:
                given[key] = spec[0](entry, (path, key), strict)
            elif strict:
                raise FieldError(_spell((path, str(key))), "an unknown key", "one of " + ", ".join(known), unknown=True)
        for name in needed:
            if name not in given:
                raise FieldError(_spell((path, name)), "nothing", describe(hints[name]))
        return cls(**given)

    return check
