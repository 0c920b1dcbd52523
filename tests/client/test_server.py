"""The private stack: the real launcher, broker and echo worker, started and ended by a client process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

import loopmux
from launcher.wheels import write_workers_needs
from loopmux import privatestack, server
from loopmux.endpoints import default_endpoint
from loopmux.errors import BadRequestError, ConfigError, ConnectionLostError
from processes import running
from waiting import wait_for

ECHO = "models:\n  default: {engine: echo}\n  other: {engine: echo}\n"


wait_until = partial(wait_for, limit=60.0)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Folders of a user who has nothing running; short, since socket paths are limited."""
    folder = Path(tempfile.mkdtemp(prefix="lmx-"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUNTIME_DIR", "DATA_HOME", "CONFIG_HOME", "STATE_HOME"):
            (folder / name).mkdir()
            patch.setenv(f"XDG_{name}", str(folder / name))
        patch.delenv("LOOPMUX_ENDPOINT", raising=False)
        (folder / "echo.yaml").write_text(ECHO)
        patch.setenv("LOOPMUX_CONFIG", str(folder / "echo.yaml"))
        yield folder
        server.shutdown_all()
    shutil.rmtree(folder)


def private_folders(home: Path) -> list[Path]:
    return sorted((home / "RUNTIME_DIR" / "loopmux").glob("private-*"))


def stacks(home: Path) -> list[psutil.Process]:
    """Every process that a private stack of this home consists of."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if any(str(home) in word for word in words) or (
                "loopmux_worker" in words and process.environ().get("XDG_RUNTIME_DIR", "").startswith(str(home))
            ):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


def test_the_life_of_a_private_stack(home: Path):
    lines: list[str] = []
    with ThreadPoolExecutor(6) as pool:
        endpoints = list(pool.map(lambda _: server.ensure_running("default", lines.append), range(6)))
    assert len(set(endpoints)) == 1
    assert len([p for p in stacks(home) if "up" in p.cmdline()]) == 1
    assert any(line.startswith("no broker at") for line in lines)
    assert any("broker: ready" in line for line in lines)
    with loopmux.Client(endpoints[0]) as client:
        assert client.generate("Hello", max_new_tokens=3).usage.completion_tokens == 3

    later: list[str] = []
    assert server.ensure_running("other", later.append) == endpoints[0]
    assert not any(line.startswith("no broker") for line in later)

    server.shutdown("unheard of")
    server.shutdown("default")  # "other" still needs it
    assert server.listening(endpoints[0])
    before = stacks(home)
    assert before
    server.shutdown("other")
    assert not server.listening(endpoints[0])
    assert stacks(home) == []
    assert private_folders(home) == []


def test_ctrl_c_while_a_stack_is_being_started_leaves_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more)
            os.kill(os.getpid(), signal.SIGINT)

    server.shutdown_all()
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.ensure_running("default")
    wait_until(lambda: stacks(home) == [], "the end of what was started")
    assert private_folders(home) == []


def test_ctrl_c_while_one_stack_is_stopped_does_not_keep_the_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def stop(self) -> None:
            stopped.append(self)
            raise KeyboardInterrupt

    stopped: list[Fake] = []
    these = server._Stacks()
    these.by_key = {None: Fake(), ("base", None): Fake()}  # type: ignore[dict-item]
    monkeypatch.setattr(server, "_stacks", these)
    with pytest.raises(KeyboardInterrupt):
        server.shutdown_all()
    assert len(stopped) == 2
    assert not these.by_key


def test_a_stack_that_was_killed_is_replaced(home: Path):
    first = server.ensure_running("default")
    (up,) = [p for p in stacks(home) if "up" in p.cmdline()]
    up.kill()
    # A killed process is only gone for its parent when its last thread is.
    wait_until(lambda: server.ensure_running("default") != first, "a new stack")
    second = server.ensure_running("default")
    with loopmux.Client(second) as client:
        assert client.generate("Hello", max_new_tokens=3).text
    server.shutdown_all()
    wait_until(lambda: stacks(home) == [], "the end of both stacks")


def test_a_folder_that_is_still_written_to_for_a_moment_goes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tries = tmp_path / "private-1-0", []

    def remove_beside_a_writer(path: Path, **how: bool) -> None:
        tries.append(path)
        rmtree(path, **how)
        if len(tries) < 3:
            (path / "state").mkdir(parents=True)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove_beside_a_writer)
    folder.mkdir()
    privatestack._remove(folder)
    assert tries == [folder] * 3
    assert not folder.exists()


PROGRAM = """
import os, sys, signal, time
from loopmux import server
endpoint = server.ensure_running("default")
print(endpoint, flush=True)
"""


def program(rest: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", PROGRAM + rest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_stack_ends_with_its_program_and_a_forked_child_leaves_it_alone(home: Path):
    # the child ends as programs do, with its exit handlers; then the parent still has its stack
    fork = """
child = os.fork()
if not child:
    sys.exit(0)
os.waitpid(child, 0)
assert server.listening(endpoint)
"""
    with program(fork) as running:
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert out.startswith("ipc://")
    assert stacks(home) == []
    assert private_folders(home) == []


def test_what_is_built_and_what_is_loaded_is_told(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))  # else it may have all of it, and installs nothing new
    write_workers_needs(tmp_path / "wheels")
    environment = {"requirements": [], "index_options": ["--no-index", f"--find-links {tmp_path / 'wheels'}"]}
    models = {"default": {"engine": "echo", "environment": "own"}}
    (tmp_path / "c.yaml").write_text(json.dumps({"environments": {"own": environment}, "models": models}))
    monkeypatch.setenv("LOOPMUX_CONFIG", str(tmp_path / "c.yaml"))
    lines: list[str] = []
    server.ensure_running("default", lines.append)
    server.shutdown_all()
    text = "\n".join(lines)
    for said in ("environment own: building", "environment own: installing", "environment own: ready in",
                 "default-1: starting", "default-1: ready in"):  # fmt: skip
        assert said in text, text
    assert lines[-1].endswith(": default")


WORK = """
import loopmux
with loopmux.Client(endpoint) as client:
    for _ in range(2):
        print(client.generate("Hello", max_new_tokens=3).usage.completion_tokens, flush=True)
        sys.stdin.readline()
"""


def test_two_programs_that_start_at_the_same_moment_have_a_whole_stack_each(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # nothing is there yet: both prepare it at once
    with program(WORK) as one, program(WORK) as other:
        endpoints = []
        for running in (one, other):
            assert running.stdout is not None
            endpoints.append(running.stdout.readline().strip())
            assert running.stdout.readline() == "3\n"
        assert len(set(endpoints)) == 2
        out, err = one.communicate("\n\n", timeout=60)
        assert (out, err, one.returncode) == ("3\n", "", 0)
        assert [server.listening(endpoint) for endpoint in endpoints] == [False, True]
        out, err = other.communicate("\n\n", timeout=60)
        assert (out, err, other.returncode) == ("3\n", "", 0)
    assert stacks(home) == []
    assert private_folders(home) == []


def test_the_stack_of_a_killed_program_ends_and_its_folder_goes_with_the_next(home: Path):
    with program("time.sleep(600)") as running:
        assert running.stdout is not None
        endpoint = running.stdout.readline().strip()
        running.kill()
    wait_until(lambda: stacks(home) == [], "the end of the stack")
    assert not server.listening(endpoint)
    left = private_folders(home)
    server.ensure_running("default")
    assert not set(left) & set(private_folders(home))
    server.shutdown_all()
    assert private_folders(home) == []


def test_a_broker_that_is_there_is_used(home: Path):
    command = [
        sys.executable,
        "-m",
        "loopmux_broker",
        "--endpoint",
        default_endpoint(),
        "--parent-pid",
        str(os.getpid()),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as broker:
        try:
            wait_until(lambda: server.listening(default_endpoint()), "the broker")
            assert server.ensure_running("default") == default_endpoint()
            server.shutdown_all()
            assert server.listening(default_endpoint())
            assert private_folders(home) == []
        finally:
            broker.send_signal(signal.SIGTERM)
    assert not server.listening(default_endpoint())


def test_a_wrong_configuration(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bad.yaml").write_text("models:\n  default: {engin: echo}\n")
    monkeypatch.setenv("LOOPMUX_CONFIG", str(tmp_path / "bad.yaml"))
    with pytest.raises(ConfigError, match="engin") as caught:
        server.ensure_running("default")
    assert "private one did not start" in str(caught.value)
    assert str(tmp_path / "bad.yaml") in str(caught.value)


def test_a_stack_that_cannot_start_tells_its_last_lines(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    venv.create(tmp_path / "empty", with_pip=False)
    config = (
        f"environments: {{e: {{path: {tmp_path / 'empty'}}}}}\nmodels:\n  default: {{engine: echo, environment: e}}\n"
    )
    (tmp_path / "c.yaml").write_text(config)
    monkeypatch.setenv("LOOPMUX_CONFIG", str(tmp_path / "c.yaml"))
    with pytest.raises(ConnectionLostError, match="exit code 1") as caught:
        server.ensure_running("default")
    assert not caught.value.retryable
    assert "no model is left" in str(caught.value)
    assert stacks(home) == []


def test_a_missing_extra_names_the_install_line(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(privatestack, "_NEEDED", ("yaml", "no_such_package_here"))
    with pytest.raises(ConfigError, match=r"needs no_such_package_here.*pip install .\.\[server\]."):
        server.ensure_running("default")


@pytest.mark.parametrize("given", ["/no/such/folder", "./nothing", "plain", "a/b/c"])
def test_a_model_folder_that_is_not_there(home: Path, given: str):
    with pytest.raises(BadRequestError, match=r"base_model: found no directory .*, expected an existing directory or"):
        server.ensure_model(given)


def test_an_adapter_folder_that_is_not_there(home: Path):
    with pytest.raises(BadRequestError, match="adapter_dir: found no directory"):
        server.ensure_model("org/name", "org/adapter")


def test_a_slip_in_a_model_folder_is_no_hub_model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "demo" / "base").mkdir(parents=True)
    (tmp_path / "demo" / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequestError, match=f"did you mean {tmp_path}/demo/base?"):
        server.ensure_model("demoo/base")


def test_the_default_environment_of_the_configuration(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = privatestack.launcher_command()
    (tmp_path / "c.yaml").write_text(f"environments: {{default: {{path: {sys.prefix}}}}}\n" + ECHO)
    monkeypatch.setenv("LOOPMUX_CONFIG", str(tmp_path / "c.yaml"))
    found = privatestack.default_environment(command, None)
    assert found == {"default": {"path": f"{sys.prefix}/bin/python"}}
    monkeypatch.setenv("LOOPMUX_CONFIG", str(home / "echo.yaml"))  # names no environment
    assert privatestack.default_environment(command, None) == {}
    monkeypatch.delenv("LOOPMUX_CONFIG")
    monkeypatch.chdir(tmp_path)
    assert privatestack.default_environment(command, None) == {}
    monkeypatch.setenv("LOOPMUX_CONFIG", str(tmp_path / "missing.yaml"))
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        privatestack.default_environment(command, None)


def test_a_default_environment_that_cannot_be_built(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "c.yaml").write_text("environments: {default: {requirements: [torch]}}\n" + ECHO)
    monkeypatch.setenv("LOOPMUX_CONFIG", str(tmp_path / "c.yaml"))
    monkeypatch.setenv("XDG_DATA_HOME", "/dev/null/data")  # nothing can be written there
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"cannot be built:\n.*set \$XDG_DATA_HOME to another"):
        privatestack.default_environment(privatestack.launcher_command(), lines.append)
    assert lines


def test_who_is_interrupted_while_an_environment_is_built_ends_the_builder(tmp_path: Path) -> None:
    builder = tmp_path / "builder.py"
    builder.write_text(
        "import os, sys, time\n"
        "if 'path' in sys.argv: sys.exit('it is not built')\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    building: list[psutil.Process] = []

    def interrupt(line: str) -> None:
        building.append(psutil.Process(int(line)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        privatestack.default_environment([sys.executable, str(builder)], interrupt)
    assert not running(building[0])


def test_listening(tmp_path: Path):
    stale = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as unused:
        unused.bind(str(stale))
    assert not server.listening(f"ipc://{stale}")
    assert not server.listening(f"ipc://{tmp_path / 'never'}")
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        assert server.listening(f"tcp://127.0.0.1:{port}")
    assert not server.listening(f"tcp://127.0.0.1:{port}")
    with pytest.raises(ConfigError):
        server.listening("http://127.0.0.1")


def test_callers_that_wait_for_the_same_start_each_see_the_progress(home: Path):
    seen: dict[int, list[str]] = {0: [], 1: []}
    gate = threading.Barrier(2)

    def one(n: int) -> None:
        gate.wait(10)
        server.ensure_running("default", seen[n].append)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, seen))
    assert all(any("ready" in line for line in lines) for lines in seen.values())
    server.shutdown_all()
