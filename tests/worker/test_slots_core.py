"""The slots engine's pure cores, told as stories: which rows hold what, who takes part in a step, at what pace."""

from __future__ import annotations

import random

import pytest

from loopmux_worker.engine.base import Key
from loopmux_worker.engine.slots.pace import LARGEST, Pace
from loopmux_worker.engine.slots.rows import SHORTEST, Copy, Rows, common
from loopmux_worker.engine.slots.schedule import GRID, Scheduler, Sequence

LONG = list(range(100, 200))


def key(number: int) -> Key:
    return Key(number.to_bytes(16, "big"), 1)


def sequence(
    number: int, tokens: list[int], identity: str = "base", session: str | None = None, exact: int | None = None
) -> Sequence:
    return Sequence(key(number), list(tokens), identity, None, session, exact)


def scheduler(rows: int = 4, most: int = 4) -> Scheduler:
    return Scheduler(Rows(rows), most)


def run(core: Scheduler, budget: int = 512, now: float = 0.0) -> tuple[list[Copy], list[tuple[int, int, int, bool]]]:
    """One step: copies made, and (request, start, count, samples) of every segment; each sample appends token 7."""
    copies = core.admit(budget, now)
    plan = core.plan(budget)
    core.done(plan)
    for segment in plan.segments:
        if segment.samples:
            core.append(segment.key, 7)
    return copies, [(int.from_bytes(s.key.request, "big"), s.start, s.count, s.samples) for s in plan.segments]


# --- who takes part ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_and_then_decodes_token_by_token():
    core = scheduler()
    core.add(sequence(1, LONG))
    assert run(core) == ([], [(1, 0, 100, True)])
    assert run(core) == ([], [(1, 100, 1, True)])
    assert run(core) == ([], [(1, 101, 1, True)])


def test_a_long_prompt_is_cut_and_running_streams_go_on_beside_it():
    core = scheduler()
    core.add(sequence(1, [1, 2, 3]))
    run(core)
    core.add(sequence(2, LONG))
    assert run(core, budget=40)[1] == [(1, 3, 1, True), (2, 0, 40, False)]
    assert run(core, budget=40)[1] == [(1, 4, 1, True), (2, 40, 40, False)]
    assert run(core, budget=40)[1] == [(1, 5, 1, True), (2, 80, 20, True)]
    assert run(core, budget=40)[1] == [(1, 6, 1, True), (2, 100, 1, True)]


def test_an_exact_sequence_is_computed_alone_in_chunks_of_a_fixed_grid_and_then_token_by_token():
    core = scheduler()
    core.add(sequence(1, [1, 2, 3]))
    core.add(sequence(2, LONG))
    run(core)
    core.add(sequence(3, [*LONG, 1, 2], exact=100))
    steps = []
    for budget in (10, 0, 512, 512, 512, 512):
        copies = core.admit(budget, 0.0)
        assert not copies, "nothing of what others computed is taken"
        plan = core.plan(budget)
        assert len({s.key for s in plan.forwards[0]}) == 2
        assert len(plan.forwards) <= 2, "the others share one"
        steps += [(s.start, s.count, s.samples) for segments in plan.forwards[1:] for s in segments]
        core.done(plan)
        for segment in plan.segments:
            if segment.samples:
                core.append(segment.key, 7)
    assert steps == [(0, GRID, False), (64, 36, False), (100, 1, False), (101, 1, True), (102, 1, True)]


def test_short_prompts_share_a_step_and_the_budget_decides_how_many():
    core = scheduler()
    for number in (1, 2, 3):
        core.add(sequence(number, [number] * 10))
    assert run(core, budget=15)[1] == [(1, 0, 10, True), (2, 0, 5, False)]
    assert run(core, budget=15)[1] == [(1, 10, 1, True), (2, 5, 5, True), (3, 0, 10, True)]


def test_who_finds_no_row_waits_for_one():
    core = scheduler(rows=2, most=2)
    for number in (1, 2, 3):
        core.add(sequence(number, [number] * 3))
    assert [s[0] for s in run(core)[1]] == [1, 2]
    assert (core.running, core.waiting) == (2, 1)
    core.remove(key(1), 1.0)
    assert [s[0] for s in run(core)[1]] == [2, 3]


def test_a_waiting_request_can_be_removed():
    core = scheduler(rows=1, most=1)
    core.add(sequence(1, [1, 1]))
    core.add(sequence(2, [2, 2]))
    run(core)
    core.remove(key(2), 0.0)
    core.remove(key(9), 0.0)
    assert (core.running, core.waiting) == (1, 0)


# --- what is reused ---------------------------------------------------------------------------------------------------


def test_the_next_turn_of_a_session_computes_only_what_is_new_in_the_same_row():
    core = scheduler()
    core.add(sequence(1, LONG, session="loop"))
    run(core)
    run(core)
    core.remove(key(1), 1.0)
    core.add(turn := sequence(2, [*LONG, 7, 50, 51], session="loop"))
    assert run(core, now=2.0) == ([], [(2, 101, 2, True)])
    assert (turn.row, turn.cached) == (0, 101)


def test_another_session_copies_the_common_beginning_and_leaves_the_row_alone():
    core = scheduler()
    core.add(sequence(1, [*LONG, *[5] * 100], session="one"))
    run(core)
    core.remove(key(1), 1.0)
    core.add(other := sequence(2, [*LONG, *[6] * 10], session="two"))
    assert run(core, now=2.0) == ([Copy(0, 1, 100)], [(2, 100, 10, True)])
    assert other.cached == 100
    assert core.rows.known([*LONG, *[5] * 100], "base") == 200


def test_a_running_row_is_a_source_too():
    core = scheduler()
    core.add(sequence(1, LONG))
    run(core)
    core.add(sequence(2, [*LONG, 3]))
    assert run(core) == ([Copy(0, 1, 100)], [(1, 100, 1, True), (2, 100, 1, True)])


def test_what_is_just_being_computed_for_another_is_waited_for():
    core = scheduler()
    for number in (1, 2):
        core.add(sequence(number, [*LONG, number]))
    assert run(core, budget=60)[1] == [(1, 0, 60, False)]
    assert run(core, budget=60)[1] == [(1, 60, 41, True)]
    assert run(core, budget=60) == ([Copy(0, 1, 100)], [(1, 101, 1, True), (2, 100, 1, True)])


def test_equal_prompts_under_different_adapters_share_nothing():
    core = scheduler()
    core.add(sequence(1, LONG, "base a"))
    run(core)
    core.remove(key(1), 1.0)
    core.add(sequence(2, LONG, "base b", session="x"))
    assert run(core) == ([], [(2, 0, 100, True)])


def test_the_last_token_is_computed_even_if_all_is_there():
    core = scheduler()
    core.add(sequence(1, LONG))
    run(core)
    core.remove(key(1), 1.0)
    core.add(sequence(2, LONG))
    assert run(core)[1] == [(2, 99, 1, True)]


def test_a_short_common_beginning_is_not_worth_a_copy():
    rows = Rows(2)
    row, copy = rows.take([1] * 40, "base", None, 0.0)
    row.tokens, row.filled = [1] * 40, 40
    rows.park(row.index, 0.0)
    other, copy = rows.take([1] * (SHORTEST - 1) + [2] * 40, "base", None, 1.0)
    assert (other.index, other.filled, copy) == (1, 0, None)


def test_rows_are_taken_by_value():
    rows = Rows(3)
    for index, (length, left) in enumerate(((100, 0.0), (90, 500.0), (50, 500.0))):
        row, _ = rows.take([index] * length, "base", str(index), left)
        row.tokens, row.filled = [index] * length, length
    for index, left in enumerate((0.0, 500.0, 500.0)):
        rows.park(index, left)
    assert [rows.take([9] * 5, "base", None, 501.0)[0].index for _ in range(3)] == [0, 2, 1]
    assert rows.take([9] * 5, "base", None, 501.0) is None


def parked(count: int, *sessions: str | None) -> Rows:
    """Rows of 50 tokens, one for each of the sessions s0, s1, … or those given, all parked at 0.0."""
    rows = Rows(count)
    for index, session in enumerate(sessions or [f"s{index}" for index in range(count)]):
        row, _ = rows.take([index] * 50, "base", session, 0.0)
        row.tokens, row.filled = [index] * 50, 50
        rows.park(index, 0.0)
    return rows


@pytest.mark.parametrize(
    ("owner", "session", "shared", "row"),
    [
        ("s0", "s0", 20, 0),  # its own
        ("s0", "new", 20, 1),  # the tail of s0 is worth more than all of s1
        ("s0", "new", 49, 0),  # and here less
        (None, None, 20, 1),  # nobody's row is not one's own
    ],
)
def test_a_beginning_is_copied_where_less_is_lost_by_it(owner, session, shared, row):
    rows = parked(2, owner, "s1")
    rows.expect("s0", 1.0, 1.0)
    rows.expect("s1", 61.0, 1.0)
    if owner is None:
        rows.leave("s1")
    found, copy = rows.take([0] * shared + [9], "base", session, 1.0)
    assert (found.index, found.filled, copy) == (row, shared, Copy(0, 1, shared) if row else None)


def test_of_equal_beginnings_that_of_the_session_is_used():
    rows = Rows(3)
    for session in ("s0", "s1", "s2"):
        row, _ = rows.take([], "base", session, 0.0)
        row.tokens, row.filled = [1] * 50, 50
    for index in range(3):
        rows.park(index, 0.0)
    found, copy = rows.take([1] * 51, "base", "s1", 1.0)
    assert (found.index, found.filled, copy) == (1, 50, None)


def test_a_session_that_is_done_is_taken_first_and_one_that_waits_for_a_tool_last():
    rows = parked(3)
    rows.leave("s1")
    rows.expect("s0", 5.0, 0.0)
    assert [rows.take([9] * 5, "base", None, 1.0)[0].index for _ in range(3)] == [1, 2, 0]


def test_a_session_counts_most_when_it_is_expected_and_less_the_longer_until_then_or_since():
    rows = parked(2)
    rows.expect("s0", 100.0, 0.0)
    assert rows[0].value(40.0) == rows[0].value(160.0) == rows[0].value(100.0) / 2 == rows[1].value(0.0)
    for never in (float("inf"), 1e9):
        rows.expect("s1", never, 0.0)
        assert rows[1].value(1.0) == 0.0
    rows.expect("s1", float("nan"), 5.0)
    assert rows[1].left == 5.0


def test_of_sessions_that_wait_the_one_that_comes_back_last_is_taken_first():
    rows = parked(3)
    for session, when in (("s0", 9.0), ("s1", 300.0), ("s2", 2.0)):
        rows.expect(session, when, 1.0)
    assert [rows.take([9] * 5, "base", None, 1.0)[0].index for _ in range(3)] == [1, 0, 2]


def test_what_a_session_that_is_done_leaves_can_still_be_found_and_its_next_request_begins_anew():
    rows = parked(2)
    rows.leave("s0")
    row, _ = rows.take([0] * 50, "base", "s0", 1.0)
    assert (row.index, row.filled) == (0, 49)
    rows.leave("s0")  # it comes late: the row runs again
    rows.park(0, 1.0)
    assert rows[0].worth == rows[1].worth


def test_an_adapter_that_is_gone_takes_its_parked_rows_with_it():
    rows = Rows(3)
    for index in range(3):
        row, _ = rows.take([3] * 50, f"base {index % 2}", None, 0.0)
        row.tokens, row.filled = [3] * 50, 50
    for index in range(2):
        rows.park(index, 0.0)
    rows.forget("base 0")
    assert (rows.parked, rows.known([3] * 50, "base 1")) == (1, 50)
    assert (rows[0].filled, rows[2].running) == (0, True), "another adapter with the same contents runs there"


@pytest.mark.parametrize("seed", range(50))
def test_common_counts_equal_tokens(seed):
    rng = random.Random(seed)
    one = [rng.randrange(2) for _ in range(rng.randrange(60))]
    other = [*one[: rng.randrange(len(one) + 1)], *(rng.randrange(2) for _ in range(30))]
    row = Rows(1)[0]
    row.identity, row.tokens, row.filled = "base", one, rng.randrange(len(one) + 1)
    expected = 0
    while expected < min(row.filled, len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common(row, other, "base") == expected


# --- when something goes wrong ----------------------------------------------------------------------------------------


def test_who_failed_alone_is_at_fault():
    core = scheduler()
    core.add(sequence(1, [1, 2]))
    core.admit(512, 0.0)
    assert core.failed(core.plan(512)) == key(1)


def test_the_youngest_is_suspected_and_tried_alone_while_the_others_go_on():
    core = scheduler()
    for number in (1, 2, 3):
        core.add(sequence(number, [number] * 5))
    core.admit(512, 0.0)
    assert core.failed(core.plan(512)) is None
    steps = [core.plan(512)]
    core.done(steps[0])
    steps.append(core.plan(512))
    numbers = [[int.from_bytes(s.key.request, "big") for s in step.segments] for step in steps]
    assert sorted(numbers) == [[1, 2], [3]]
    assert core.failed(steps[numbers.index([3])]) == key(3) if numbers[1] == [3] else True


def test_nothing_of_a_failed_step_counts_as_computed():
    core = scheduler()
    for number in (1, 2):
        core.add(sequence(number, [number] * 30))
    core.admit(512, 0.0)
    core.failed(core.plan(512))
    assert core.rows.known([1] * 30, "base") == core.rows.known([2] * 30, "base") == 0


def test_a_suspect_that_does_well_alone_is_trusted_again_three_times_and_then_takes_turns_with_the_others():
    core = scheduler()
    for number in (1, 2):
        core.add(sequence(number, [number] * 5))
    core.admit(512, 0.0)
    steps = []
    for _ in range(30):
        plan = core.plan(512)
        steps.append([int.from_bytes(s.key.request, "big") for s in plan.segments])
        if len(plan.segments) == 2:
            assert core.failed(plan) is None
        else:
            core.done(plan)
            for segment in plan.segments:
                core.append(segment.key, 7)
    assert sum(len(step) == 2 for step in steps) == 3
    assert sorted(steps[-2:]) == [[1], [2]]
    assert steps[-20:] == steps[-2:] * 10
    core.remove(key(1), 1.0)
    assert [run(core)[1][0][0] for _ in range(3)] == [2, 2, 2]


def test_short_memory_costs_the_youngest_its_row_and_its_place_stays_empty_for_a_while():
    core = scheduler()
    for number in (1, 2, 3):
        core.add(sequence(number, [number] * 5))
    run(core)
    assert core.preempt() == key(3)
    for number in (4, 5):
        core.add(sequence(number, [number] * 3))
    assert [s[0] for s in run(core)[1]] == [1, 2]
    core.remove(key(1), 1.0)
    assert run(core)[1] == [(2, 6, 1, True), (3, 0, 6, True), (4, 0, 3, True)]
    assert core.waiting == 1
    for gone in (2, 4, 5):
        core.remove(key(gone), 1.0)
    assert core.preempt() is None


def test_copies_that_could_not_be_made_send_their_requests_back():
    core = scheduler()
    core.add(sequence(1, LONG))
    run(core)
    core.add(sequence(2, [*LONG, 2]))
    core.add(sequence(3, [3] * 5))
    copies = core.admit(512, 0.0)
    assert copies == [Copy(0, 1, 100)]
    core.undo(copies, short=False)
    assert core.waiting == 1
    copies, segments = run(core)
    assert copies == []
    assert segments == [(1, 100, 1, True), (3, 0, 5, True), (2, 0, 101, True)]
    assert core[key(2)].cached == 0


def test_copies_that_memory_is_too_short_for_wait_until_somebody_ended():
    core = scheduler()
    core.add(sequence(1, LONG))
    run(core)
    core.add(sequence(2, [*LONG, 2]))
    core.add(sequence(3, [3] * 5))
    core.undo(core.admit(512, 0.0), short=True)
    for _ in range(3):
        assert {s[0] for s in run(core)[1]} == {1, 3}
    core.remove(key(3), 1.0)
    assert run(core) == ([], [(1, 103, 1, True), (2, 0, 101, True)])


def test_copies_that_memory_is_too_short_for_are_not_waited_with_where_nobody_runs():
    core = scheduler()
    core.add(sequence(1, LONG, session="one"))
    run(core)
    core.remove(key(1), 1.0)
    core.add(sequence(2, [*LONG[:50], 2], session="two"))
    copies = core.admit(512, 2.0)
    assert copies == [Copy(0, 1, 50)]
    core.undo(copies, short=True)
    assert run(core, now=2.0) == ([], [(2, 0, 51, True)])


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_every_token_is_computed_once_in_order_over_a_true_history(seed):
    """A model of the memory: each row's cells hold (identity, tokens so far); reading a wrong cell would show."""
    rng = random.Random(seed)
    core = scheduler(rows=rng.randint(1, 5), most=rng.randint(1, 5))
    cells: list[list[tuple[str, tuple[int, ...]] | None]] = [[None] * 200 for _ in range(len(core.rows))]
    live: dict[Key, Sequence] = {}
    stems = [[rng.randrange(3) for _ in range(40)] for _ in range(3)]
    for turn in range(80):
        if rng.random() < 0.5 and len(live) < 8:
            stem = rng.choice(stems)
            tokens = stem[: rng.randint(1, 40)] + [rng.randrange(3) for _ in range(rng.randint(1, 30))]
            exact = rng.randint(1, len(tokens)) if rng.random() < 0.2 else None
            made = sequence(turn + 1, tokens, rng.choice(("base", "base a")), rng.choice((None, "s", "t")), exact)
            live[made.key] = made
            core.add(made)
        if live and rng.random() < 0.2:
            gone = rng.choice(list(live))
            core.remove(gone, float(turn), park=rng.random() < 0.8)
            del live[gone]
        if rng.random() < 0.05:
            core.preempt()
        budget = rng.choice((8, 16, 64))
        copies = core.admit(budget, float(turn))
        if copies and rng.random() < 0.1:
            core.undo(copies, short=rng.random() < 0.5)
            continue
        for copy in copies:
            cells[copy.target][: copy.length] = cells[copy.source][: copy.length]
        plan = core.plan(budget)
        assert bool(plan.segments) == bool(core.running)
        if rng.random() < 0.1:
            for segment in plan.segments:  # a step that raised may have left anything behind
                for place in range(segment.start, segment.start + segment.count):
                    cells[segment.row][place] = ("garbage", ())
            core.failed(plan)
            continue
        assert sum(s.count for s in plan.segments if s.count > 1) < budget + GRID
        for segments in plan.forwards:
            exact = [s for s in segments if live[s.key].exact is not None]
            assert not exact or len(segments) == 1
            for s in exact:
                prompt = live[s.key].exact
                assert (
                    s.count == 1 if s.start >= prompt else (s.start % GRID, s.count) == (0, min(GRID, prompt - s.start))
                )
        assert len({s.row for s in plan.segments}) == len(plan.segments)
        for segment in plan.segments:
            owner = live[segment.key]
            for place in range(segment.start, segment.start + segment.count):
                cells[segment.row][place] = (owner.identity, tuple(owner.tokens[: place + 1]))
            for place in range(segment.start + segment.count):
                assert cells[segment.row][place] == (owner.identity, tuple(owner.tokens[: place + 1]))
            assert segment.samples == (segment.start + segment.count == len(owner.tokens))
        core.done(plan)
        for segment in plan.segments:
            if segment.samples:
                core.append(segment.key, rng.randrange(3))
                if len(live[segment.key].tokens) > 150:
                    core.remove(segment.key, float(turn))
                    del live[segment.key]
    for _ in range(200):
        core.admit(64, 100.0)
        plan = core.plan(64)
        core.done(plan)
        for segment in plan.segments:
            if segment.samples:
                core.remove(segment.key, 100.0)
                del live[segment.key]
    assert not live, "everything that came got its turn"
    assert core.rows.running == 0


# --- pace -------------------------------------------------------------------------------------------------------------


def test_without_running_streams_a_step_is_as_large_as_it_may_be():
    assert Pace().budget(0, 1) == LARGEST


def seconds(decoding: int, prompt: int, speed: float = 1.0, keys: float = 0.0) -> float:
    """What a step costs on a pretend machine: something fixed, per stream, per prompt token, per 1 000 keys of one."""
    return (0.018 + 0.0012 * decoding + (0.0005 + 0.0001 * keys) * prompt) / speed


def paced(pace: Pace, speed: float = 1.0, rounds: int = 6, stalls: int = 0) -> Pace:
    """After bursts of sixteen prompts that end in decoding, on a machine of some speed that stands still at times."""
    steps = 0
    for _ in range(rounds):
        for decoding in [*range(16), *[16] * 40, *[1] * 40]:
            prompt = pace.budget(decoding, 16 - decoding) if decoding < 16 and steps % 96 < 16 else 0
            steps += 1
            took = seconds(decoding, prompt, speed)
            pace.note(decoding, prompt, prompt**2 // 2, 100 * took if stalls and steps % stalls == 0 else took)
    return pace


@pytest.mark.parametrize("stalls", [0, 50])
def test_a_chunk_takes_about_as_long_as_the_streams_beside_it(stalls):
    pace = Pace()
    for speed in (1.0, 4.0, 0.25):  # the machine gets faster, then slower
        paced(pace, speed, stalls=stalls)
        for decoding in (13, 14, 15):
            chunk = pace.budget(decoding, 1)
            assert 1.4 <= seconds(decoding, chunk) / seconds(decoding, 0) <= 2.0, (speed, decoding, chunk)


@pytest.mark.parametrize("slope", [0.0, 1.0, 5.0])
def test_a_long_prompt_makes_no_stream_wait_for_more_than_another_step(slope):
    """Its tokens cost more and more, and the short ones before it have not told by how much."""
    pace, reached, longest = paced(Pace()), 0, 0.0
    while reached < 3000:
        chunk = pace.budget(15, 1, reached)
        took = seconds(15, chunk, keys=slope * (reached + chunk / 2) / 1000)
        pace.note(15, chunk, chunk * reached + chunk**2 // 2, took)
        longest, reached = max(longest, took), reached + chunk
    assert longest <= 2.0 * seconds(15, 0)


def test_prompts_go_on_however_long_steps_take():
    pace = paced(Pace())
    for _ in range(200):
        pace.note(8, 16, 128, 5.0)
        pace.note(8, 0, 0, 0.01)
    assert pace.budget(8, 1) == 16


@pytest.mark.parametrize("bad", [(0, 1, 1, 3.0), (0, 512, 2**17, 20.0), (0, 512, 2**17, 0.001)], ids=str)
def test_a_bad_start_is_made_good_while_prompts_come_without_end(bad):
    pace, chunks = Pace(), []
    pace.note(*bad)
    for _ in range(120):
        chunk = pace.budget(15, 1)
        chunks.append(chunk)
        pace.note(15, chunk, chunk**2 // 2, seconds(15, chunk))
    ideal = 0.8 * seconds(15, 0) / 0.0005
    assert chunks[0] == 0, "what a step without prompts costs is seen first"
    assert all(0.75 * ideal <= chunk <= 1.25 * ideal for chunk in chunks[60:] if chunk)
    assert sum(chunk == 0 for chunk in chunks) <= 3


def test_many_that_wait_for_a_first_token_outweigh_the_pause_of_a_few():
    pace = paced(Pace())
    alone = pace.budget(15, 1)
    assert pace.budget(12, 1) <= alone
    assert pace.budget(12, 2) == pytest.approx(2 * pace.budget(12, 1), abs=3)
    assert pace.budget(4, 12) == LARGEST
