import pytest
from hypothesis import given
from hypothesis import strategies as st

from callkit import parser
from loopmux_worker.engine.output import Reader, Reading

END, SILENT = 1000, 1001


def decode(ids):
    return bytes(ids).decode("utf-8", "replace")


def read(ids, **options):
    reader = Reader(Reading(decode=decode, ends=frozenset({END}), silent=frozenset({SILENT}), **options))
    pieces = []
    for token in ids:
        pieces.append(reader.push(token))
        if reader.reason is not None:
            break
    return reader, pieces


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_an_end_token_has_no_text_and_stops():
    reader, pieces = read([*b"hi", SILENT, END, *b"more"])
    assert (text(pieces), reader.reason, reader.total) == ("hi", "stop", 4)


def test_the_limit_releases_what_was_held_back():
    reader, pieces = read(list("hé".encode())[:2], limit=2, stops=("hx",))
    assert (text(pieces), reader.reason) == ("h\ufffd", "length")
    assert pieces[0].text == ""


def test_a_stop_string_may_be_complete_only_with_what_the_end_releases():
    reader, pieces = read(list("hé".encode())[:2], limit=2, stops=("\ufffd",))
    assert (text(pieces), reader.reason) == ("h", "stop")


def test_a_stop_string_cuts_the_text_but_not_the_tokens():
    reader, pieces = read(list(b"one STOP two"), stops=("STOP",))
    assert (text(pieces), reader.reason, reader.total) == ("one ", "stop", 8)


def hermes():
    return parser("hermes", template="<think>")


CALL = b'<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def test_calls_make_the_reason_unless_the_limit_cut_the_turn():
    reader, pieces = read([*b"a ", *CALL, *CALL, END], parser=hermes)
    assert (text(pieces), reader.reason) == ("a", "tool_calls")
    assert [c.name for p in pieces for c in p.calls] == ["f", "f"]
    reader, pieces = read([*CALL, *CALL[:20]], parser=hermes, limit=len(CALL) + 20)
    assert reader.reason == "length"
    assert [c.error is None for p in pieces for c in p.calls] == [True, False]


def test_one_call_only_ends_the_turn_behind_it():
    reader, pieces = read([*CALL, *CALL, END], parser=hermes, one_call=True)
    assert (reader.reason, reader.total) == ("tool_calls", len(CALL))
    assert sum(len(p.calls) for p in pieces) == 1


def test_reasoning_is_no_text_and_counts_as_no_call():
    reader, pieces = read([*b"<think>hm</think>yes", END], parser=hermes)
    assert (text(pieces), "".join(piece.reasoning for piece in pieces), reader.reason) == ("yes", "hm", "stop")
    reader, pieces = read(list(b"<think>hm\n"), parser=hermes, limit=10)
    assert ("".join(piece.reasoning for piece in pieces), reader.reason) == ("hm", "length")


def test_without_tools_tags_are_text():
    assert text(read([*CALL, END])[1]) == CALL.decode()


@given(st.data())
def test_a_replayed_prefix_continues_as_if_nothing_had_happened(data):
    parts = st.sampled_from(
        [b"text ", "ä€".encode(), CALL, b"<tool_", b"ST", b"STOP", b"\xff", b"<think>", b"</think>"]
    )
    ids = list(b"".join(data.draw(st.lists(parts, min_size=1, max_size=6))))
    options = {"parser": hermes, "stops": ("STOP",), "limit": len(ids)}
    whole_reader, whole = read(ids, **options)
    cut = data.draw(st.integers(0, whole_reader.total))
    resumed, _ = read(ids[:cut], **options)
    rest = [resumed.push(token) for token in ids[cut : whole_reader.total]]
    assert rest == whole[cut:]
    assert resumed.reason == whole_reader.reason


@pytest.mark.parametrize("cut", range(1, 4))
def test_half_characters_survive_a_resume(cut):
    ids = list("𝄞!".encode())
    resumed, first = read(ids[:cut])
    assert text(first) == ""
    assert "".join(resumed.push(token).text for token in ids[cut:]) == "𝄞!"
