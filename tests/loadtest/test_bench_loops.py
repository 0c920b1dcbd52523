"""The arithmetic of the loops' benchmark; as a whole it runs among the end-to-end tests."""

from __future__ import annotations

from typing import Any

import pytest

from loopmux.results import Result, Timing, Usage
from loopmux_loadtest.bench_loops import Played, Sum, figures, reused


def turn(*usage: int) -> Result:
    return Result("", (), "stop", Usage(*usage), Timing(), "tools", None, "w", "r")


def asks(*ids: str) -> dict[str, Any]:
    calls = [{"id": one, "type": "function", "function": {"name": "add", "arguments": {"a": 1}}} for one in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def tells(one: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": one, "content": "2"}


USER = {"role": "user", "content": "go"}
ANSWER = {"role": "assistant", "content": "2"}
WHOLE = [USER, asks("a", "b"), tells("a"), tells("b"), asks("c"), tells("c"), ANSWER]


def test_what_could_be_reused_is_the_turn_before_but_for_its_last_token() -> None:
    loop = Played(turns=[turn(100, 20, 90), turn(130, 20, 119), turn(160, 5, 100)])
    assert reused([loop]) == (119 + 100) / (119 + 149)


def test_more_than_that_makes_up_for_nothing() -> None:
    assert (
        reused([Played(turns=[turn(100, 20), turn(130, 20, 125)]), Played(turns=[turn(100, 20), turn(130, 20)])]) == 0.5
    )


@pytest.mark.parametrize("missing", range(1, len(WHOLE)))
def test_a_transcript_in_which_anything_is_missing_is_malformed(missing: int) -> None:
    assert Played(WHOLE).well_formed
    assert not Played(WHOLE[:missing] + WHOLE[missing + 1 :]).well_formed


def test_a_result_twice_is_malformed() -> None:
    assert not Played([USER, asks("a"), tells("a"), tells("a"), ANSWER]).well_formed


def test_a_call_that_ran_twice_shows_and_a_transcript_that_differs_in_a_word() -> None:
    call = ("add", {"a": 1})
    wanted = Played(WHOLE, [turn(9, 1), turn(9, 1)], [call], [call], 1.0)
    twice = Played([*WHOLE[:-1], {**ANSWER, "content": "3"}], wanted.turns, [call], [call, call], 3.0)
    found = figures("together", [wanted, twice, wanted], [wanted] * 3, 4.0)
    assert (found["malformed"], found["differ"], found["rerun"], found["stretch"]) == (0, 1, 1, 3.0)


def test_a_loop_is_known_by_its_number() -> None:
    assert Sum.make(3, 5) == Sum.make(3, 5) != Sum.make(4, 5)
    assert Sum.make(3, 5).prompt.count(", then ") == 4
