"""A few seeds with every run of the tests (``make simulate`` runs a thousand), and what they rely on."""

from __future__ import annotations

import pytest

from simulation import runs
from simulation.nemesis import Nemesis


@pytest.mark.parametrize("seed", range(8))
def test_a_seed(seed: int) -> None:
    run, _ = runs.once(seed)
    assert not run.failure, f"{run.failure}\n{run.story}\nreplay: make simulate SEED={seed}"


def test_a_seed_is_always_the_same_run() -> None:
    one, other = (Nemesis(11, loud=True) for _ in range(2))
    one.run()
    other.run()
    assert one.story.text() == other.story.text()
