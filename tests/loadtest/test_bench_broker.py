"""The benchmark of the broker runs and says what it measured; the figures themselves are not for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_every_case_is_printed_and_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loopmux_loadtest.bench_broker", "--rounds", "1", "--scale", "0.02"]
    command += ["--clients", "1", "8", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    alone = ["versions", "core", "round_trip", "chunk_cpu", "chunk_cpu", "curve"]
    assert [case["case"] for case in cases] == alone + 6 * ["load"] + 4 * ["ratio"]
    assert cases[1]["request"] > cases[1]["TOK"] > 0
    assert min(through := [cases[2][f"{way}_p50"] for way in ("broker", "direct")]) > 0
    assert cases[2]["added_p50"] == round(through[0] - through[1], 3)
    assert [case["paced"] for case in cases[3:5]] == [False, True]
    assert all(cases[5][f"{side}_us_per_chunk"] > 0 for side in ("clear", "keyed"))
    loads = [case for case in cases if case["case"] == "load"]
    assert {(case["side"], case["clients"]) for case in loads} == {
        (side, clients) for side in ("loopmux", "proxy", "poller") for clients in (1, 8)
    }
    assert all(case["requests_per_s"] > 0 and case["chunks_per_s"] > 0 and case["rss_mib"] > 0 for case in loads)
    [kept] = tmp_path.iterdir()
    assert kept.read_text() == done.stdout
