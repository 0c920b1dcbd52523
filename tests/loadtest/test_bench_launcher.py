"""The benchmark of the launcher runs and says what it measured; the figures themselves are not for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loopmux_loadtest import bench_launcher


def test_it_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_launcher.main(["rest"]) == 0
    [rest] = map(json.loads, capsys.readouterr().out.splitlines())
    assert (rest["case"], rest["model"]) == ("rest", "echo")
    assert all(rest[name]["rss_mib"] > rest[name]["pss_mib"] > 0 for name in ("launcher", "broker", "keeper", "guard"))


def test_a_stream_is_measured_from_the_end_of_its_worker_to_its_next_token(tmp_path: Path) -> None:
    found = bench_launcher.loss(bench_launcher.Site(tmp_path, None, "echo"), runs=1, workers=2)
    assert 0 < found["pause_s"] == found["longest_s"] < 10


def test_what_it_cannot_do_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["fly"], "expected of build, start, loss, rest"), (["build"], "expected --config")):
        with pytest.raises(SystemExit):
            bench_launcher.main(words)
        assert said in capsys.readouterr().err
