from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import sys
from datetime import UTC, datetime, timedelta

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


def test_of_what_is_done_nothing_is_kept() -> None:
    console = Console("plain")
    for n in range(3):
        say(console, (f"e{n}", "collecting", "progress"), (f"e{n}", "ready", "info"))
    assert (console._told, console._doing) == ({}, {})


def screen(out: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines = [""]
    for part in re.findall(r"\x1b\[\d*[AJ]|\r|\n|[^\x1b\r\n]+", out):
        if part.startswith("\x1b"):
            up = int(part[2:-1] or 0) if part.endswith("A") else 0
            assert up < len(lines), "above the top of what was written"
            lines = lines[: len(lines) - up] if up else lines
        elif part == "\n":
            lines.append("")
        elif part == "\r":
            lines[-1] = ""
        else:
            lines[-1] += part
    return lines[:-1] if lines[-1] == "" else lines


def words(lines: list[str]) -> list[str]:
    """Without the seconds."""
    return [re.sub(r"^ *[\d.]+ s  ", "", line) for line in lines]


def test_what_is_under_way_stands_below_all_lines_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with Console("live") as console:
        say(console, ("a", "started", "info"), ("e", "collecting a", "progress"), ("f", "resolving", "progress"))
        console.show(["MODEL", "m"])
        say(console, ("b", "started", "info"), ("e", "collecting b", "progress"))
        seen = capsys.readouterr().out
        below = ["e: collecting b", "f: resolving", "MODEL", "m"]
        assert words(screen(seen)) == ["a: started", "b: started", *below]
        say(console, ("e", "ready", "info"))
        seen += capsys.readouterr().out
        assert words(screen(seen)) == ["a: started", "b: started", "e: ready", "f: resolving", "MODEL", "m"]
    assert words(screen(seen + capsys.readouterr().out)) == ["a: started", "b: started", "e: ready"]


def test_a_view_that_is_too_large_shows_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((10, 4)))
    console = Console("live")
    console.show([f"line {n} that is long" for n in range(9)])
    assert screen(capsys.readouterr().out) == ["line 6 th", "line 7 th", "line 8 th"]


def test_nothing_is_shown_below_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Console("plain") as console:
        console.show(["MODEL", "m"])
    assert capsys.readouterr().out == ""


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(Console("json"), ("e", "it's\nso", "progress"))
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(said.pop("timestamp"))) < timedelta(minutes=1)
    assert said | {"elapsed": 0} == {"elapsed": 0, "level": "progress", "subject": "e", "text": "it's\nso"}


def test_a_pipe_without_a_reader_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    say(Console("plain"), ("a", "started", "info"))


def test_a_reader_who_does_not_read_is_not_waited_for_and_gets_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    found = b""
    with os.fdopen(into, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console = Console("plain")
        say(console, *[("a", f"line {n} {'x' * 100}", "info") for n in range(200)])
        os.set_blocking(out, False)
        while len(found.splitlines()) < 200:
            found += os.read(out, 4096)
            console.pass_on()
    os.close(out)
    assert [line.split()[4] for line in found.decode().splitlines()] == [str(n) for n in range(200)]


def test_a_live_view_that_nobody_reads_takes_no_room_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    found = b""
    with os.fdopen(into, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console = Console("live")
        for n in range(20_000):
            console.show(["x" * 70, f"view {n}"])
        say(console, *[("a", f"line {n}", "info") for n in range(100)])
        console.show(["the last view"])
        os.set_blocking(out, False)
        while not found.endswith(b"the last view\n"):
            found += os.read(out, 4096)
            console.pass_on()
    os.close(out)
    assert words(screen(found.decode())) == [*[f"a: line {n}" for n in range(100)], "the last view"]


def test_a_closed_output_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    say(Console(), ("a", "started", "info"))
