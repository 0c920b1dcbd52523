from __future__ import annotations

import pytest

from loopmux_launcher.envplan import (
    Found,
    State,
    choose,
    earlier,
    forward,
    identity,
    next_folder,
    rolled_back,
    superfluous,
    switched,
)

A, B, C = "a" * 16, "b" * 16, "c" * 16


def test_the_hash_is_over_all_parts_and_lines_in_their_order() -> None:
    hashes = {
        identity(["3.11", "linux"], ["x"]),
        identity(["3.11"], ["linux", "x"]),
        identity(["3.11", "linux"], ["y"]),
    }
    assert len(hashes) == 3
    assert all(len(one) == 16 for one in hashes)


@pytest.mark.parametrize(
    ("good", "instead", "chosen"),
    [
        ([], {}, None),
        ([B], {}, None),
        ([A, B], {}, A),
        ([A, f"{A}-2", f"{A}-10"], {}, f"{A}-10"),
        ([A, B], {A: B}, B),
        ([A], {A: B}, A),  # what it was rolled back to is gone
        ([A, B], {C: B}, A),
    ],
)
def test_what_serves_a_declaration(good: list[str], instead: dict[str, str], chosen: str | None) -> None:
    assert choose(A, good, State(instead=instead)) == chosen


def test_another_build_of_a_hash_gets_a_number() -> None:
    assert next_folder(A, []) == next_folder(A, [B]) == A
    assert next_folder(A, [A, B]) == f"{A}-2"
    assert next_folder(A, [f"{A}-9", f"{A}-10"]) == f"{A}-11"


def test_rolling_back_goes_through_history_and_building_goes_forward() -> None:
    state = State()
    for folder in (A, B, A, C):
        state = switched(state, folder)
    assert state.history == (B, A, C)
    assert earlier(state, C, [A, B, C]) == [A, B]
    state = switched(rolled_back(state, C, C, A), A)
    assert choose(C, [A, B, C], state) == A
    assert earlier(state, A, [A, B, C]) == [B]
    state = switched(rolled_back(state, C, A, B), B)
    assert choose(C, [A, B, C], state) == B
    assert earlier(state, B, [A, B, C]) == []
    state = switched(forward(state, C), C)
    assert choose(C, [A, B, C], state) == C
    assert earlier(state, C, [A, B, C]) == [B]


def test_a_rollback_passes_over_what_is_gone() -> None:
    assert earlier(State((A, B, C)), C, [A, C]) == [A]
    assert earlier(State((A, B)), None, [A, B]) == [B, A]  # the declaration of now is not built
    assert earlier(State((A, B, C)), B, [A, B, C]) == [A]  # another configuration's was switched to since


def test_what_may_be_removed() -> None:
    meant = Found("default", A, good=True, configurations=("/x.yaml",))
    old = Found("default", B, good=True, configurations=("/x.yaml",))
    running = Found("default", C, good=True, processes=(7,))
    anothers = Found("old", A, good=True, configurations=("/broken.yaml",))
    half = Found("default", f"{A}-2", good=False, configurations=("/broken.yaml",))
    found = [meant, old, running, anothers, half]
    assert superfluous(found, {("default", A)}, ["/broken.yaml"]) == [old, half]
