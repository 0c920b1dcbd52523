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
from loopmux.wire import FRAMES, Frame, Header, Kind, Message, from_frames, pack_header, to_frames, unpack_header

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())

u16, u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
headers = st.builds(Header, st.sampled_from(Kind), st.binary(min_size=16, max_size=16), u32, u32, u16, u16)


@given(headers)
def test_headers_round_trip(header: Header) -> None:
    packed = pack_header(header)
    assert len(packed) == wire.HEADER_SIZE == 34
    assert unpack_header(packed) == header


@given(headers, st.binary(max_size=64), st.binary(max_size=64), st.lists(u32, max_size=20))
def test_messages_round_trip(header: Header, route: bytes, body: bytes, tokens: list[int]) -> None:
    shape = FRAMES[header.kind]
    message = Message(
        header,
        route if shape & Frame.ROUTE else b"",
        body if shape & Frame.BODY else b"",
        wire.pack_tokens(tokens) if shape & Frame.TOKENS else b"",
    )
    assert from_frames(to_frames(message)) == message


@given(st.lists(u32, max_size=50))
def test_tokens_round_trip(ids: list[int]) -> None:
    packed = wire.pack_tokens(ids)
    assert wire.unpack_tokens(packed) == ids
    assert packed == b"".join(i.to_bytes(4) for i in ids)


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [1.5], [None]])
def test_what_is_no_token_id(ids: Any) -> None:
    with pytest.raises(ProtocolError, match="whole numbers from 0"):
        wire.pack_tokens(ids)


@given(st.lists(st.binary(max_size=80), max_size=5))
def test_garbage_is_a_protocol_error_and_nothing_else(frames: list[bytes]) -> None:
    try:
        from_frames(frames)
    except ProtocolError:
        pass


@given(headers, st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 33), st.integers(0, 255))
def test_damaged_messages_are_a_protocol_error_and_nothing_else(
    header: Header, frames: list[bytes], at: int, value: int
) -> None:
    damaged = bytearray(pack_header(header))
    damaged[at] = value
    try:
        message = from_frames([bytes(damaged), *frames])
    except ProtocolError:
        return
    assert to_frames(message)[1:] == frames


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "without frames"),
        ([b"short"], "header frame has 5 bytes, expected 34"),
        ([b"XX" + pack_header(Header(Kind.PING))[2:]], "header starts with b'XX', expected b'LM'"),
        ([b"LM\x09" + pack_header(Header(Kind.PING))[3:]], "version 9 is not spoken here"),
        ([b"LM\x01\xff" + pack_header(Header(Kind.PING))[4:]], "unknown message kind 255"),
        ([pack_header(Header(Kind.PING)), b"extra"], "PING has 2 frames, expected 1"),
        ([pack_header(Header(Kind.HELLO)), bytes(4097)], "HELLO has a ROUTE of 4097 bytes, at most 4096"),
        ([pack_header(Header(Kind.TOK)), b"", b"abc"], "TOKENS frame of 3 bytes, expected a multiple of 4"),
    ],
)
def test_what_is_wrong_is_named(frames: list[bytes], says: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(says)):
        from_frames(frames)


def test_every_kind_has_its_frames() -> None:
    assert set(FRAMES) == set(Kind)
    assert set(Kind) >= wire.TERMINALS


# --- test vectors for implementers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    frames = [bytes.fromhex(f) for f in vector["frames"]]
    message = from_frames(frames)
    header = message.header
    assert {
        "kind": header.kind.name,
        "request": header.request.hex(),
        "seq": header.seq,
        "arg": header.arg,
        "attempt": header.attempt,
    } == vector["header"]
    assert to_frames(message) == frames
    for part, limits in (("route", codec.ROUTE_LIMITS), ("body", codec.BODY_LIMITS)):
        if part in vector:
            data = getattr(message, part)
            cls = getattr(messages, vector[part]["class"])
            value = codec.unpack(cls, data, limits)
            assert jsonable(codec.plain(value)) == vector[part]["fields"]
            assert codec.pack(value) == data
    if "tokens" in vector:
        assert wire.unpack_tokens(message.tokens) == vector["tokens"]


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
