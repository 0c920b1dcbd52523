"""The benchmark of the broker runs and says what it measured; the figures themselves are not for a test."""

from __future__ import annotations

import json
import subprocess
import sys


def test_every_case_is_printed() -> None:
    command = [sys.executable, "-m", "loopmux_loadtest.bench_broker", "--rounds", "1", "--scale", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case["case"] for case in cases] == ["round_trip", "chunk_cpu", "chunk_cpu", "callers"]
    assert cases[0]["broker_p50"] > 0
    assert [case["paced"] for case in cases[1:3]] == [False, True]
    assert all(case["us_per_chunk"] > 0 for case in cases[1:3])
    assert cases[3]["requests_per_s"] > 0
