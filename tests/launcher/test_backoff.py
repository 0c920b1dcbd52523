from __future__ import annotations

import pytest

from loopmux_launcher.backoff import CRASHES, FIRST_DELAY, LONGEST_DELAY, WINDOW, Backoff


def test_delays_grow_and_stay_below_the_longest() -> None:
    backoff, now, delays = Backoff(), 0.0, []
    for _ in range(2000):
        now += WINDOW  # too far apart for a loop
        backoff.got_ready()
        delay = backoff.crashed(now, was_ready=True, ran=1.0, draw=1.0)
        assert delay is not None
        delays.append(delay)
    assert delays[:4] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY, 8 * FIRST_DELAY]
    assert delays[-1] == LONGEST_DELAY


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.5), (0.5, 0.75)])
def test_half_of_a_delay_is_jitter(draw: float, factor: float) -> None:
    assert Backoff().crashed(0.0, was_ready=True, ran=0.0, draw=draw) == FIRST_DELAY * factor


def test_a_crash_after_a_long_run_is_the_first_again() -> None:
    backoff = Backoff()
    for now in (0.0, 100.0, 200.0):
        backoff.crashed(now, was_ready=True, ran=1.0, draw=1.0)
    assert backoff.crashed(1000.0, was_ready=True, ran=WINDOW + 1, draw=1.0) == FIRST_DELAY


def test_what_everybody_waits_for_starts_again_at_once_the_first_time() -> None:
    backoff = Backoff(eager=True)
    found = [backoff.crashed(now, was_ready=True, ran=ran, draw=1.0) for now, ran in ((9.0, 9.0), (10.0, 1.0))]
    assert found == [0.0, 2 * FIRST_DELAY]
    assert backoff.crashed(1000.0, was_ready=True, ran=WINDOW + 1, draw=1.0) == 0.0


@pytest.mark.parametrize("eager", [True, False])
def test_crashes_close_together_are_a_loop_where_no_peer_takes_over(eager: bool) -> None:
    backoff = Backoff(eager=eager)
    found = [backoff.crashed(n * WINDOW / CRASHES, was_ready=True, ran=1.0, draw=0.0) for n in range(CRASHES)]
    assert [delay is None for delay in found] == [False] * (CRASHES - 1) + [eager]


def test_starts_that_never_get_ready_are_a_loop_however_slow() -> None:
    backoff = Backoff()
    found = [backoff.crashed(n * 10 * WINDOW, was_ready=False, ran=500.0, draw=0.0) for n in range(CRASHES)]
    assert [delay is None for delay in found] == [False] * (CRASHES - 1) + [True]


def test_getting_ready_forgives_failed_starts() -> None:
    backoff = Backoff()
    for n in range(3 * CRASHES):
        if n % (CRASHES - 1) == 0:
            backoff.got_ready()
        assert backoff.crashed(n * 2 * WINDOW, was_ready=False, ran=1.0, draw=0.0) is not None
