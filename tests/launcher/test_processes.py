"""One supervised process, with real children."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from loopmux_launcher import envcommands, tether
from loopmux_launcher.logfile import RotatingLog
from loopmux_launcher.processes import LAST_LINES, Child, Ended, Said, broker_line
from processes import running
from waiting import wait_for

LIMIT = 60.0


@contextmanager
def child(tmp_path: Path, script: str, handover: bytes = b"") -> Iterator[Child]:
    one = Child("c", [sys.executable, "-c", script], os.environ, tmp_path / "c.log", handover=handover)
    try:
        yield one
    finally:
        if one.process.returncode is None:
            one.kill()
            one.process.wait()
            run(one)


def run(one: Child, until: Callable[[list[Said]], object] = lambda _: None) -> tuple[list[Said], Ended | None]:
    """Poll a child as the launcher does, until it has ended or ``until`` holds."""
    told: list[Said] = []
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        writes = [one.wants_write] if one.wants_write is not None else []
        readable, writable, _ = select.select(one.descriptors(), writes, [], 0.02)
        if writable:
            one.write()
        for descriptor in readable:
            told += one.read(descriptor)
        if until(told):
            return told, None
        ended = one.finished()
        if ended is not None:
            return told + ended.said, ended
    raise AssertionError(f"the child neither ended nor did what was waited for: {told}")


def test_phases_are_told_and_everything_else_is_logged(tmp_path: Path) -> None:
    script = """
import json, sys
print(json.dumps({"phase": "loading", "detail": "half"}))
print("a library's chatter")
print('{"no": "phase"}')
print("a complaint", file=sys.stderr)
print(json.dumps({"phase": "ready", "python": "/p"}), end="")
sys.exit(3)
"""
    with child(tmp_path, script) as one:
        told, ended = run(one)
    assert [(s.phase, s.detail) for s in told] == [("loading", "half"), ("ready", "")]
    assert told[1].fields["python"] == "/p"
    assert ended is not None
    assert ended.code == 3
    assert set(one.last_lines) == {"a library's chatter", '{"no": "phase"}', "a complaint"}
    log = (tmp_path / "c.log").read_text()
    assert "a library's chatter" in log
    assert '{"phase": "loading", "detail": "half"}' not in log.splitlines()
    assert "ended with 3" in log


def test_the_hand_over_arrives_whole_and_ends(tmp_path: Path) -> None:
    data = os.urandom(300_000).hex().encode()  # many times what a pipe holds
    script = "import sys, json; print(json.dumps({'phase': 'ready', 'detail': str(len(sys.stdin.read()))}))"
    with child(tmp_path, script, data) as one:
        told, _ = run(one)
    assert told == [Said("ready", str(len(data)), {"phase": "ready", "detail": str(len(data))})]


def test_a_child_that_dies_before_it_reads_is_no_trouble(tmp_path: Path) -> None:
    with child(tmp_path, "import os; os._exit(7)", b"x" * 1_000_000) as one:
        _, ended = run(one)
    assert ended == Ended(7, [])


def test_megabytes_of_output_are_kept_within_bounds(tmp_path: Path) -> None:
    script = """
import sys
for n in range(40_000):
    print("x" * 500, n)
sys.stderr.write("y" * 3_000_000)
print("the end")
"""
    with child(tmp_path, script) as one:
        _, ended = run(one)
    assert ended == Ended(0, [])
    assert len(one.last_lines) == LAST_LINES
    assert max(map(len, one.last_lines)) <= 400
    files = list(tmp_path.glob("c.log*"))
    assert len(files) > 1
    assert sum(f.stat().st_size for f in files) < 40 * 1024 * 1024


def test_a_program_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Child("c", ["/nowhere/python"], {}, tmp_path / "c.log")


def test_what_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    script = """
import json, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
helper = subprocess.Popen([sys.executable, "-c", code])
print(json.dumps({"phase": "ready", "helper": helper.pid}), flush=True)
time.sleep(60)
"""
    with child(tmp_path, script) as one:
        told, _ = run(one, until=lambda told: told)
        one.terminate()
        assert one.finished() is None
        one.kill()
        _, ended = run(one)
    assert ended == Ended(-signal.SIGKILL, [])
    wait_for(lambda: not running(told[0].fields["helper"]), "its end", LIMIT)


def test_helpers_of_a_child_that_ended_are_ended_too(tmp_path: Path) -> None:
    script = """
import json, subprocess, sys
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(json.dumps({"phase": "ready", "helper": helper.pid}), flush=True)
"""
    with child(tmp_path, script) as one:
        told, ended = run(one)
    assert ended is not None  # although the helper holds the pipes open
    assert ended.code == 0
    wait_for(lambda: not running(told[0].fields["helper"]), "its end", LIMIT)


def test_the_broker_is_ready_when_its_log_says_so() -> None:
    assert broker_line(b'{"event": "ready", "endpoints": ["ipc:///x"]}') == Said("ready", only=False)
    assert broker_line(b'{"event": "socket gone"}') == Said("unreachable", only=False)
    assert broker_line(b'{"event": "worker joined"}') is None
    died = b'{"event": "broker died", "by": "SIGSEGV", "again": %s}'
    said = Said("replaced", "ended by SIGSEGV; another one serves at once", only=False)
    assert broker_line(died % b"true") == said
    assert broker_line(died % b"false") is None
    assert broker_line(b"loopmux-broker: the path is taken") is None


def test_a_full_log_rotates_and_the_oldest_goes(tmp_path: Path) -> None:
    with RotatingLog(tmp_path / "l", limit=10, kept=2) as log:
        for n in range(5):
            log.write(b"%d-------\n" % n)
    assert [(tmp_path / name).read_text()[0] for name in ("l", "l.1", "l.2")] == ["4", "3", "2"]
    assert not (tmp_path / "l.3").exists()
    with RotatingLog(tmp_path / "l", limit=100) as log:
        log.write(b"more\n")
    assert (tmp_path / "l").read_text() == "4-------\nmore\n"


def test_a_log_that_somebody_moved_or_removed_is_begun_anew(tmp_path: Path) -> None:
    with RotatingLog(tmp_path / "l") as log:
        log.write(b"one\n")
        (tmp_path / "l").rename(tmp_path / "moved")
        log.write(b"two\n")
        (tmp_path / "l").unlink()
        log.write(b"three\n")
        (tmp_path / "l").write_bytes(b"")  # copied and truncated: it is the same one
        log.write(b"four\n")
    assert [(tmp_path / name).read_text() for name in ("l", "moved")] == ["four\n", "one\n"]


def test_a_tethered_program_dies_with_whoever_started_it() -> None:
    middle = """
import subprocess, sys
from loopmux_launcher import tether
command = tether.tethered([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"])
p = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
p.stdout.readline()
print(p.pid, flush=True)
p.wait()
"""
    with subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        foreign = int(started.stdout.readline())
        started.kill()
    wait_for(lambda: not running(foreign), "its end", LIMIT)


@pytest.mark.parametrize("number", tether.ENDS)
def test_who_is_interrupted_while_it_starts_a_program_ends_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more)
            started.append(self)
            signal.raise_signal(number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), tether.foreign(["sleep", "60"], {}, tmp_path):
            pytest.fail("it went on")
        assert signal.getsignal(number) == interrupt
    finally:
        signal.signal(number, before)
    (process,) = started
    assert process.returncode is not None


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('up', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", tether.ENDS)
def test_the_end_of_a_program_that_a_command_runs_is_not_interrupted(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    wait = tether._wait_for

    def impatient(condition: Callable[[], bool]) -> None:
        for again in tether.ENDS:
            signal.raise_signal(again)
        wait(condition)

    def run() -> None:
        with tether.foreign([sys.executable, "-c", STUBBORN], os.environ) as process:
            started.append(process)
            assert process.stdout is not None
            process.stdout.readline()
            signal.raise_signal(number)

    monkeypatch.setattr(tether, "_wait_for", impatient)
    monkeypatch.setattr(tether, "_GRACE", 0.1)
    before = {each: signal.signal(each, signal.default_int_handler) for each in tether.ENDS}
    try:
        envcommands._stop_in_good_order()
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    (process,) = started
    assert process.returncode == -signal.SIGKILL


def test_what_a_foreign_program_started_has_ended_when_its_end_is_known() -> None:
    child = "import time; print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seen: list[psutil.Process] = []

    def fail() -> None:
        with tether.foreign([sys.executable, "-c", parent], os.environ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seen.extend(psutil.Process(process.pid).children())
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    (grandchild,) = seen
    assert not running(grandchild)


def test_a_program_whose_parent_is_already_another_does_not_start() -> None:
    command = [sys.executable, "-c", "from loopmux_launcher.tether import die_with_parent; die_with_parent(1)"]
    assert subprocess.run(command, check=False).returncode == 1


def test_exit_is_seen_without_reaping() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True) as process:
        end = time.monotonic() + LIMIT
        while not tether.has_exited(process) and time.monotonic() < end:
            select.select([], [], [], 0.01)
        assert tether.has_exited(process)
        assert process.returncode is None
        tether.kill_group(process)  # a group of one zombie: nothing happens
        assert process.wait() == 0
        assert tether.has_exited(process)
        tether.kill_group(process)


def test_json_that_is_no_object_is_a_line_like_others(tmp_path: Path) -> None:
    lines = json.dumps(["{", "[1]", '{"phase": 3}'])
    with child(tmp_path, f"import json\nfor line in json.loads({lines!r}): print(line)") as one:
        told, _ = run(one)
    assert told == []
    assert one.last_lines == ("{", "[1]", '{"phase": 3}')


def test_a_log_that_cannot_be_written_says_why_until_it_can(tmp_path: Path) -> None:
    place = tmp_path / "logs"
    place.write_text("a file in the way")
    with RotatingLog(place / "l") as log:
        log.write(b"lost\n")
        assert log.trouble
        place.unlink()
        log.write(b"kept\n")
        assert log.trouble == ""
    assert (place / "l").read_bytes() == b"kept\n"
