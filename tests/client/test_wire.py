from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmux import codec, messages, wire
from loopmux.errors import ProtocolError
from loopmux.wire import PARTS, Header, Kind, Message, Part, from_bytes, split, to_bytes

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
FRAMES = json.loads((Path(__file__).parent / "frames.json").read_text())

u16, u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
headers = st.builds(Header, st.sampled_from(Kind), st.binary(min_size=16, max_size=16), u32, u32, u16, u16)


@st.composite
def messages_of(draw: st.DrawFn, most: int) -> Message:
    """Any kind, with the parts that it has, of so many bytes and tokens at most."""
    header = draw(headers)
    shape, part = PARTS[header.kind], st.binary(max_size=most)
    return Message(
        header,
        draw(part) if shape & Part.ROUTE else b"",
        draw(part) if shape & Part.BODY else b"",
        wire.pack_tokens(draw(st.lists(u32, max_size=most))) if shape & Part.TOKENS else b"",
    )


@given(messages_of(64))
def test_messages_round_trip(message: Message) -> None:
    data = to_bytes(message)
    assert len(data) == wire.HEADER_SIZE + len(message.route) + len(message.tokens) + len(message.body)
    assert from_bytes(data) == message


@given(st.lists(messages_of(64), max_size=2 * wire.FRAME_MESSAGES + 1))
def test_messages_travel_together_and_come_out_one_by_one(said: list[Message]) -> None:
    sent = list(wire.frames(map(to_bytes, said)))
    found = [split(frame) for frame, _ in sent]
    assert [count for _, count in sent] == [len(messages) for messages in found]
    assert [from_bytes(data) for messages in found for data in messages] == said
    assert all(count == wire.FRAME_MESSAGES for _, count in sent[:-1])


def test_a_frame_holds_what_is_short_and_long_messages_go_alone() -> None:
    def sized(size: int) -> bytes:
        return to_bytes(Message(TOK, body=bytes(size - wire.HEADER_SIZE)))

    half, whole, more = (sized(size) for size in (wire.FRAME_BYTES // 2, wire.FRAME_BYTES, 10 * wire.FRAME_BYTES))
    said = [half, half, half, whole, more, HEAD, HEAD]
    assert list(wire.frames(said)) == [(half + half, 2), (half, 1), (whole, 1), (more, 1), (HEAD + HEAD, 2)]
    assert list(wire.frames([])) == []


def test_what_follows_a_whole_message_and_is_none_is_left_for_the_check() -> None:
    cut = to_bytes(Message(TOK, tokens=bytes(12)))[:-1]
    for rest in (b"junk" + HEAD, b"LM\x02" + HEAD[3:] + HEAD, b"\0", HEAD[:-1], cut):
        assert split(HEAD + HEAD + rest) == [HEAD, HEAD, rest]
        with pytest.raises(ProtocolError):
            from_bytes(rest)


def test_a_frame_of_too_many_messages_is_malformed_behind_those_it_may_have() -> None:
    *taken, rest = split(HEAD * (wire.FRAME_MESSAGES + 1))
    assert taken == [HEAD] * (wire.FRAME_MESSAGES - 1)
    with pytest.raises(ProtocolError, match="more than 64 messages came in one frame"):
        from_bytes(rest)


@given(st.binary(max_size=200))
def test_nothing_of_a_frame_is_lost(data: bytes) -> None:
    assert b"".join(split(HEAD + data)) == HEAD + data
    assert b"".join(split(data)) == data


@given(st.lists(u32, max_size=50))
def test_tokens_round_trip(ids: list[int]) -> None:
    packed = wire.pack_tokens(ids)
    assert wire.unpack_tokens(packed) == ids
    assert packed == b"".join(i.to_bytes(4) for i in ids)


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [1.5], [None]])
def test_what_is_no_token_id(ids: Any) -> None:
    with pytest.raises(ProtocolError, match="whole numbers from 0"):
        wire.pack_tokens(ids)


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    try:
        from_bytes(data)
    except ProtocolError:
        pass


@given(messages_of(9), st.data())
def test_damaged_messages_are_a_protocol_error_and_nothing_else(message: Message, draw: st.DataObject) -> None:
    damaged = bytearray(to_bytes(message))
    damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    data = bytes(damaged[: draw.draw(st.integers(0, len(damaged)))])
    try:
        assert to_bytes(from_bytes(data)) == data
    except ProtocolError:
        pass


PING, TOK = Header(Kind.PING), Header(Kind.TOK)
HEAD = to_bytes(Message(PING))
LARGE = wire.CLIENT_BODY_LIMIT


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "starts with b'', expected b'LM'"),
        (b"short", "starts with b'sh', expected b'LM': the peer does not speak Loopmux"),
        (b"XX" + HEAD[2:], "starts with b'XX', expected b'LM'"),
        (HEAD[:-1], "a message of 43 bytes, expected a header of 44 at least"),
        (b"LM\x03", "a message of 3 bytes, expected a header of 44 at least"),
        (b"LM\x09" + HEAD[3:], "version 9 is not spoken here (spoken: 3): install one release everywhere"),
        (b"LM\x01" + bytes(31), "version 1 is not spoken here"),
        (b"LM\x03\xff" + HEAD[4:], "unknown message kind 255"),
        (to_bytes(Message(PING, body=b"extra")), "PING has BODY, expected none"),
        (HEAD + b"extra", "PING announces 0 bytes of ROUTE, 0 tokens and 0 bytes of BODY, and has 5 bytes"),
        (to_bytes(Message(PING, b"r", b"", bytes(4))), "PING has ROUTE and TOKENS, expected none"),
        (to_bytes(Message(Header(Kind.HELLO), bytes(4097))), "HELLO has a ROUTE of 4097 bytes"),
        (to_bytes(Message(TOK, body=bytes(LARGE + 1))), f"a BODY of {LARGE + 1}: at most 4096, {LARGE} and {LARGE}"),
        (to_bytes(Message(TOK, tokens=bytes(LARGE + 4))), f"TOKENS of {LARGE + 4} and"),
        (to_bytes(Message(TOK, tokens=bytes(12)))[:-1], "TOK announces 0 bytes of ROUTE, 3 tokens and"),
        (to_bytes(Message(Header(Kind.HELLO), b"route"))[:-1], "0 bytes of BODY, and has 4 bytes: it is cut short, or"),
    ],
    ids=lambda given: given if isinstance(given, str) else f"{len(given)} bytes",
)
def test_what_is_wrong_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(says)):
        from_bytes(data)


@pytest.mark.parametrize("body", [wire.CLIENT_BODY_LIMIT, wire.WORKER_BODY_LIMIT])
def test_the_largest_message_fits_its_limit(body: int) -> None:
    message = Message(Header(Kind.RUN), bytes(wire.ROUTE_LIMIT), bytes(body), bytes(body))
    assert len(to_bytes(message)) == wire.message_limit(body)
    assert from_bytes(to_bytes(message)) == message


def test_another_version_is_told_by_three_bytes() -> None:
    assert wire.foreign(b"LM\x01")
    assert not any(map(wire.foreign, (b"", b"LM", b"XX\x01", HEAD)))


def test_every_kind_has_its_parts() -> None:
    assert set(PARTS) == set(Kind)
    assert set(Kind) >= wire.TERMINALS


# --- test vectors for implementers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["bytes"])
    message = from_bytes(data)
    header = message.header
    assert {
        "kind": header.kind.name,
        "request": header.request.hex(),
        "seq": header.seq,
        "arg": header.arg,
        "attempt": header.attempt,
    } == vector["header"]
    assert to_bytes(message) == data
    for part, content in ((Part.ROUTE, message.route), (Part.BODY, message.body)):
        assert bool(content) == (part in PARTS[header.kind]), "without fields it is an empty map"
    for part, limits in (("route", codec.ROUTE_LIMITS), ("body", codec.BODY_LIMITS)):
        if part in vector:
            content = getattr(message, part)
            cls = getattr(messages, vector[part]["class"])
            value = codec.unpack(cls, content, limits)
            assert jsonable(codec.plain(value)) == vector[part]["fields"]
            assert codec.pack(value) == content
    assert wire.unpack_tokens(message.tokens) == vector.get("tokens", [])


@pytest.mark.parametrize("vector", FRAMES, ids=lambda v: v["name"])
def test_vectors_of_frames(vector: dict[str, Any]) -> None:
    frame = bytes.fromhex(vector["bytes"])
    by_name = {each["name"]: bytes.fromhex(each["bytes"]) for each in VECTORS}
    said = [by_name[name] for name in vector["messages"]]
    assert split(frame) == said
    assert list(wire.frames(said)) == [(frame, len(said))]


def test_the_vectors_cover_every_kind_that_is_in_use() -> None:
    names = ["FAILED"]
    reserved = {Kind[name] for name in names}
    assert {v["header"]["kind"] for v in VECTORS} == {k.name for k in set(Kind) - reserved}


def jsonable(value: Any) -> Any:
    """Plain values with bytes as ``hex:…``."""
    if isinstance(value, bytes):
        return f"hex:{value.hex()}"
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    return [jsonable(v) for v in value] if isinstance(value, list) else value
