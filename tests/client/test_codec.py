from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmux import codec, messages
from loopmux.codec import BODY_LIMITS, DEEPEST, ROUTE_LIMITS, FieldError, build, decode, pack, plain, shorten, unpack
from loopmux.errors import ProtocolError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    n: int
    ratio: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    many: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (0, 0.0)
    words: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    maybe: int | None = None
    mode: Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    blob: bytes = b""
    flag: bool = False
    anything: Any = None


WHOLE = Outer(
    "x", Inner(1, 0.5), (Inner(2), Inner(3)), (4, 5.0), ["w"], {"k": 6}, 7, "b", Colour.BLUE, b"\0", True, {"z": [None]}
)


def test_everything_round_trips() -> None:
    assert unpack(Outer, pack(WHOLE)) == WHOLE


def test_defaults_are_left_out_and_filled_in() -> None:
    assert plain(Outer("x", Inner(1))) == {"name": "x", "inner": {"n": 1}}
    assert unpack(Outer, pack(Outer("x", Inner(1)))) == Outer("x", Inner(1))


def test_unknown_fields_of_a_newer_peer_are_ignored_unless_strict() -> None:
    assert build(Inner, {"n": 1, "new": 2}) == Inner(1)
    with pytest.raises(FieldError, match="new: found an unknown key, expected one of n, ratio") as caught:
        build(Inner, {"n": 1, "new": 2}, strict=True)
    assert caught.value.unknown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": None}, "name: found None, expected a text"),
        ({"inner": 3}, "inner: found 3 (int), expected a mapping (Inner)"),
        ({"inner": {}}, "inner.n: found nothing, expected a whole number"),
        ({"inner": {"n": True}}, "inner.n: found True (bool), expected a whole number"),
        ({"inner": {"n": 1.0}}, "inner.n: found 1.0 (float), expected a whole number"),
        ({"many": [{"n": 1}, {"n": "2"}]}, "many[1].n: found '2' (str), expected a whole number"),
        ({"many": "no"}, "many: found 'no' (str), expected a list, each entry a mapping"),
        ({"pair": [1]}, "pair: found [1] (list), expected a list of 2: a whole number, a number"),
        ({"pair": [1, "x"]}, "pair[1]: found 'x' (str), expected a number"),
        ({"words": [1]}, "words[0]: found 1 (int), expected a text"),
        ({"table": {"k": "v"}}, "table.k: found 'v' (str), expected a whole number"),
        ({"table": {1: 1}}, "table: found the key 1 (int), expected keys that are texts"),
        ({"maybe": "x"}, "maybe: found 'x' (str), expected a whole number or nothing"),
        ({"mode": "c"}, "mode: found 'c' (str), expected one of a, b"),
        ({"colour": "green"}, "colour: found 'green' (str), expected one of red, blue"),
        ({"flag": 1}, "flag: found 1 (int), expected true or false"),
        ({"blob": "text"}, "blob: found 'text' (str), expected bytes"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(FieldError) as caught:
        build(Outer, {"name": "x", "inner": {"n": 1}} | change)
    assert str(caught.value) == says


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(FieldError) as caught:
        build(Inner, {"n": "y" * 10_000})
    assert len(str(caught.value)) < 200


@given(st.text(), st.integers(8, 40))
def test_a_shortened_text_keeps_its_ends_and_its_limit(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short.encode()) <= limit
    if len(text.encode()) <= limit:
        assert short == text
    else:
        first, _, last = short.partition("\n…\n")
        assert text.startswith(first)
        assert text.endswith(last)
        assert len(first) + len(last) < len(text)


def nested(levels: int, inner: Any = None) -> Any:
    """A value in that many lists and maps, which take turns."""
    for level in range(levels):
        inner = [inner] if level % 2 else {"k": inner}
    return inner


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("value", [nested(100_000), "y" * 10**7, [[0] * 10**6] * 2, Unspeakable()])
def test_whatever_is_found_can_be_said(value: Any) -> None:
    with pytest.raises(FieldError, match="expected a whole number") as caught:
        build(Inner, {"n": value})
    assert len(str(caught.value)) < 200


def test_a_value_is_shown_as_python_writes_it() -> None:
    scalars = (None, True, -1.5, b"\0", "it's")
    for value in (*scalars, "y" * 78, [], [1, "a"], (), (1,), (1, 2), {}, {"a": [None], b"b": {"c": (1,)}}):
        assert codec.show(value).startswith(repr(value))


def test_what_may_be_anything_is_not_nested_without_end() -> None:
    whole = Outer("x", Inner(1), anything=nested(DEEPEST))
    assert unpack(Outer, pack(whole)) == whole
    for deep in (nested(DEEPEST + 1), nested(100_000)):
        with pytest.raises(FieldError, match=f"anything: found lists and maps nested more than {DEEPEST} levels deep"):
            build(Outer, {"name": "x", "inner": {"n": 1}, "anything": deep})
    assert unpack(Outer, pack({"name": "x", "inner": {"n": 1}, "new": nested(400)})) == Outer("x", Inner(1))


@pytest.mark.parametrize("value", [nested(1_500), nested(100_000), Outer("x", Inner(1), anything=nested(100_000))])
def test_what_is_nested_too_deep_has_no_wire_form(value: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot encode"):
        pack(value)


def test_whole_numbers_are_numbers() -> None:
    assert build(Inner, {"n": 1, "ratio": 2}).ratio == 2.0


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, "\ud800", 2**70])
def test_what_has_no_wire_form(value: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot encode"):
        pack(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb([0] * 65),
        msgpack.packb({str(i): 0 for i in range(65)}),
        msgpack.packb("x" * 4097),
        msgpack.packb({1: 2}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.ExtType(5, b"")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x91" * 5000 + b"\xc0",
        msgpack.packb(1) + b"more",
        b"\xa2\xff\xfe",
    ],
)
def test_what_a_decoder_refuses(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="undecodable"):
        decode(data, ROUTE_LIMITS)


MESSAGES = [c for c in vars(messages).values() if isinstance(c, type) and c.__module__ == messages.__name__]


@pytest.mark.parametrize("cls", MESSAGES)
def test_however_deep_a_field_is_nested_the_message_is_malformed_at_worst(cls: Any) -> None:
    """Up to 1 023 levels are decoded; a thousand are about as many as Python calls itself."""
    for name in cls.__slots__:
        for level in (b"\x91", b"\x81\xa1k"):
            for levels in (80, *range(900, 1024, 3)):
                try:
                    value = unpack(cls, b"\x81" + msgpack.packb(name) + levels * level + b"\xc0", BODY_LIMITS)
                except ProtocolError:
                    continue
                assert unpack(cls, pack(value), BODY_LIMITS) == value  # it was in an unknown field


wire_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200), st.sampled_from(MESSAGES))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes, cls: type) -> None:
    try:
        unpack(cls, data, BODY_LIMITS)
    except ProtocolError:
        pass


@given(st.data(), st.sampled_from(MESSAGES))
def test_wrong_fields_are_a_protocol_error_and_nothing_else(data: st.DataObject, cls: Any) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from(list(cls.__slots__)), wire_values, max_size=6))
    try:
        value = unpack(cls, msgpack.packb(fields), ROUTE_LIMITS)
    except ProtocolError:
        return
    assert isinstance(value, cls)


@given(wire_values)
def test_decoding_is_the_inverse_of_packing(value: Any) -> None:
    assert repr(decode(pack(value), BODY_LIMITS)) == repr(value)  # repr, because nan is not equal to itself


def test_show_and_describe() -> None:
    assert codec.show(None) == "None"
    assert codec.describe(tuple[int, ...]) == "a list, each entry a whole number"
    assert codec.describe(tuple[str, float]) == "a list of 2: a text, a number"
    assert codec.describe(dict[str, int]) == "a mapping"
    assert codec.describe(Colour) == "one of red, blue"
