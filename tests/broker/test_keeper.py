"""A broker that dies is followed by another one, of the same parent; when that is enough, both end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from brokerwire import PATIENCE, Peer, Process, broker, fails, plain, settings, until
from loopmux import keys
from processes import running as runs


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/sockets/b.ipc"


KEPT = """
import json, sys
from loopmux_broker import keeper, program, server

vars(keeper).update(json.loads(sys.argv[1]))
server._LONGEST_POLL = 0.1
sys.exit(program.main(["--log-format", "json", "--endpoint", sys.argv[2]]))
"""


@contextmanager
def kept(endpoint: str, **times: float) -> Iterator[Process]:
    """A broker whose parent judges by other times."""
    words = [sys.executable, "-c", KEPT, json.dumps(times), endpoint]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            running = Process(process, {})
            running.ready = running.line()
            yield running
        finally:
            process.terminate()


def test_another_one_serves_at_once_with_the_settings_as_they_are_now(tmp_path: Path, endpoint: str) -> None:
    path = settings(tmp_path, window=7)
    doors = ["--endpoint", endpoint, "--endpoint", "tcp://127.0.0.1:0"]
    with broker("--config", str(path), *doors) as first, Peer(first.clients) as client:
        assert client.hello().window == 7
        settings(tmp_path, window=9)
        until(lambda: client.status().uptime > 1.0, "it has served")
        os.kill(first.process.pid, signal.SIGSTOP)  # no other one yet
        os.kill(first.serving, signal.SIGKILL)
        until(lambda: not runs(first.serving), "it is dead")
        for each in first.ready["endpoints"]:
            plain(each).close()  # nobody is refused
        assert "taken by another program" in fails("--endpoint", each)[1]  # nor can anybody else have the port
        os.kill(first.process.pid, signal.SIGCONT)
        died, ready = first.line(), first.line()
        assert (died["event"], died["by"], died["again"]) == ("broker died", "SIGKILL", True)
        assert died["after"] > 1.0
        assert (ready["event"], ready["endpoints"]) == ("ready", first.ready["endpoints"])
        assert psutil.Process(ready["pid"]).ppid() == first.process.pid
        assert client.hello().window == 9
        assert client.status().pid == ready["pid"]


def test_another_one_serves_by_the_last_good_settings_where_they_are_wrong_now(tmp_path: Path, endpoint: str) -> None:
    path = settings(tmp_path, window=7)
    with broker("--config", str(path), "--endpoint", endpoint) as first, Peer(first.clients) as client:

        def next_one(window: int) -> list[dict[str, object]]:
            client.hello()
            until(lambda: client.status().uptime > 1.0, "it has served")
            os.kill(client.status().pid, signal.SIGKILL)
            said = [first.line()]
            while said[-1]["event"] != "ready":
                said.append(first.line())
            assert client.hello().window == window
            return said

        settings(tmp_path, window=9)
        assert [line["event"] for line in next_one(9)] == ["broker died", "ready"]
        mistakes = {
            "windw: 11": "did you mean 'window'",
            "window: 2026-02-31": "day is out of range",
            "window: !!bool maybe": "maybe",
        }
        for text, reason in mistakes.items():
            path.write_text(text)
            _, refused, _ = next_one(9)
            assert refused["event"] == "settings refused, the former ones stay in force"
            assert reason in str(refused["reason"])
        settings(tmp_path, window=11)
        next_one(11)


@pytest.mark.parametrize("mistake", ["a key that is gone", "nobody's key"])
def test_so_does_it_with_the_last_good_key_and_for_what_is_listened_on(
    tmp_path: Path, endpoint: str, mistake: str
) -> None:
    file, ours = keys.new("ours", tmp_path)
    _, desk = keys.new("desk", tmp_path)
    path = settings(tmp_path, key="ours.key", client_keys={"desk": desk.public})
    doors = ["--endpoint", endpoint, "--endpoint", "tcp://127.0.0.1:0"]
    with broker("--config", str(path), *doors) as first, Peer(first.clients) as client:
        client.hello()
        until(lambda: client.status().uptime > 1.0, "it has served")
        if mistake == "a key that is gone":
            file.unlink()
        else:
            settings(tmp_path, key="ours.key")
        os.kill(first.serving, signal.SIGKILL)
        said = [first.line()["event"] for _ in range(3)]
        assert said == ["broker died", "settings refused, the former ones stay in force", "ready"]
        with Peer(first.ready["endpoints"][1], keys.Credentials(desk, ours.public)) as keyed:
            keyed.hello()


def test_what_a_broker_dies_of_at_once_is_for_others_to_judge(tmp_path: Path, endpoint: str) -> None:
    with kept(endpoint, _SERVED=3600.0) as only:
        os.kill(only.serving, signal.SIGKILL)
        died = only.line()
        assert (died["event"], died["by"], died["again"]) == ("broker died", "SIGKILL", False)
        assert only.process.wait(PATIENCE) == 128 + signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_killed_just_when_it_is_asked_to_end_leaves_nothing_behind(tmp_path: Path, endpoint: str) -> None:
    with broker("--endpoint", endpoint) as asked:
        os.kill(asked.process.pid, signal.SIGSTOP)  # it hears of both at once
        os.kill(asked.serving, signal.SIGKILL)
        os.kill(asked.process.pid, signal.SIGTERM)
        os.kill(asked.process.pid, signal.SIGCONT)
        assert asked.process.wait(PATIENCE) == 128 + signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, signal, sys
from types import SimpleNamespace
from loopmux.pulse import Pulse
from loopmux_broker import keeper
from loopmux_broker.logs import Logger

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as some do, and pass on
served, last = open(sys.argv[1], "ab", buffering=0), int(sys.argv[2])  # a byte for each second
keeper.time = SimpleNamespace(monotonic=served.tell)
code = keeper.keep(Logger("console", "info"), Pulse())
if code is None:
    before = served.tell()
    served.write(b"." if before < 2 or last == 78 else b"")
    match before:
        case 0:
            raise RuntimeError("a bug")
        case 1:
            os.abort()
    os._exit(last)
print("parent ends with", code)
"""


CRASHING = """
import os
from loopmux.pulse import Pulse
from loopmux_broker import keeper
from loopmux_broker.logs import Logger

keeper._SERVED, keeper._OFTEN = 0.0, 3
code = keeper.keep(Logger("console", "info"), Pulse())
if code is None:
    os.abort()
print("parent ends with", code)
"""


def test_what_brokers_die_of_again_and_again_is_for_others_to_judge() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHING], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout == f"parent ends with {128 + signal.SIGABRT}\n"
    assert done.stderr.count("broker died") == 3


def test_one_that_hangs_is_killed_and_one_that_has_nothing_to_do_is_not(endpoint: str) -> None:
    with kept(endpoint, _SERVED=0.0, _HUNG=4.0) as first:
        over = time.monotonic() + 4.3
        until(lambda: time.monotonic() > over, "longer than one may hang")
        with Peer(first.clients) as client:
            client.hello()
            assert client.status().pid == first.serving
        os.kill(first.serving, signal.SIGSTOP)
        hangs, died, ready = first.line(), first.line(), first.line()
        assert (hangs["event"], hangs["pid"]) == ("broker hangs", first.serving)
        assert (died["event"], died["by"], died["again"]) == ("broker died", "SIGKILL", True)
        assert (ready["event"], ready["endpoints"]) == ("ready", [endpoint])
    assert first.process.returncode == 0


@pytest.mark.parametrize(
    "last", [0, 3, 78], ids=["in good order", "at once", "its settings are wrong, which took it long"]
)
def test_it_goes_on_until_one_ends_by_itself(tmp_path: Path, last: int) -> None:
    words = ["-c", SCRIPT, str(tmp_path / "began"), str(last)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == f"parent ends with {last}\n"
    assert "RuntimeError: a bug" in done.stderr
    told = [line.partition("broker died  ")[2].split("  ") for line in done.stderr.splitlines() if "died" in line]
    assert [(by, again) for by, _after, again in told] == [
        ("by=exit code 1", "again=True"),
        ("by=SIGABRT", "again=True"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("both", [False, True], ids=["the one that serves", "both, as Ctrl-C does"])
def test_a_broker_that_is_asked_to_end_has_no_successor(
    tmp_path: Path, endpoint: str, number: signal.Signals, both: bool
) -> None:
    with broker("--endpoint", endpoint) as asked:
        if both:
            os.kill(asked.process.pid, number)
        os.kill(asked.serving, number)
        assert asked.process.wait(PATIENCE) == 0
        assert "broker died" not in asked.process.communicate()[1]
    assert list(tmp_path.iterdir()) == []


ASKED_IN_BETWEEN = """
import os, sys
from loopmux_broker import program

class Asked(program.Lifeline):
    def catch_signals(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        super().catch_signals()

    def close(self):
        super().close()
        os.kill(os.getpid(), int(sys.argv[1]))

program.Lifeline = Asked
sys.exit(program.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_that_is_asked_to_end_as_it_begins_and_as_it_ends_does_so_in_good_order(
    tmp_path: Path, endpoint: str, number: signal.Signals
) -> None:
    words = [sys.executable, "-c", ASKED_IN_BETWEEN, str(int(number)), "--endpoint", endpoint]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert f"stopping  reason={number.name}" in done.stderr
    assert "broker died" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_who_was_started_by_nohup_stays_when_its_terminal_goes(endpoint: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with broker("--endpoint", endpoint) as running, Peer(running.clients) as client:
            client.hello()
            for process in (running.process.pid, running.serving):
                os.kill(process, signal.SIGHUP)
            assert client.status().pid == running.serving
            assert running.stop()[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_parent_takes_its_broker_along(tmp_path: Path, endpoint: str) -> None:
    with broker("--endpoint", endpoint) as killed:
        killed.process.kill()
        until(lambda: not runs(killed.serving), "the broker ended")
    assert list(tmp_path.iterdir()) == []
