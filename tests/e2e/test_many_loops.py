"""Many loops over two workers, undisturbed and while both a worker and the broker are killed: nobody can tell."""

from __future__ import annotations

import json

import pytest

from loopmux_loadtest import bench_loops

LOOPS = 16
"""As many as there are slots: with more, turns that move in the last seconds weigh too much among so few."""


@pytest.mark.timeout(240)
def test_every_transcript_is_as_it_is_alone_and_no_tool_runs_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_loops.main(["--loops", str(LOOPS), "--turns", "4", "--slots", "8", "--kill"]) == 0
    alone, together, killed = map(json.loads, capsys.readouterr().out.splitlines())
    for run in (alone, together, killed):
        assert run["loops"] == LOOPS
        assert run["turns"] == alone["turns"] >= 3.5 * LOOPS
        assert run["failed"] == []
        assert run["malformed"] == run["differ"] == run["rerun"] == run["rewritten"] == 0
    assert together["reused"] >= 0.95
    assert together["stretch"] <= 3
    assert alone["again"] == together["again"] == 0 < killed["again"]
