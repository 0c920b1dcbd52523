from __future__ import annotations

import io
import json
import sys

import pytest

from loopmux_launcher.console import Console
from loopmux_launcher.events import Announce


def say(console: Console, *news: tuple[str, str, str]) -> None:
    for subject, text, level in news:
        console.announce(Announce(subject, text, level))  # type: ignore[arg-type]


def test_plain_lines_name_time_and_subject_and_errors_go_aside(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("plain")
    say(console, ("a", "started", "info"), ("b", "bad", "error"), ("launcher", "ready after 1 s: a", "ready"))
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split(maxsplit=2)[1:] == ["s", "a: started"]
    assert out.splitlines()[1] == "ready after 1 s: a"
    assert err.endswith("b: bad\n")


def test_plain_progress_comes_when_something_else_begins(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("plain")
    told = ["collecting a", "collecting b", "collecting c", "installing 3 packages", "probing"]
    say(console, *[("e", text, "progress") for text in told])
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [told[0], *told[3:]]


def test_a_live_line_is_written_over_and_gone_before_the_next_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("live")
    say(console, ("e", "collecting a", "progress"), ("e", "collecting b", "progress"), ("e", "ready", "info"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.count("\r\x1b[K") == 3
    assert out.rsplit("\r\x1b[K")[-1].endswith("e: ready\n")


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(Console("json"), ("e", "it's\nso", "progress"))
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) | {"elapsed": 0} == {"elapsed": 0, "level": "progress", "subject": "e", "text": "it's\nso"}


def test_a_pipe_without_a_reader_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    say(Console("plain"), ("a", "started", "info"))
