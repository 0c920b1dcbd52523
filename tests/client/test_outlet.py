"""Lines for readers that are slow, stopped or gone."""

from __future__ import annotations

import fcntl
import os
import pty
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import pytest

from loopmux.outlet import Outlet

PAGE = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """A pipe that takes a page: the descriptor to read from, the stream to write to."""
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PAGE)
    with os.fdopen(into, "w") as stream:
        yield out, stream
    os.close(out)


def outlet(stream: TextIO | None) -> Outlet:
    return Outlet(stream, lambda count: f"{count} lost\n")


def read(out: int, written: Outlet) -> list[str]:
    """The lines that a reader gets who reads all there is."""
    os.set_blocking(out, False)
    found = b""
    while True:
        written.flush()
        try:
            found += os.read(out, PAGE)
        except BlockingIOError:
            return found.decode().splitlines()


def test_a_reader_who_does_not_read_is_not_waited_for_and_gets_all_of_it_later(pipe: tuple[int, TextIO]) -> None:
    out, stream = pipe
    written = outlet(stream)
    lines = [f"line {n} " + "x" * 100 for n in range(500)] + ["long " + "ä€" * 5000]
    for line in lines:
        written.write(line + "\n")
    assert read(out, written) == lines


def test_what_is_too_much_is_lost_and_its_number_told(pipe: tuple[int, TextIO]) -> None:
    out, stream = pipe
    written = outlet(stream)
    for n in range(20_000):
        written.write(f"line {n} " + "x" * 100 + "\n")
    found = read(out, written)
    assert found.pop() == f"{20_000 - len(found)} lost"
    assert [line.split()[1] for line in found] == [str(n) for n in range(len(found))]
    written.write("more\n")
    assert read(out, written) == ["more"]


def test_a_full_disk_is_gone_on_from(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        written = outlet(stream)
        disk = os.dup(stream.fileno())
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, stream.fileno())
        written.write("one\n")
        written.write("two\n")
        os.dup2(disk, stream.fileno())
        written.write("three\n")
        os.close(full)
        os.close(disk)
    assert (tmp_path / "log").read_text() == "2 lost\nthree\n"


def test_a_reader_who_is_gone_is_no_trouble_and_the_next_one_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    out = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    with (tmp_path / "log").open("w") as stream:
        os.close(out)
        written = outlet(stream)
        for _ in range(3):
            written.write("one\n")
        out = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
        written.write("two\n")
        assert read(out, written) == ["3 lost", "two"]
    os.close(out)


def test_a_stream_that_was_closed_takes_nothing() -> None:
    written = outlet(None)
    for _ in range(3):
        written.write("one\n")
    assert not written._waiting


def test_threads_write_whole_lines_each_of_them_once(pipe: tuple[int, TextIO]) -> None:
    out, stream = pipe
    written = outlet(stream)
    lines = [[f"{thread} {n} {'x' * 300}" for n in range(300)] for thread in range(3)]
    with ThreadPoolExecutor(3) as pool:
        writing = [pool.submit(lambda mine: [written.write(one + "\n") for one in mine], mine) for mine in lines]
        found = list[str]()
        while not all(one.done() for one in writing):
            found += read(out, written)
        assert [one.exception() for one in writing] == [None, None, None]
    found += read(out, written)
    assert [[line for line in found if line[0] == mine[0][0]] for mine in lines] == lines


def test_the_end_waits_for_a_slow_reader_and_not_for_ever(pipe: tuple[int, TextIO]) -> None:
    out, stream = pipe
    written = outlet(stream)
    lines = [f"line {n} " + "x" * 100 for n in range(500)]
    for line in lines:
        written.write(line + "\n")
    written.drain(0.05)
    with ThreadPoolExecutor(1) as pool, os.fdopen(os.dup(out)) as reader:
        reading = pool.submit(reader.read)
        written.drain(60)
        stream.close()
        assert reading.result().splitlines() == lines


def test_a_forked_process_says_nothing_of_its_parent_s(pipe: tuple[int, TextIO]) -> None:
    out, stream = pipe
    written = outlet(stream)
    for n in range(500):
        written.write(f"line {n} " + "x" * 100 + "\n")
    written.forget()
    written.write("mine\n")
    assert read(out, written)[-1] == "mine"


@pytest.mark.parametrize("stopped", [True, False])
def test_a_terminal_that_is_stopped_or_stuck_is_not_waited_for_and_shows_it_later(stopped: bool) -> None:
    seen, shown = pty.openpty()
    with os.fdopen(shown, "w") as stream:
        written = outlet(stream)
        if stopped:
            termios.tcflow(stream, termios.TCOOFF)  # Ctrl-S
        for n in range(2000):
            written.write(f"line {n} {'x' * 100}\n")
        if stopped:
            termios.tcflow(stream, termios.TCOON)
        found = b""
        while found.count(b"\n") < 2000:
            written.flush()
            found += os.read(seen, PAGE)
    os.close(seen)
    assert [line.split()[1] for line in found.decode().splitlines()] == [str(n) for n in range(2000)]
