from __future__ import annotations

import json
from pathlib import Path

import pytest

from fakebroker import FakeBroker
from loopmux_loadtest import bench_client, bench_import


def test_the_client_benchmark_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeBroker(f"ipc://{tmp_path / 'b'}", window=256) as broker:
        assert bench_client.main(["--endpoint", broker.endpoint, "--requests", "20"]) == 0
    report = json.loads(capsys.readouterr().out)
    for figure in ("ttft", "ttft_asyncio", "round_trip"):
        assert 0 < report[figure]["p50"] <= report[figure]["p99"] < 5000
    assert 0 < report["client_us_per_chunk"] < 5000


def test_the_import_benchmark_says_what_was_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_import.main(["--runs", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["import loopmux"]["loaded"] == []
    assert report["import loopmux"]["median_ms"] > 0
    assert report["import loopmux, then loopmux.AsyncClient"]["loaded"] == ["asyncio"]
