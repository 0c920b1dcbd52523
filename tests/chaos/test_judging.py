"""What callers and table make of good and bad streams: a checker that sees nothing would pass everything."""

from __future__ import annotations

import math

import pytest

from chaos import neighbours, table
from chaos.callers import Call
from chaos.neighbours import Pair
from chaos.nemesis import FAULTS
from chaos.storm import Row
from loopmux import Result, TextDelta
from loopmux.results import Timing, Usage
from loopmux_worker.engine.echo import echo_text, echo_token

REQUEST = bytes(range(16))
IDS = tuple(echo_token(REQUEST, position) for position in range(10))


def delta(start: int, stop: int) -> TextDelta:
    return TextDelta("", IDS[start:stop], start)


def after(*deltas: TextDelta) -> Call:
    call = Call(len(IDS), 0.0)
    for piece in deltas:
        call.took(REQUEST, piece)
    text = "".join(map(echo_text, IDS))
    call.ended(REQUEST, Result(text, IDS, "length", Usage(), Timing(), "echo", None, "w", REQUEST.hex()), text)
    return call


@pytest.mark.parametrize(
    ("deltas", "flaws"),
    [
        ([delta(0, 4), delta(4, 10)], (0, 0, 0)),
        ([delta(0, 4), delta(6, 10)], (2, 0, 0)),
        ([delta(0, 4), delta(3, 10)], (0, 1, 0)),
        ([delta(0, 8)], (2, 0, 0)),
        ([delta(0, 4), TextDelta("", (IDS[4] ^ 1, *IDS[5:]), 4)], (0, 0, 1)),
    ],
)
def test_what_is_lost_repeated_and_wrong(deltas: list[TextDelta], flaws: tuple[int, int, int]) -> None:
    call = after(*deltas)
    assert (call.lost, call.repeated, call.wrong) == flaws


def test_a_result_that_differs_from_what_was_streamed_is_wrong() -> None:
    call = Call(2, 0.0)
    call.took(REQUEST, delta(0, 2))
    result = Result("x", IDS[:2], "length", Usage(), Timing(), "echo", None, "w", REQUEST.hex())
    call.ended(REQUEST, result, "x")
    assert call.wrong == 1


def test_a_pause_is_put_down_to_the_fault_that_it_followed() -> None:
    call = Call(5, 0.0, seen=[1.0, 1.1, 3.1, 3.2, 30.0])
    assert call.pause() == pytest.approx(26.8)
    assert call.pause(1.2) == pytest.approx(26.8)
    assert call.pause(31.0) == 0
    call.seen[-1] = 3.3
    assert call.pause(1.2) == pytest.approx(2.0)
    assert [call.cut(moment) for moment in (0.9, 1.03, 1.06, 1.2, 3.3)] == pytest.approx([0, 0.1, 2, 2, 0])
    assert [call.in_midstream(moment) for moment in (0.5, 1.2, 4.0)] == [False, True, False]
    call.error = "WorkerLostError"
    assert call.in_midstream(4.0)


def row(**changes: object) -> Row:
    good = {"errors": {}, "lost": 0, "repeated": 0, "wrong": 0, "strikes": 9, "hit": 250}
    rest = {"memory": ((30.0, 31.0), (90.0, 91.0)), "open": {}, "died": 0, "troubles": ()}
    good |= {"gaps": (0.02,) * 250, "cuts": (0.01,) * 250}
    return Row(fault=FAULTS[1], requests=800, **{**good, **rest, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flaw",
    [
        {"errors": {"WorkerLostError": ["gone"]}},
        {"lost": 1},
        {"repeated": 1},
        {"wrong": 1},
        {"open": {"requests": 1}},
        {"died": 1},
        {"troubles": ("broker: internal error",)},
    ],
)
def test_every_flaw_breaks_the_promise(flaw: dict[str, object]) -> None:
    assert row().exact
    assert not row(**flaw).exact
    assert not all(reached for reached, _ in table.verdicts([row(**flaw)]))


def test_the_figures_to_reach() -> None:
    assert all(reached for reached, _ in table.verdicts([row()]))
    missed = [what for reached, what in table.verdicts([row(hit=3, gaps=(0.9, math.inf))]) if not reached]
    assert ["3 streams hit" in missed[0], "gap p99 inf ms" in missed[1]] == [True, True]
    assert len(table.line(row()).split()) > 10
    judged = [what for _, what in table.verdicts([row()])][-1]
    assert "gap p99 20 ms, at most 50 wanted (10 ms of the strikes themselves)" in judged
    assert table.line(row(cuts=())).split()[9:13] == ["–", "–", "20", "20"]


def test_neighbours_are_judged_by_how_far_equal_runs_differ() -> None:
    assert neighbours.verdict([Pair(100, 104), Pair(100, 104), Pair(100, 104)])[0]
    assert not neighbours.verdict([Pair(100, 106), Pair(100, 106), Pair(100, 106)])[0]
    assert neighbours.verdict([Pair(100, 106), Pair(110, 118), Pair(100, 106)])[0]
