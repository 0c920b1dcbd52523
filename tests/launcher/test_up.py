"""``up``, ``run`` and ``down`` as real programs with a real broker and real echo workers."""

from __future__ import annotations

import errno
import json
import os
import platform
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

import loopmux
import ports
from launcher.programs import Program, alive, launch, program, wait_for
from loopmux import endpoints, exitcodes, keys
from loopmux.listening import Listening
from loopmux.wire import HEADER_SIZE
from loopmux_launcher import commands, places
from loopmux_launcher.backoff import CRASHES
from loopmux_launcher.console import Console
from loopmux_launcher.events import Announce
from loopmux_launcher.reader import load
from loopmux_launcher.server import Launcher
from loopmux_launcher.signals import Signals
from loopmux_worker.engine.echo import echo_token

ECHO = "models: {echo: {engine: echo, workers: 2}}\n"


@pytest.fixture
def endpoint(home: Path) -> str:
    return f"ipc://{home}/s/client.ipc"


@pytest.fixture
def config(home: Path) -> Path:
    file = home / "llm_backends.yaml"
    file.write_text(ECHO)
    return file


@pytest.fixture
def up(config: Path, endpoint: str) -> Iterator[Program]:
    with program("up", "--config", str(config), "--endpoint", endpoint) as one:
        one.line("ready after")
        yield one


def gone(up: Program, family: list[psutil.Process], home: Path) -> None:
    """Nothing is left: no process, no socket file, no folder made for it."""
    wait_for(lambda: not alive(family), "all processes to end")
    wait_for(lambda: not (home / "s").exists(), "the socket's folder to go")
    up.wait()


def stack_of(up: Program) -> list[psutil.Process]:
    family = up.family()
    assert len(up.children("loopmux_worker")) == 2
    assert len(up.children("loopmux_broker")) == 2  # the one that serves, and its parent
    assert len(family) == 6  # and the guard
    return family


def test_it_says_what_starts_and_serves(up: Program, config: Path, endpoint: str) -> None:
    assert up.lines[0].split(": ", 1)[1] == f"{config} on {endpoint}"
    assert "broker: ready in" in up.text
    (started,) = [line for line in up.lines if "echo-1: starting" in line]
    log = Path(started.split("log ")[1])
    pid = int(started.split("pid ")[1].split(",")[0])
    assert f"pid {pid}" in log.read_text()
    assert up.lines[-1].startswith("ready after")
    assert up.lines[-1].endswith(": echo")
    with loopmux.Client(endpoint) as client:
        assert {w.name for w in client.status().workers} == {"echo-1", "echo-2"}  # both are with the broker by now
        assert client.generate("hello", model="echo").text
        wait_for(lambda: client.status().launchers, "the launcher to have joined the broker")
        status = client.status()
    assert pid in {w.pid for w in status.workers}
    assert [(m.id, m.phase) for m in status.models] == [("echo", "ready")]
    assert len(status.launchers) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_stops_everything(up: Program, home: Path, number: signal.Signals) -> None:
    family = stack_of(up)
    up.process.send_signal(number)
    assert up.wait() == 0
    gone(up, family, home)
    assert up.text.count("stopped") == 3
    assert "Traceback" not in up.text


def test_ctrl_c_lets_what_runs_end(config: Path, endpoint: str) -> None:
    """A stream of two seconds: longer than a worker waits upon SIGTERM."""
    config.write_text("models: {echo: {engine: echo, echo: {rate: 100, tokens: 200}}}\n")
    with program("up", "--config", str(config), "--endpoint", endpoint) as up, loopmux.Client(endpoint) as client:
        up.line("ready after")
        with client.stream("hello", model="echo", max_new_tokens=1000) as stream:
            next(event for event in stream if isinstance(event, loopmux.TextDelta))
            up.process.send_signal(signal.SIGINT)
            for _ in stream:
                pass
        assert len(stream.result.token_ids) == 200
        assert up.wait() == 0
        assert "what runs has 120 s to end" in up.text


def test_killing_up_leaves_nothing(up: Program, home: Path) -> None:
    family = stack_of(up)
    up.process.kill()
    gone(up, family, home)


def test_down_stops_it_and_waits(up: Program, home: Path, endpoint: str) -> None:
    family = stack_of(up)
    done = launch("down", "--endpoint", endpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"stopping process {up.process.pid} on {endpoint}", "stopped"]
    assert alive(family[1:]) == []
    gone(up, family, home)
    again = launch("down", "--endpoint", endpoint)
    assert (again.returncode, again.stdout.split(":")[0]) == (0, "nothing to stop")


def test_a_second_up_says_who_holds_the_endpoint(up: Program, config: Path, endpoint: str) -> None:
    done = launch("up", "--config", str(config), "--endpoint", endpoint)
    assert done.returncode == 1
    assert f"process {up.process.pid}" in done.stderr
    assert endpoint in done.stderr
    assert "down" in done.stderr
    assert "Traceback" not in done.stderr
    assert up.process.poll() is None


def test_a_killed_worker_is_replaced(up: Program, endpoint: str) -> None:
    victim = up.children("loopmux_worker")[0]
    victim.kill()
    line = up.line("starts again in")
    assert "SIGKILL" in line
    up.line("ready in")
    now = wait_for(lambda: len(found := up.children("loopmux_worker")) == 2 and found, "two workers")
    assert victim.pid not in {p.pid for p in now}
    with loopmux.Client(endpoint) as client:
        wait_for(lambda: len(client.status().workers) == 2, "the broker to know both")


def test_a_drained_worker_is_started_again_at_once(up: Program, endpoint: str) -> None:
    before = {p.pid for p in up.children("loopmux_worker")}
    with loopmux.Client(endpoints.admin_endpoint(endpoint)) as administrator:
        administrator.drain("echo-1")
    up.line("echo-1: left, as somebody told it to")
    up.line("echo-1: ready in")
    assert "starts again in" not in up.text  # which is said of one that crashed
    assert len(before & {p.pid for p in up.children("loopmux_worker")}) == 1


def test_a_killed_broker_is_replaced_and_workers_stay(up: Program, endpoint: str) -> None:
    workers = {p.pid for p in up.children("loopmux_worker")}
    with loopmux.Client(endpoint) as client:
        wait_for(lambda: client.status().uptime > 1.0, "a broker that has served")
        psutil.Process(client.status().pid).kill()
        up.line("broker: ended by SIGKILL; another one serves at once")
        assert {p.pid for p in up.children("loopmux_worker")} == workers
        wait_for(lambda: {w.pid for w in client.status().workers} == workers, "the workers to join the new broker")
        wait_for(lambda: [m.phase for m in client.status().models] == ["ready"], "the launcher to tell its models")
        assert client.generate("hello", model="echo").text


def test_a_stream_survives_a_killed_broker_and_nobody_is_refused_meanwhile(config: Path, endpoint: str) -> None:
    """The listening sockets are the launcher's: who connects while there is no broker waits for the next one."""
    config.write_text("models: {echo: {engine: echo, echo: {rate: 100, tokens: 150}}}\n")
    path = Path(endpoint.removeprefix("ipc://"))
    with program("up", "--config", str(config), "--endpoint", endpoint) as up, loopmux.Client(endpoint) as client:
        up.line("ready after")
        before = path.stat().st_ino
        with client.stream("hello", model="echo", max_new_tokens=1000) as stream:
            events = iter(stream)
            next(event for event in events if isinstance(event, loopmux.TextDelta))
            brokers = up.children("loopmux_broker")  # the one that serves and its parent: the next one takes longer
            for broker in brokers:
                broker.kill()
            wait_for(lambda: not alive(brokers), "the brokers to end")
            with socket.socket(socket.AF_UNIX) as plain:
                plain.connect(str(path))  # by no library that tries again
            for _ in events:
                pass
        up.line("broker: ready in")
        request = bytes.fromhex(stream.result.request_id)
        assert stream.result.token_ids == tuple(echo_token(request, i) for i in range(150))
        assert stream.result.attempts == 1  # the worker went on where the client was
        assert path.stat().st_ino == before


def test_it_ends_with_the_process_it_was_started_for(config: Path, endpoint: str, home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as application:
        words = ("--config", str(config), "--endpoint", endpoint, "--parent-pid", str(application.pid))
        with program("up", *words) as up:
            up.line("ready after")
            family = stack_of(up)
            application.kill()
            assert up.wait() == 0
            gone(up, family, home)


def test_a_parent_that_is_gone_already_stops_it_at_once(config: Path, endpoint: str) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as application:
        application.wait()
    words = ("--config", str(config), "--endpoint", endpoint, "--parent-pid", str(application.pid))
    done = launch("up", *words)
    assert done.returncode == 0
    assert "ready after" not in done.stdout


def test_run_serves_a_broker_of_somebody_else(config: Path, endpoint: str) -> None:
    words = ("--config", str(config), "--endpoint", endpoint)
    with program("run", *words) as run:
        run.line("ready after")  # workers start whether or not the broker is there yet
        with program("--endpoint", endpoint, module="loopmux_broker") as broker:
            broker.line("ready")
            with loopmux.Client(endpoint) as client:
                wait_for(lambda: [m.phase for m in client.status().models] == ["ready"], "the launcher to join")
                assert client.generate("hello", model="echo").text
                run.process.terminate()
                assert run.wait() == 0
                wait_for(lambda: client.status().launchers == (), "the launcher's goodbye")
            broker.process.terminate()
            assert broker.wait() == 0


def test_a_launcher_that_is_started_again_fails_nobodys_request(
    config: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update: what runs, what waits and what comes meanwhile goes on in the next one's workers."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config.write_text("models: {echo: {engine: echo, slots: 8, echo: {rate: 100, tokens: 150}}}\n")
    words = ("run", "--config", str(config), "--endpoint", endpoint)
    with ExitStack() as stack:
        stack.enter_context(program("--endpoint", endpoint, module="loopmux_broker")).line("ready")
        first = stack.enter_context(program(*words, module="launcher.unhurried"))
        first.line("ready after")
        client = stack.enter_context(loopmux.Client(endpoint, timeout=60))
        wait_for(lambda: [m.phase for m in client.models()] == ["ready"], "the launcher to join")

        def ask() -> loopmux.Result:
            return client.generate("hello", model="echo", max_new_tokens=1000)

        with ThreadPoolExecutor(24) as callers:
            calls = [callers.submit(ask) for _ in range(16)]
            wait_for(lambda: client.models()[0].running > 0, "a request to run")
            first.process.terminate()
            assert first.wait() == 0
            calls += [callers.submit(ask) for _ in range(8)]
            stack.enter_context(program(*words)).line("ready after")
            for one in (call.result() for call in calls):
                request = bytes.fromhex(one.request_id)
                assert one.token_ids == tuple(echo_token(request, i) for i in range(150))


def test_run_serves_a_broker_of_another_host_by_keys(
    config: Path, endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher knows a tcp endpoint and a public key of the broker; its workers have both from it."""
    public = {name: keys.new(name, home)[1].public for name in ("broker", "host", "stranger")}
    settings = home / "broker.yaml"
    there = {"endpoints": [endpoint], "worker_endpoints": ["tcp://127.0.0.1:0"], "key": "broker.key"}
    settings.write_text(json.dumps({**there, "worker_keys": {"host": public["host"]}}))  # JSON is YAML
    with program("--config", str(settings), "--log-format", "json", module="loopmux_broker") as broker:
        workers = json.loads(broker.line("ready"))["worker_endpoints"][0]
        words = ("run", "--config", str(config), "--endpoint", endpoint, "--worker-endpoint", workers)
        monkeypatch.setenv("LOOPMUX_SERVER_KEY", public["broker"])
        monkeypatch.setenv("LOOPMUX_KEY", str(home / "host.key"))
        with program(*words) as run, loopmux.Client(endpoint) as client:
            run.line("ready after")
            assert client.generate("hello", model="echo").text
            # the broker's own host may have an echo-1, too
            assert {worker.name for worker in client.status().workers} == {
                f"echo-{n}@{platform.node()}" for n in (1, 2)
            }
            run.process.terminate()
            assert run.wait() == 0
        lost = launch("run", "--config", str(config), "--endpoint", "tcp://broker.example.org:7750")
        assert (lost.returncode, "expected where it takes workers, too" in lost.stderr) == (78, True), lost.stderr
        done = launch(*words, LOOPMUX_KEY=str(home / "stranger.key"))
        assert (done.returncode, "refused the key 'stranger' ($LOOPMUX_KEY)" in done.stderr) == (1, True), done.stderr


def test_what_is_loaded_through_another_broker_is_remembered_apart(config: Path, endpoint: str, home: Path) -> None:
    """A host may serve its own broker and one of another host, by the same endpoint for its users."""
    away = f"ipc://{home}/a/client.ipc"
    words = ("--config", str(config), "--endpoint", endpoint)
    with ExitStack() as stack:
        there = ("--endpoint", away, "--worker-endpoint", "tcp://127.0.0.1:0", "--log-format", "json")
        broker = stack.enter_context(program(*there, module="loopmux_broker"))
        workers = json.loads(broker.line("ready"))["worker_endpoints"][0]
        up = stack.enter_context(program("up", *words))
        run = stack.enter_context(program("run", *words, "--worker-endpoint", workers))
        up.line("ready after")
        run.line("ready after")
        for place, name in ((endpoint, "ours"), (away, "theirs")):
            with loopmux.Client(place) as client:
                wait_for(lambda: [m.phase for m in client.models()] == ["ready"], "the launcher to join")
                assert client.load_adapter("echo", name, home).remembered
        up.process.terminate()
        assert up.wait() == 0
        again = stack.enter_context(program("up", *words))
        again.line("ready after")
        with loopmux.Client(endpoint) as client:
            assert [one.name for one in client.adapters()] == ["ours"]


def test_a_second_launcher_is_refused_in_the_brokers_words(up: Program, config: Path, endpoint: str) -> None:
    done = launch("run", "--config", str(config), "--endpoint", endpoint)
    assert done.returncode == 1
    assert "is taken by a living process" in done.stderr
    assert str(up.process.pid) in done.stderr


def test_a_broker_of_another_release_ends_it_with_what_to_do(config: Path, endpoint: str, home: Path) -> None:
    (home / "s").mkdir()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as broker:
        broker.bind(endpoints.worker_endpoint(endpoint))
        with program("run", "--config", str(config), "--endpoint", endpoint) as run:

            def ended() -> bool:
                if broker.poll(50):
                    peer = broker.recv_multipart()[0]
                    broker.send_multipart([peer, b"LM\x09" + bytes(HEADER_SIZE)])
                return run.process.poll() is not None

            wait_for(ended, "its end")
            assert run.wait() == 1
    said = run.lines[-1]
    assert "is of another release: protocol version 9 is not spoken here" in said
    assert "install one release everywhere" in said


def test_a_socket_held_by_a_lone_broker_ends_up_with_its_reason(config: Path, endpoint: str) -> None:
    with program("--endpoint", endpoint, module="loopmux_broker") as broker:
        broker.line("ready")
        done = launch("up", "--config", str(config), "--endpoint", endpoint)
        assert done.returncode == 1
        assert f"process {broker.process.pid}" in done.stderr
        assert "starting" not in done.stdout
        broker.process.terminate()
        broker.wait()


def test_the_broker_of_up_has_the_settings_of_its_file(config: Path, endpoint: str, home: Path) -> None:
    settings, also = home / "broker.yaml", f"ipc://{home}/also.ipc"
    settings.write_text(f"endpoints: ['{also}']\n")
    words = ("up", "--config", str(config), "--endpoint", endpoint, "--broker-config", str(settings))
    with program(*words) as up:
        up.line("ready after")
        for each in (endpoint, also):
            with loopmux.Client(each) as client:
                assert client.generate("hello", model="echo").text
        up.process.terminate()
        assert up.wait() == 0
    settings.write_text("endpoint: x\n")
    done = launch(*words)
    assert done.returncode == 78
    assert f"{settings}:1: endpoint: found an unknown key" in done.stderr


def test_bad_configuration_starts_nothing(config: Path, endpoint: str, home: Path) -> None:
    config.write_text("models:\n  a: {engin: echo}\n  b: {base_model: gone}\n")
    done = launch("up", "--config", str(config), "--endpoint", endpoint)
    assert done.returncode == 78
    assert f"{config}:2: models.a.engin" in done.stderr
    assert f"{config}:3: models.b.base_model" in done.stderr
    assert done.stdout == ""
    assert not (home / "s").exists()
    checked = launch("config", "check", str(config))
    assert (checked.returncode, "models.a.engin" in checked.stderr) == (78, True)


@pytest.mark.parametrize(("variable", "purpose"), [("XDG_STATE_HOME", "log files"), ("XDG_DATA_HOME", "environments")])
def test_an_unusable_folder_is_named_before_anything_starts(
    config: Path, endpoint: str, home: Path, variable: str, purpose: str
) -> None:
    (home / "file").write_text("mine")
    config.write_text("environments: {here: {}}\nmodels: {echo: {engine: echo, environment: here}}\n")
    done = launch("up", "--config", str(config), "--endpoint", endpoint, **{variable: str(home / "file" / "x")})
    assert done.returncode == 78
    assert f"the folder for {purpose}" in done.stderr
    assert f"found the file {home}/file in its place, expected a folder that this user can write to" in done.stderr
    assert f"set ${variable} to another" in done.stderr
    assert "starting" not in done.stdout
    assert not (home / "s").exists()
    built = launch("env", "build", "here", "--config", str(config), **{variable: str(home / "file" / "x")})
    assert (built.returncode, f"the folder for {purpose}" in built.stderr) == (78, True)


def test_a_disk_that_is_full_later_is_said_and_ends_nothing(config: Path, endpoint: str) -> None:
    log = places.logs(endpoint) / "echo-1.log"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    with program("up", "--config", str(config), "--endpoint", endpoint) as up:
        up.line("ready after")
        assert up.text.count(f"echo-1: its log {log} cannot be written: No space left on device") == 1
        up.process.terminate()
        assert up.wait() == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_files_that_are_closed_are_no_trouble(config: Path, endpoint: str, closed: str) -> None:
    words = [sys.executable, "-m", "loopmux_launcher", "up", "--config", str(config), "--endpoint", endpoint]
    with subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *words]) as up:
        try:
            path = Path(endpoint.removeprefix("ipc://"))
            wait_for(path.exists, "its socket")
            with loopmux.Client(endpoint, connect_timeout=60) as client:
                assert client.generate("hello", model="echo").text
        finally:
            up.terminate()
        assert up.wait(60) == 0


def test_sockets_whose_folder_was_removed_are_made_anew_and_nobody_loses_anything(config: Path, endpoint: str) -> None:
    config.write_text("models: {echo: {engine: echo, echo: {rate: 50, tokens: 1000}}}\n")
    with program("up", "--config", str(config), "--endpoint", endpoint) as up, loopmux.Client(endpoint) as client:
        up.line("ready after")
        with client.stream("hello", model="echo", max_new_tokens=1000) as stream:
            next(stream)
            shutil.rmtree(Path(endpoint.removeprefix("ipc://")).parent)
            up.line("broker: somebody removed the files of its sockets: it is started again with new ones")
            up.line("broker: ready in")
            with loopmux.Client(endpoint) as other:
                assert other.generate("hello", model="echo", max_new_tokens=1).text
            assert len(stream.result.token_ids) == 1000
        up.process.terminate()
        assert up.wait() == 0
    assert not Path(endpoint.removeprefix("ipc://")).parent.exists()


def test_a_crash_loop_is_parked_and_ends_up_when_nothing_else_is_left(config: Path, endpoint: str, home: Path) -> None:
    venv = home / "broken"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    real = os.path.realpath(python)
    python.unlink()
    # an environment that passes its probe and whose workers die with a last word
    report = json.dumps({"ok": True, "python": "3.11", "packages": {"pyzmq": "27"}, "devices": [], "missing": []})
    python.write_text(
        f"#!/bin/sh\ncase \"$*\" in *probe*) echo '{report}';; *--spec*) echo last words >&2; exit 9;;"
        f' *) exec {real} "$@";; esac\n'
    )
    python.chmod(0o755)
    config.write_text(f"environments: {{x: {{path: {venv}}}}}\nmodels: {{a: {{engine: echo, environment: x}}}}\n")
    done = launch("up", "--config", str(config), "--endpoint", endpoint)
    assert done.returncode == 1
    assert done.stderr.count("starts again in") == CRASHES - 1
    assert f"a-1: failed {CRASHES} times in 60 s" in done.stderr
    assert "exit code 9" in done.stderr
    assert "last words" in done.stderr
    assert "no model is left" in done.stderr
    assert "Traceback" not in done.stderr


def test_environments_are_built_by_up_and_workers_run_in_them(config: Path, endpoint: str) -> None:
    config.write_text(
        f'environments: {{here: {{path: "{sys.prefix}"}}}}\nmodels: {{a: {{engine: echo, environment: here}}}}\n'
    )
    with program("up", "--config", str(config), "--endpoint", endpoint) as up:
        up.line("ready after")
        assert "environment here: ready in" in up.text
        (worker,) = up.children("loopmux_worker")
        assert worker.cmdline()[0] == str(Path(sys.prefix) / "bin" / "python")
        code = Path(worker.environ()["PYTHONPATH"])
        assert code.parent == places.data() / "code"
        up.process.terminate()
        assert up.wait() == 0


def test_killing_up_during_a_build_leaves_nothing(config: Path, endpoint: str, home: Path) -> None:
    config.write_text("environments: {e: {installer: pip}}\nmodels: {a: {engine: echo, environment: e}}\n")
    with program("up", "--config", str(config), "--endpoint", endpoint) as up:
        up.line("building with")
        wait_for(lambda: len(up.family()) >= 5, "the installer")  # up, broker, guard, builder, installer
        family = up.family()
        up.process.kill()
        gone(up, family, home)
    left = [p.name for p in (places.data() / "envs" / "e").iterdir()]
    assert left == [".lock"]


def test_stopping_during_a_build_stops_it(config: Path, endpoint: str, home: Path) -> None:
    config.write_text("environments: {e: {installer: pip}}\nmodels: {a: {engine: echo, environment: e}}\n")
    with program("up", "--config", str(config), "--endpoint", endpoint) as up:
        up.line("building with")
        family = up.family()
        up.process.send_signal(signal.SIGINT)
        assert up.wait() == 0
        gone(up, family, home)
    assert [p.name for p in (places.data() / "envs" / "e").iterdir()] == [".lock"]


def test_an_adapter_that_was_loaded_is_there_until_it_is_unloaded(config: Path, endpoint: str) -> None:
    def served() -> dict[str, int]:
        return {one.name: one.workers for one in client.adapters()}

    def kill_a_worker() -> None:
        victim = client.status().workers[0].pid
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: victim not in {one.pid for one in client.status().workers}, "the worker to be gone")
        wait_for(lambda: len(client.status().workers) == 2, "the next one")

    words = ("up", "--config", str(config), "--endpoint", endpoint)
    with program(*words) as up, loopmux.Client(endpoint, max_new_tokens=3) as client:
        up.line("ready after")
        wait_for(lambda: len(client.status().workers) == 2 and client.status().launchers, "all to have joined")
        done = client.load_adapter("echo", "parrot", "/adapters/parrot")
        assert (done.workers, done.remembered) == (("echo-1", "echo-2"), True)
        up.line("adapter parrot: loaded for echo")
        kill_a_worker()
        wait_for(lambda: served() == {"parrot": 2}, "the next one to have it")
        psutil.Process(client.status().pid).kill()
        wait_for(lambda: served() == {"parrot": 2}, "the next broker to know it")
        assert client.generate("x", model="parrot").text
        up.process.kill()
        wait_for(lambda: not alive(up.family()), "all to end")
    with program(*words) as up, loopmux.Client(endpoint, max_new_tokens=3) as client:
        up.line("ready after")
        wait_for(lambda: served() == {"parrot": 2}, "what is remembered")
        [one] = client.adapters()
        assert (one.onto, one.folder) == ("echo", "/adapters/parrot")
        client.unload_adapter("echo", "parrot")
        kill_a_worker()
        assert served() == {}
        assert {model.id for model in client.models()} == {"echo"}


def test_a_terminal_shows_what_is_done_and_what_runs(config: Path, endpoint: str, home: Path) -> None:
    config.write_text("models: {echo: {engine: echo, workers: 2, echo: {rate: 50, tokens: 100000}}}\n")
    near, far = pty.openpty()
    termios.tcsetwinsize(far, (24, 120))
    command = [sys.executable, "-m", "loopmux_launcher", "up", "--config", str(config), "--endpoint", endpoint]
    shown = bytearray()

    def look() -> str:
        with suppress(OSError):  # the other end is closed
            while select.select([near], [], [], 0)[0]:
                shown.extend(os.read(near, 65536))
        return shown.decode()

    with subprocess.Popen(command, stdin=far, stdout=far, stderr=far) as process, ExitStack() as anyway:
        anyway.callback(process.kill)
        os.close(far)
        table = r"MODEL +PHASE[^\r]*\r\necho +ready +2 +0 +0\r\n0 running, 0 queued, 0 tokens/s, 2 workers"
        wait_for(lambda: re.search(table, look()), "the model to be shown as ready")
        with loopmux.Client(endpoint) as client, client.stream("x", model="echo", max_new_tokens=10**6) as stream:
            next(iter(stream))
            wait_for(lambda: re.search(r"1 running, 0 queued, \d+ tokens/s", look()), "the stream to be seen")
            process.send_signal(signal.SIGINT)
            waits = r"waits for what runs on echo-\d \(1\); Ctrl-C stops at once"
            wait_for(lambda: re.search(waits, look()), "what is waited for to be said")
        wait_for(lambda: look() and process.poll() is not None, "its end")
        assert process.returncode == 0
    assert "echo-2: stopped" in look()
    assert not (home / "s").exists()
    os.close(near)


def test_a_second_interrupt_does_not_wait(
    config: Path, endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    words = ("up", "--config", str(config), "--endpoint", endpoint)
    with program(*words, module="launcher.unhurried") as up:
        up.line("ready after")
        family = stack_of(up)
        for worker in up.children("loopmux_worker"):
            worker.suspend()  # so it cannot answer SIGTERM
        up.process.send_signal(signal.SIGINT)
        up.line("once more to stop at once")
        up.process.send_signal(signal.SIGINT)
        assert up.wait() == 0
        gone(up, family, home)


def test_a_reader_that_goes_away_does_not_end_it(config: Path, endpoint: str, home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loopmux_launcher", "up", "--config", str(config), "--endpoint", endpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.close()
    try:
        with loopmux.Client(endpoint) as client:
            wait_for(lambda: [m.phase for m in client.status().models] == ["ready"], "the model")
            assert client.generate("hello", model="echo").text
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_logs_are_listed_shown_and_named(up: Program, endpoint: str) -> None:
    listed = launch("logs", "--endpoint", endpoint).stdout
    assert {line.split()[0] for line in listed.splitlines()} == {"broker", "echo-1", "echo-2"}
    assert '"event": "ready"' in launch("logs", "broker", "--endpoint", endpoint).stdout
    wrong = launch("logs", "ecko-1", "--endpoint", endpoint)
    assert wrong.returncode == 1
    assert "did you mean 'echo-1'?" in wrong.stderr


def test_json_lines_for_programs(config: Path, endpoint: str) -> None:
    with program("up", "--config", str(config), "--endpoint", endpoint, "--log-format", "json") as up:
        up.line('"level": "ready"')
        up.process.terminate()
        up.wait()
    lines = [json.loads(line) for line in up.lines]
    assert {line["subject"] for line in lines} == {"launcher", "broker", "echo-1", "echo-2"}


def test_it_works_over_tcp_too(config: Path, home: Path) -> None:
    with ports.reserved() as port:
        endpoint = f"tcp://127.0.0.1:{port}"
        with program("up", "--config", str(config), "--endpoint", endpoint) as up:
            up.line("ready after")
            with loopmux.Client(endpoint) as client:
                assert client.generate("hello", model="echo").text
            assert launch("down", "--endpoint", endpoint).returncode == 0
            assert up.wait() == 0
    assert [p for p in (home / "runtime").rglob("*") if not p.is_dir()] == []


def test_a_followed_log_goes_on_over_a_rotation(home: Path, endpoint: str) -> None:
    log = places.logs(endpoint) / "w-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\nthree\n")
    with program("logs", "w-1", "--endpoint", endpoint, "-n", "2", "-f") as follower:
        follower.line("three")
        with log.open("a") as stream:
            stream.write("four\n")
        follower.line("four")
        log.rename(log.with_suffix(".log.1"))
        log.write_text("five\n")
        follower.line("five")
        follower.process.send_signal(signal.SIGINT)
        assert follower.wait() == 0
    assert follower.lines == ["two", "three", "four", "five"]


@pytest.mark.parametrize("words", [[], ["fly"], ["up", "--log-format", "xml"], ["env", "path"]])
def test_wrong_usage_ends_with_2(words: list[str]) -> None:
    assert launch(*words).returncode == 2


def test_debug_shows_the_traceback_that_is_hidden_otherwise(home: Path) -> None:
    words = ("config", "check", str(home / "gone.yaml"))
    assert "Traceback" not in launch(*words).stderr
    assert "Traceback" in launch(*words, "--debug").stderr


def test_too_few_descriptors_are_named_with_what_helps(config: Path, endpoint: str) -> None:
    words = [sys.executable, "-m", "loopmux_launcher", "up", "--config", str(config), "--endpoint", endpoint]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 25; exec "$@"', "sh", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode not in (0, exitcodes.CONFIG)
    assert re.search(r"Too many open files.*let this process open more \(`ulimit -n`", done.stderr)


def test_so_are_they_by_every_other_command(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(file: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(file))

    monkeypatch.setattr("loopmux_launcher.commands.load", fails)
    assert commands.main(["config", "check", str(config)]) == exitcodes.FAILURE
    assert re.search(r"Too many open files.*let this process open more \(`ulimit -n`", capsys.readouterr().err)


def test_a_failure_of_the_launcher_itself_leaves_nothing(
    config: Path, endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Console):
        def announce(self, news: Announce) -> None:
            if news.level == "ready":
                raise RuntimeError("a bug")

    before = psutil.Process().children(recursive=True)  # stacks that other tests share
    launcher = Launcher(load(config), endpoint, Failing("plain"), with_broker=True)
    with pytest.raises(RuntimeError, match="a bug"):
        launcher.run()
    assert [p for p in psutil.Process().children(recursive=True) if p not in before] == []
    assert list((home / "s").iterdir()) == [] if (home / "s").exists() else True


def test_a_launcher_that_cannot_watch_for_signals_says_so_and_leaves_nothing(
    config: Path, endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(parent: int | None) -> None:
        raise OSError("no descriptor is left")

    monkeypatch.setattr("loopmux_launcher.server.Signals", fails)
    launcher = Launcher(load(config), endpoint, Console("plain"), with_broker=True)
    with pytest.raises(OSError, match="no descriptor is left"):
        launcher.run()
    assert list((home / "s").iterdir()) == [] if (home / "s").exists() else True


def test_who_interrupts_it_as_it_begins_to_listen_and_as_it_ends_has_it_end_in_good_order(
    config: Path, endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Listening):
        def __init__(self, endpoint: str) -> None:
            super().__init__(endpoint)
            signal.raise_signal(signal.SIGINT)

        def close(self) -> None:
            signal.raise_signal(signal.SIGINT)
            super().close()

    monkeypatch.setattr("loopmux_launcher.server.Listening", Interrupted)
    assert Launcher(load(config), endpoint, Console("plain"), with_broker=True).run() == 0
    assert not (home / "s").exists()


def test_a_signal_that_comes_as_signals_begin_to_be_noted_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    install = signal.signal

    def and_one_comes(number: int, handler: Any) -> Any:
        before = install(number, handler)
        if number == signal.SIGTERM and handler != before:
            signal.raise_signal(number)
        return before

    before = install(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(signal, "signal", and_one_comes)
    try:
        with Signals() as noted:
            assert noted.take(set()).stops == 1
    finally:
        install(signal.SIGTERM, before)


def test_the_live_view_needs_no_key_where_clients_do(config: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over tcp clients have to show keys; that of this launcher's own host is for another broker, and alone."""
    public = {name: keys.new(name, home)[1].public for name in ("broker", "desk")}
    settings = home / "broker.yaml"
    settings.write_text(json.dumps({"key": "broker.key", "client_keys": {"desk": public["desk"]}}))  # JSON is YAML
    monkeypatch.setenv("LOOPMUX_KEY", str(home / "desk.key"))
    words = ("up", "--config", str(config), "--broker-config", str(settings), "--log-format", "live")
    with ports.reserved() as port, program(*words, "--endpoint", f"tcp://127.0.0.1:{port}") as up:
        up.line("0 running, 0 queued, 0 tokens/s, 2 workers")
