import itertools
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loopmux_worker.engine.text import Detokenizer, StopStrings

ALPHABET = "aé€𝄞 <>\n"


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def pieces(decode, ids):
    detokenizer = Detokenizer(decode)
    out = [detokenizer.push(i) for i in ids]
    return [*out, detokenizer.flush()]


@given(st.text(alphabet=ALPHABET))
def test_bytes_of_a_text_come_out_as_whole_characters(text):
    out = pieces(decode_bytes, list(text.encode()))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


@given(st.lists(st.integers(0, 255), max_size=300))
def test_any_bytes_come_out_as_the_whole_decode(ids):
    assert "".join(pieces(decode_bytes, ids)) == decode_bytes(ids)


def test_a_long_run_of_broken_bytes_costs_no_more_than_text():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    ids = [0xFF] * 2000 + list(b"ende")
    assert "".join(pieces(decode, ids)) == decode_bytes(ids)
    assert longest <= 40


def test_tokens_without_text_do_not_grow_the_window():
    seen = []

    def decode(ids):
        seen.append(len(ids))
        return "".join(chr(i) for i in ids if i)

    assert "".join(pieces(decode, [97, *[0] * 500, 98])) == "ab"
    assert max(seen) <= 40


def test_a_decoder_that_drops_the_first_space_is_followed():
    words = ["▁Hello", "▁big", "▁", "▁world", "!"]

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert "".join(pieces(decode, [0, 1, 2, 3, 4])) == decode([0, 1, 2, 3, 4]) == "Hello big  world!"


def decode_fallback(ids: list[int]) -> str:
    """As Llama 2, Mistral and Gemma decode: tokens of one byte, which are text if all of them in a row are, and others.

    The others are written as the negative code of their character.
    """
    parts = []
    for is_byte, some in itertools.groupby(ids, lambda i: i >= 0):
        run = list(some)
        try:
            parts.append(bytes(run).decode() if is_byte else "".join(chr(-i) for i in run))
        except UnicodeDecodeError:
            parts.append("\ufffd" * len(run))
    return "".join(parts)


def test_byte_fallback_shows_a_hole_per_byte_until_the_character_is_whole():
    out = pieces(decode_fallback, list("𝄞".encode()))
    assert out == ["", "", "", "𝄞", ""]


def fallback(parts: list[str | int]) -> list[int]:
    """Texts as tokens of one byte, other tokens as they are."""
    return [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]


@given(st.lists(st.sampled_from(["a", "é", "€", "𝄞", "\n", -ord("b")])))
def test_byte_fallback_of_characters_in_a_row_comes_out_as_they_are(parts):
    ids = fallback(parts)
    out = pieces(decode_fallback, ids)
    assert "".join(out) == decode_fallback(ids)
    assert not any("\ufffd" in piece for piece in out)


@given(st.lists(st.sampled_from(["é", "€", "𝄞", 0xFF, 0xE2, -ord("b")]), max_size=60))
@example(["€", "𝄞", -ord("b")])
@example([0xFF, *["€"] * 12, -ord("b")])
def test_byte_fallback_of_broken_bytes_costs_no_other_text(parts):
    out = "".join(pieces(decode_fallback, ids := fallback(parts)))
    assert out.count("b") == ids.count(-ord("b"))
    assert len(out) <= len(ids), "nothing comes out twice"


def test_byte_fallback_that_ends_within_a_character_leaves_those_before_it():
    for tail in ([], [-ord("!")]):
        out = pieces(decode_fallback, fallback(["€é", 0xE2, 0x82, *tail]))
        assert "".join(out) == "€é\ufffd\ufffd" + "!" * len(tail)


def reference_stop(text: str, stops: list[str]) -> str | None:
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return None


@given(
    st.text(alphabet="ab<", max_size=30),
    st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_stop_strings_are_found_whatever_the_pieces(text, stops, size):
    finder, out, found = StopStrings(stops), "", False
    for i in range(0, len(text), size):
        piece, found = finder.push(text[i : i + size])
        out += piece
        if found:
            break
    expected = reference_stop(text, stops)
    assert found == (expected is not None)
    assert (out if found else out + finder.flush()) == (text if expected is None else expected)


def test_only_what_may_become_a_stop_string_is_held_back():
    finder = StopStrings(["STOP"])
    assert finder.push("abcST") == ("abc", False)
    assert finder.push("x") == ("STx", False)
    assert finder.push("S") == ("", False)
    assert finder.flush() == "S"


@pytest.mark.parametrize("seed", range(5))
def test_pieces_equal_the_decode_of_a_real_tokenizer(seed, tiny_model):
    tokenizer = tiny_model.tokenizer
    generator = random.Random(seed)
    ids = [generator.randrange(len(tokenizer)) for _ in range(200)]
    out = pieces(lambda some: tokenizer.decode(some, skip_special_tokens=False), ids)
    assert "".join(out) == tokenizer.decode(ids, skip_special_tokens=False)
