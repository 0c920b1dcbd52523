"""``up`` with models that come and go with the demand, and with a configuration that is changed meanwhile."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import loopmux
from e2e import stacks
from fakemodels import write_model
from launcher.programs import Program, program, wait_for
from loopmux.messages import ModelStatus, Status
from loopmux_worker.engine.echo import echo_token


@pytest.fixture
def endpoint(home: Path) -> str:
    return f"ipc://{home}/s/client.ipc"


@pytest.fixture
def config(home: Path) -> Path:
    return home / "llm_backends.yaml"


@contextmanager
def running(config: Path, endpoint: str, text: str) -> Iterator[tuple[Program, loopmux.Client]]:
    config.write_text(text)
    with (
        program("up", "--config", str(config), "--endpoint", endpoint) as up,
        loopmux.Client(endpoint) as client,
    ):
        up.line("ready after")
        wait_for(lambda: client.status().models, "the launcher to have joined the broker and named its models")
        wait_for(lambda: len(client.status().workers) == len(up.children("loopmux_worker")), "its workers, too")
        yield up, client
        up.process.terminate()
        assert up.wait() == 0


def model(status: Status, name: str) -> ModelStatus:
    return next(model for model in status.models if model.id == name)


def broken_python(home: Path, worker: str) -> Path:
    """An interpreter that passes the probe and runs this, in the words of a shell, as a worker."""
    report = '{"ok": true, "python": "3.11", "packages": {"pyzmq": "27"}, "devices": [], "missing": []}'
    python = home / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
*probe*) echo '{report}';;
*--spec*) {worker};;
*) exec {sys.executable} "$@";;
esac
"""
    )
    python.chmod(0o755)
    return python


# --- on demand --------------------------------------------------------------------------------------------------------


def test_a_model_runs_from_its_first_request_until_it_is_idle(config: Path, endpoint: str) -> None:
    text = "models: {echo: {engine: echo, min: 0, idle_timeout: 3, echo: {tokens: 5}}}\n"
    with running(config, endpoint, text) as (up, client):
        assert up.lines[-1].endswith(": on demand echo")
        assert up.children("loopmux_worker") == []
        assert model(client.status(), "echo").phase == "idle"
        for _ in range(2):
            with client.stream("hello", model="echo") as stream:
                events = list(stream)
            waited = [event for event in events if isinstance(event, loopmux.Waiting)]
            assert waited[0].phase == "queued"
            assert "loading" in {event.phase for event in waited}
            assert all(event.elapsed >= 0 for event in waited)
            assert len(stream.result.token_ids) == 5
            assert len(up.children("loopmux_worker")) == 1
            assert client.generate("again", model="echo").text  # it is there now
            wait_for(lambda: up.children("loopmux_worker") == [], "the worker to stop")
            wait_for(lambda: model(client.status(), "echo").phase == "idle", "the model to be idle")
        assert up.process.poll() is None


def test_a_request_that_does_not_wait_is_refused_and_starts_nothing(config: Path, endpoint: str) -> None:
    with running(config, endpoint, "models: {echo: {engine: echo, min: 0}}\n") as (up, client):
        with pytest.raises(loopmux.OverloadedError, match="it is idle"):
            client.generate("hello", model="echo", wait=False)
        time.sleep(1.2)  # longer than a heartbeat, with which the launcher would hear of it
        assert up.children("loopmux_worker") == []


def test_a_model_that_cannot_start_is_refused_with_its_last_words(config: Path, endpoint: str, home: Path) -> None:
    python = broken_python(home, "for i in $(seq 30); do echo word $i >&2; done; exit 9")
    text = f"""environments: {{x: {{path: {python}}}}}
models: {{bad: {{engine: echo, environment: x, min: 0, start_timeout: 20}}, good: {{engine: echo}}}}
"""
    with running(config, endpoint, text) as (_, client):
        with pytest.raises(loopmux.EngineError) as caught:
            client.generate("hello", model="bad")
        said = str(caught.value).splitlines()
        assert "exit code 9" in said[0]
        assert said[1:] == [f"word {i}" for i in range(11, 31)]
        assert model(client.status(), "bad").detail.splitlines()[1:] == said[1:]
        assert client.generate("hello", model="good").text


def test_who_waits_is_told_that_an_environment_is_built_for_it(config: Path, endpoint: str, home: Path) -> None:
    text = f"environments: {{x: {{path: {stacks.interpreter(home / 'python')}}}}}\n"
    text += "models: {echo: {engine: echo, environment: x, min: 0}}\n"
    with running(config, endpoint, text) as (_, client), client.stream("hello", model="echo") as stream:
        phases = [event.phase for event in stream if isinstance(event, loopmux.Waiting)]
    assert list(dict.fromkeys(phases)) == ["queued", "building", "loading"]


def test_a_start_that_takes_too_long_is_given_up_with_what_the_worker_said_last(
    config: Path, endpoint: str, home: Path
) -> None:
    python = broken_python(home, "echo still reading >&2; exec sleep 1000")
    text = f"environments: {{x: {{path: {python}}}}}\n"
    text += "models: {slow: {engine: echo, environment: x, min: 0, start_timeout: 1}}\n"
    with running(config, endpoint, text) as (up, client):
        with pytest.raises(loopmux.EngineError) as caught:
            client.generate("hello", model="slow")
        assert "it was not ready after 1 s (start_timeout)" in str(caught.value)
        assert "still reading" in str(caught.value)
        assert not [process for process in up.family() if "sleep" in process.cmdline()]


def test_another_model_makes_room_within_the_memory(config: Path, endpoint: str) -> None:
    text = """
memory_gib: 1
models:
  a: {engine: echo, min: 0, memory_gib: 1}
  b: {engine: echo, min: 0, memory_gib: 1, slots: 3}
"""
    with running(config, endpoint, text) as (up, client):
        assert client.generate("hello", model="a").text
        with client.stream("hello", model="b") as stream:
            waited = [event for event in stream if isinstance(event, loopmux.Waiting)]
        assert any("waits for 1 GiB of memory_gib: 1, of which others have: a 1" in event.detail for event in waited)
        assert model(client.status(), "a").phase == "idle"
        assert len(up.children("loopmux_worker")) == 1


def test_more_workers_come_while_requests_wait_and_leave_after_them(config: Path, endpoint: str) -> None:
    text = "models: {echo: {engine: echo, max: 2, slots: 1, idle_timeout: 1.5, echo: {rate: 10, tokens: 80}}}\n"
    with running(config, endpoint, text) as (up, client):
        results: list[loopmux.Result] = []
        threads = [threading.Thread(target=lambda: results.append(client.generate("x", model="echo"))) for _ in "123"]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(up.children("loopmux_worker")) == 2, "a second worker")
        for thread in threads:
            thread.join()
        assert {result.worker for result in results} == {"echo-1", "echo-2"}
        wait_for(lambda: len(up.children("loopmux_worker")) == 1, "one of them to stop")


def test_a_model_whose_folder_has_gone_is_named_and_the_others_go_on(config: Path, endpoint: str, home: Path) -> None:
    base = write_model(home / "base")
    text = "models: {gone: {base_model: base, min: 0}, echo: {engine: echo}}\n"
    with running(config, endpoint, text) as (_, client):
        shutil.rmtree(base)
        with pytest.raises(loopmux.EngineError) as caught:
            client.generate("hello", model="gone")
        assert "models.gone.base_model" in str(caught.value)
        assert f"{base}, expected an existing directory or a hub id" in str(caught.value)
        assert client.generate("hello", model="echo").text


def test_an_adapter_for_a_model_on_demand_is_there_when_its_worker_is(config: Path, endpoint: str) -> None:
    with running(config, endpoint, "models: {echo: {engine: echo, min: 0}}\n") as (up, client):
        words = ("adapter", "load", "echo", "parrot", "/adapters/parrot", "--endpoint", endpoint)
        done = subprocess.run([sys.executable, "-m", "loopmux", *words], capture_output=True, text=True, check=True)
        assert done.stdout == "parrot: remembered; echo has no worker now, the next one loads it\n"
        assert up.children("loopmux_worker") == []
        assert client.generate("hello", model="parrot").text
        [one] = client.adapters()
        assert (one.name, one.workers, one.onto) == ("parrot", 1, "echo")


# --- another configuration --------------------------------------------------------------------------------------------


class Load:
    """Clients that ask without end, and what came of it."""

    def __init__(self, endpoint: str, model: str) -> None:
        self.results: list[loopmux.Result] = []
        self.errors: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(endpoint, model)) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _ask(self, endpoint: str, model: str) -> None:
        with loopmux.Client(endpoint) as client:
            while not self._over.is_set():
                try:
                    self.results.append(client.generate("hello", model=model, max_new_tokens=1000))
                except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the test is about
                    self.errors.append(error)

    def end(self) -> list[loopmux.Result]:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert self.errors == []
        return self.results


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rolling_restart_fails_no_request(config: Path, endpoint: str, workers: int) -> None:
    """Streams of three seconds, longer than a worker waits for what runs: they go on in the next one."""
    text = f"models: {{echo: {{engine: echo, workers: {workers}, slots: 4, echo: {{rate: 50, tokens: 150}}}}}}\n"
    with running(config, endpoint, text) as (up, client):
        before = {process.pid for process in up.children("loopmux_worker")}
        load = Load(endpoint, "echo")
        wait_for(lambda: client.status().running == 4, "load")
        config.write_text(text.replace("slots: 4", "slots: 5"))
        up.line("configuration read again: changed: echo")
        wait_for(lambda: [w.slots for w in client.status().workers] == [5] * workers, "the workers to be replaced")
        count = len(load.results)
        wait_for(lambda: len(load.results) >= count + 4, "requests in the new workers")
        for result in load.end():
            request = bytes.fromhex(result.request_id)
            assert result.token_ids == tuple(echo_token(request, i) for i in range(150))
        assert not before & {process.pid for process in up.children("loopmux_worker")}


def test_who_stays_in_a_former_environment_keeps_its_variables(config: Path, endpoint: str) -> None:
    def text(variable: str) -> str:
        own = f"{{path: {sys.executable}, variables: {{{variable}}}}}"
        return f"environments: {{own: {own}}}\nmodels: {{echo: {{engine: echo, environment: own}}}}\n"

    with running(config, endpoint, text("A: b")) as (up, client):
        config.write_text(text("PYTHONHOME: /nowhere"))
        up.line("cannot be built as it is declared now, the former one stays in use")
        [worker] = up.children("loopmux_worker")
        worker.kill()
        up.line("echo-1: ready in")
        assert client.generate("hi", model="echo", max_new_tokens=2).usage.completion_tokens == 2


def test_requests_on_weights_that_go_end_where_they_are(config: Path, endpoint: str) -> None:
    """Streams of three seconds: none of them goes on in another process, whose weights are others."""
    text = "models: {echo: {engine: echo, workers: 2, slots: 4, echo: {rate: 50, tokens: 150}}}\n"
    with running(config, endpoint, text) as (up, client):
        load = Load(endpoint, "echo")
        wait_for(lambda: client.status().running == 4, "load")
        before = {w.pid for w in client.status().workers}
        config.write_text(text.replace("slots: 4", "slots: 4, dtype: float32"))
        up.line("configuration read again: changed: echo")
        wait_for(lambda: not before & {w.pid for w in client.status().workers}, "the workers to be replaced")
        wait_for(lambda: len(client.status().workers) == 2, "both new ones")
        assert {result.attempts for result in load.end()} == {1}


def test_only_what_changed_is_touched(config: Path, endpoint: str) -> None:
    text = "models: {a: {engine: echo}, b: {engine: echo, slots: 2}}\n"
    with running(config, endpoint, text) as (up, client):
        broker = up.children("loopmux_broker")[0].pid
        before = {w.name: w.pid for w in client.status().workers}
        config.write_text("models: {new: {engine: echo, slots: 7}, a: {engine: echo}, b: {engine: echo, slots: 3}}\n")
        up.line("configuration read again: added: new; changed: b")
        up.line("new-1: ready in")
        wait_for(lambda: {"a-1", "b-1", "new-1"} == {w.name for w in client.status().workers}, "the workers")
        wait_for(lambda: [m.phase for m in client.status().models] == ["ready"] * 3, "the models")
        after = {w.name: w.pid for w in client.status().workers}
        assert (after["a-1"] == before["a-1"], after["b-1"] == before["b-1"]) == (True, False)
        assert up.children("loopmux_broker")[0].pid == broker
        config.write_text("models: {a: {engine: echo}}\n")
        up.line("removed: b, new")
        wait_for(lambda: [m.id for m in client.status().models] == ["a"], "the others to go")
        with pytest.raises(loopmux.ModelNotFoundError):
            client.generate("hello", model="b")
        assert [w.pid for w in client.status().workers] == [after["a-1"]]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("models: {echo: {engine: echo, slots: 0}}\n", "models.echo.slots: found 0 (int), expected at least 1"),
        ("models: {echo: [\n", "expected"),
        ("", "expected a mapping with `models:`"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_refused_and_the_old_one_stays(config: Path, endpoint: str, text: str | None, why: str) -> None:
    good = "models: {echo: {engine: echo}}\n"
    with running(config, endpoint, good) as (up, client):
        pids = [w.pid for w in client.status().workers]
        config.unlink() if text is None else config.write_text(text)
        up.line("configuration refused, the former one stays in force")
        note = wait_for(lambda: client.status().notes, "the note")
        assert why in "\n".join(note.values())
        assert client.generate("hello", model="echo").text
        assert [w.pid for w in client.status().workers] == pids
        shown = subprocess.run(
            [sys.executable, "-m", "loopmux", "status", "--endpoint", endpoint],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "configuration: refused" in shown
        config.write_text(good)
        up.line("configuration read again: what runs stays as it is")
        wait_for(lambda: not client.status().notes, "the note to go")


def test_sighup_reads_it_again_and_tries_anew_what_was_given_up(config: Path, endpoint: str, home: Path) -> None:
    (home / "works").touch()
    python = broken_python(
        home, f'test -e {home}/works || exit 78; shift 4; exec {sys.executable} -P -s -m loopmux_worker "$@"'
    )
    text = f"environments: {{x: {{path: {python}}}}}\n"
    text += "models: {m: {engine: echo, environment: x}, e: {engine: echo}}\n"
    with running(config, endpoint, text) as (up, client):
        (home / "works").unlink()
        os.kill(next(w.pid for w in client.status().workers if w.name == "m-1"), signal.SIGKILL)
        wait_for(lambda: model(client.status(), "m").phase == "failed", "the model to be given up")
        (home / "works").touch()
        up.process.send_signal(signal.SIGHUP)
        up.line("configuration read again")
        wait_for(lambda: model(client.status(), "m").phase == "ready", "the model to be back")


def test_a_terminal_that_goes_away_stops_it(config: Path, endpoint: str) -> None:
    config.write_text("models: {echo: {engine: echo}}\n")
    command = [sys.executable, "-m", "loopmux_launcher", "up", "--config", str(config), "--endpoint", endpoint]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    said = b""
    while b"ready after" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    wait_for(lambda: os.waitpid(pid, os.WNOHANG)[0], "it to stop")
    assert not Path(endpoint.removeprefix("ipc://")).exists()
