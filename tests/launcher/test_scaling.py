"""How many processes of a group run, and who makes room: the two decisions alone, then under random demand."""

from __future__ import annotations

import pytest

from launcher.plankit import make
from loopmux.messages import WorkerLoad
from loopmux_launcher.memory import Idle, fits, most, victims
from loopmux_launcher.scaling import PATIENCE, Scaling


def load(name: str = "m-1", running: int = 0, idle: float = 0.0, slots: int = 4) -> WorkerLoad:
    return WorkerLoad(name, slots, running, idle)


def told(scaling: Scaling, queued: int, *loads: WorkerLoad, now: float, ready: int | None = None) -> str | None:
    alive = scaling.wanted
    return scaling.told(queued, loads, alive=alive, ready=alive if ready is None else ready, now=now)


def test_the_first_request_wants_a_process_and_its_leaving_wants_none() -> None:
    scaling = Scaling(0, 2, 60.0)
    assert scaling.wanted == 0
    scaling.told(3, [], alive=0, ready=0, now=0.0)
    assert scaling.wanted == 1
    scaling.told(0, [], alive=0, ready=0, now=1.0)  # cancelled before there was room for it
    assert scaling.wanted == 0


def test_another_process_comes_when_requests_have_waited_for_a_while_and_all_are_ready() -> None:
    scaling = Scaling(1, 3, 60.0)
    told(scaling, 5, load(running=4), now=0.0)
    told(scaling, 5, load(running=4), now=PATIENCE / 2)
    assert scaling.wanted == 1
    told(scaling, 5, load(running=4), now=PATIENCE)
    assert scaling.wanted == 2
    told(scaling, 5, load(running=4), now=PATIENCE * 2, ready=1)  # it loads: that takes its time
    told(scaling, 5, load(running=4), now=PATIENCE * 9, ready=1)
    assert scaling.wanted == 2
    full = load(running=4), load("m-2", running=4)
    told(scaling, 5, *full, now=PATIENCE * 10)
    told(scaling, 0, *full, now=PATIENCE * 11)  # nobody waits: the count begins anew
    told(scaling, 5, *full, now=PATIENCE * 11.5)
    told(scaling, 5, *full, now=PATIENCE * 12)
    assert scaling.wanted == 2
    told(scaling, 5, *full, now=PATIENCE * 13)
    assert scaling.wanted == 3
    for n in range(20):
        told(scaling, 5, *full, load("m-3", running=4), now=PATIENCE * (14 + n))
    assert scaling.wanted == 3


def test_a_process_stops_when_it_had_nothing_to_do_for_long_enough() -> None:
    scaling = Scaling(0, 1, 60.0, wanted=1)
    scaling.wanted = 1
    assert told(scaling, 0, load(idle=59.9), now=0.0) is None
    assert told(scaling, 0, load(running=1), now=1.0) is None
    assert told(scaling, 1, load(idle=61.0), now=2.0) is None  # somebody is about to get it
    assert told(scaling, 0, load(idle=60.0), now=3.0) == "m-1"
    assert scaling.wanted == 0


def test_short_requests_between_two_reports_keep_the_last_process() -> None:
    scaling = Scaling(0, 1, 3.0)
    scaling.wanted = 1
    for now in range(20):
        assert told(scaling, 0, load(idle=0.5), now=float(now)) is None


def test_one_of_several_stops_when_the_others_could_have_done_it_all() -> None:
    scaling = Scaling(1, 2, 10.0)
    scaling.wanted = 2
    half = load(running=1, idle=0.0), load("m-2", running=0, idle=0.2)
    for now in range(10):
        assert told(scaling, 0, *half, now=float(now)) is None
    assert told(scaling, 0, load(running=2), load("m-2", running=2), now=10.0) is None  # 4 are more than 3/4 of 4
    assert told(scaling, 0, *half, now=11.0) is None
    assert told(scaling, 0, *half, now=20.9) is None
    assert told(scaling, 0, *half, now=21.0) == "m-2"
    assert scaling.wanted == 1
    assert told(scaling, 0, load(idle=1e6), now=1e6) is None  # the fewest stay


def test_other_limits_by_another_configuration() -> None:
    scaling = Scaling(0, 4, 10.0)
    scaling.wanted = 3
    scaling.resize(0, 2, 5.0)
    assert scaling.wanted == 2
    scaling.resize(3, 3, 5.0)
    assert scaling.wanted == 3


A = Idle("a", 2.0, idle=100.0, took=10.0)  # worth 0.1
B = Idle("b", 2.0, idle=9.0, took=10.0)  # 1.0
C = Idle("c", 4.0, idle=1.0, took=10.0)  # 5.0


@pytest.mark.parametrize(
    ("short", "chosen"),
    [
        (1.0, ["a"]),
        (2.0, ["a"]),
        (2.5, ["a", "b"]),
        (5.0, ["a", "c"]),  # b was chosen first, and is not needed beside c
        (8.0, ["a", "b", "c"]),
        (8.5, None),
    ],
)
def test_the_least_valuable_make_room_and_no_more_than_needed(short: float, chosen: list[str] | None) -> None:
    assert victims([C, A, B], short) == chosen


def test_what_was_dear_to_start_is_kept_longer() -> None:
    quick, dear = Idle("quick", 1.0, idle=10.0, took=1.0), Idle("dear", 1.0, idle=20.0, took=60.0)
    assert victims([dear, quick], 1.0) == ["quick"]


def test_decimal_fractions_fill_a_budget_to_the_brim() -> None:
    assert fits(0.1 + 0.2, 0.3, 0.6)
    assert not fits(0.4, 0.3, 0.6)
    assert fits(9.0, 9.0, None)


@pytest.mark.parametrize(
    ("memory", "budget", "expected"),
    [
        (2.0, None, 4),
        (0.0, 1.0, 4),
        (2.0, 100.0, 4),
        (2.0, 6.0, 2),  # the others always have 2 of it
        (2.0, 7.9, 2),
        (2.0, 3.0, 1),  # that it always has is judged when the configuration is read
        (0.1, 2.3, 3),
    ],
)
def test_no_more_may_run_than_what_the_others_always_have_leaves_room_for(
    memory: float, budget: float | None, expected: int
) -> None:
    group = make("m", processes=1, most=4, memory=memory)
    others = make("x", processes=2, memory=1.0), make("y", processes=0, most=9, memory=1.0)
    assert most(group, [group, *others], budget) == expected
