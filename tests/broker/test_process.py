"""The broker's process as service managers and users meet it: endpoints, locks, files, signals, exit codes."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from brokerwire import PATIENCE, Peer, broker, command, fails, settings, until
from loopmux.claims import BusyError, Claim
from loopmux.errors import ConfigError, LoopmuxError
from loopmux.listening import Listening
from loopmux.wire import Kind
from loopmux_broker.config import BrokerConfig
from loopmux_broker.configfile import load
from processes import running as runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/sockets/b.ipc"


def test_a_file_in_the_place_of_its_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, written = fails("--endpoint", f"ipc://{tmp_path}/file/sockets/b.ipc")
    assert code == 78
    assert f"found the file {tmp_path}/file in its place, expected a folder that this user can write to" in written
    assert "choose another --endpoint" in written
    assert len(written.splitlines()) == 1


def test_folders_that_it_made_go_with_it(tmp_path: Path) -> None:
    with broker("--endpoint", f"ipc://{tmp_path}/a/b/c.ipc") as running:
        assert (tmp_path / "a" / "b").is_dir()
        running.stop()
    assert list(tmp_path.iterdir()) == []


def test_folder_and_sockets_are_this_users_alone(endpoint: str, tmp_path: Path) -> None:
    with broker("--endpoint", endpoint) as running:
        folder = tmp_path / "sockets"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        names = ["b.ipc", "b.ipc.admin", "b.ipc.admin.lock", "b.ipc.lock", "b.ipc.work", "b.ipc.work.lock"]
        assert sorted(p.name for p in folder.iterdir()) == names
        assert all(not p.stat().st_mode & 0o077 for p in folder.iterdir())
        assert running.ready["level"] == "info"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_removes_its_files(endpoint: str, tmp_path: Path, number: signal.Signals) -> None:
    with broker("--endpoint", endpoint) as running, Peer(running.clients) as client:
        client.hello()
        code, written = running.stop(number)
        assert (code, number.name in written) == (0, True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    with broker("--endpoint", f"ipc://{tmp_path}/b.ipc"):
        pass
    assert tmp_path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_busy_path_names_its_holder_and_the_remedy(endpoint: str, tmp_path: Path) -> None:
    words = ("--config", str(settings(tmp_path)), "--endpoint", endpoint)
    with broker(*words) as running, Peer(running.clients) as client:
        client.hello()
        code, written = fails("--endpoint", endpoint)
        assert code == 1
        assert f"held by a running broker, process {running.process.pid}" in written
        assert "choose another --endpoint" in written
        assert len(written.splitlines()) == 1
        assert client.alive()


def test_a_socket_that_another_program_listens_on_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.ipc"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        with pytest.raises(BusyError, match="held by a running program that is no broker of ours"):
            Claim(path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c.ipc"]
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
    claim = Claim(path)  # nobody listens any more
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_who_lost_a_path_leaves_the_next_ones_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "sockets" / "c.ipc"
    claim = Claim(path)
    shutil.rmtree(path.parent)
    other = Listening(f"ipc://{path}")
    claim.release()
    assert sorted(p.name for p in path.parent.iterdir()) == ["c.ipc", "c.ipc.lock"]
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_path_on_a_full_disk_is_given_up_and_had_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "sockets" / "c.ipc"
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(LoopmuxError, match="sockets, cannot be used: found No space left on device") as told:
            Claim(path)
    assert not isinstance(told.value, ConfigError)  # service managers try again
    assert list(tmp_path.iterdir()) == []
    Claim(path).release()


def test_what_a_killed_broker_left_is_replaced(endpoint: str) -> None:
    with broker("--endpoint", endpoint) as running:
        os.kill(running.serving, signal.SIGSTOP)  # else it would see its parent's death and clean up
        running.process.kill()
        os.kill(running.serving, signal.SIGKILL)
        running.process.wait()
        until(lambda: not runs(running.serving), "broker ended")
    assert Path(endpoint.removeprefix("ipc://")).exists()
    with broker("--endpoint", endpoint) as running, Peer(running.clients) as client:
        client.hello()


def test_a_log_that_nobody_reads_holds_nobody_up(endpoint: str, tmp_path: Path) -> None:
    unread, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    words = command("--config", str(settings(tmp_path)), "--endpoint", endpoint)
    with subprocess.Popen(words, stderr=into) as process:
        os.close(into)
        try:
            until(lambda: Path(f"{endpoint}.work".removeprefix("ipc://")).exists(), "listens")
            with Peer(endpoint) as client, Peer(f"{endpoint}.work") as worker:
                client.hello()
                for n in range(100):  # each of them is a line or two
                    worker.register(f"w{n}")
                assert client.alive()
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    os.close(unread)


def test_a_file_that_is_no_socket_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    code, written = fails("--endpoint", f"ipc://{path}")
    assert code == 78
    assert "is no socket" in written
    assert path.read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_is_one_clear_line() -> None:
    code, written = fails("--endpoint", "ipc:///proc/b.ipc")
    assert code == 78
    assert "the folder for sockets, /proc, cannot be used: found No such file or directory" in written
    assert "choose another --endpoint" in written
    assert "Traceback" not in written


def test_a_busy_port(endpoint: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, written = fails("--endpoint", f"tcp://127.0.0.1:{port}", "--worker-endpoint", endpoint)
    assert code == 1
    assert f"tcp://127.0.0.1:{port} is taken" in written


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--endpoint", "tcp://0.0.0.0:7750"], 78, "expected a loopback address"),
        (["--endpoint", "tcp://*:7750"], 78, "expected a loopback address"),
        (["--endpoint", "tcp://example.org:7750"], 78, "tcp://example.org:7750: found an address"),
        (["--endpoint", "tcp://127.0.0.1"], 78, "names no port"),
        (["--endpoint", "http://127.0.0.1:80"], 78, "neither ipc"),
        (["--endpoint", "ipc://@abstract"], 78, "neither ipc"),
        (["--endpoint", "ipc:///" + "x" * 120], 78, "at most 100 fit"),
        (["--endpoint", "ipc:///tmp/a", "--worker-endpoint", "ipc:///tmp/a"], 78, "two different endpoints"),
        (["--config", "/nowhere/broker.yaml"], 78, "/nowhere/broker.yaml: No such file"),
        (["--parent-pid", "4194304"], 1, "no such process"),
        (["--wrong"], 2, "usage"),
        (["--log-level", "loud"], 2, "invalid choice"),
    ],
)
def test_what_it_refuses(arguments: list[str], code: int, words: str) -> None:
    found, written = fails(*arguments)
    assert (found, words in written) == (code, True), written
    assert "Traceback" not in written


def test_it_ends_and_cleans_up_when_its_parent_is_killed(endpoint: str, tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, os\n"
        f"p = subprocess.Popen({command('--endpoint', endpoint)!r} + ['--parent-pid', str(os.getpid())], stderr=-1)\n"
        "p.stderr.readline(); print(p.pid, flush=True); sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    until(lambda: not (tmp_path / "sockets").exists(), "socket folder removed")
    until(lambda: not runs(child), "broker ended")


# --- configuration


def test_the_file_in_the_repository_shows_the_defaults() -> None:
    assert load(ROOT / "configs" / "broker.yaml") == BrokerConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "window: 8\nheartbaet: 2\n",
            ":2: heartbaet: found an unknown key",
        ),
        ("heartbaet: 2\n", "did you mean 'heartbeat'?"),
        ("heartbeat: fast\n", ":1: heartbeat: found 'fast' (str), expected a number"),
        ("\nlimits:\n  queued: 1\n  held: -1\n", ":4: limits.held: found -1 (int), expected a number above 0"),
        ("limits:\n  qeued: 1\n", ":2: limits.qeued: found an unknown key"),
        ("heartbeat: .nan\n", "expected a number above 0"),
        ("- 1\n", "expected a mapping"),
        ("a: [\n", "not YAML"),
        ("endpoints: tcp://127.0.0.1:1\n", "endpoints: found"),
    ],
)
def test_a_wrong_file_is_refused_by_line_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broker.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_the_command_line_goes_before_the_file(tmp_path: Path, endpoint: str) -> None:
    path = settings(tmp_path, endpoints=["ipc:///tmp/never.ipc"], window=7)
    with broker("--config", str(path), "--endpoint", endpoint) as running, Peer(running.clients) as client:
        assert running.ready["endpoints"] == [endpoint]
        assert client.hello().window == 7


def test_defaults_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("LOOPMUX_ENDPOINT", raising=False)
    config = BrokerConfig().with_endpoints((), ())
    assert config.endpoints == (f"ipc://{tmp_path}/loopmux/client.ipc",)
    assert config.worker_endpoints == (f"ipc://{tmp_path}/loopmux/client.ipc.work",)


def test_no_prompt_in_the_log(endpoint: str) -> None:
    with broker("--endpoint", endpoint, "--log-level", "debug") as running:
        with Peer(running.clients) as client, Peer(running.workers) as worker:
            client.hello()
            worker.register()
            client.submit(b"1" * 16)
            worker.take()
            client.raw(b"secret words, hello")
            client.expect(Kind.ERROR)
        _, written = running.stop()
    assert written.count((b"1" * 16).hex()) > 1  # what became of the request, and nothing of what it said
    assert "hello" not in written
    assert "secret" not in written


def test_what_takes_long_to_import_is_not_waited_for_when_it_is_started_again() -> None:
    code = "import sys, loopmux_broker.program; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"asyncio", "logging", "structlog", "tempfile", "yaml"} & set(loaded)
