from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from brokerwire import broker
from loopmux import cli, exitcodes
from loopmux.cli import delegate, show, talk
from loopmux.cli.printing import Printer, as_json
from loopmux.errors import BadRequestError
from loopmux.messages import ModelStatus, Status, WorkerStatus
from loopmux.results import ReasoningDelta, TextDelta, Waiting


def test_no_broker_is_one_clear_line_and_exit_code_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loopmux", "status", "--endpoint", f"ipc://{tmp_path}/none.ipc"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "loopmux up" in done.stderr
    assert f"{tmp_path}/none.ipc" in done.stderr


def test_a_wrong_endpoint_is_a_configuration_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--endpoint", "http://nowhere"]) == exitcodes.CONFIG
    assert "tcp://host:port" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--top-p", "1.5"), ("--max-new-tokens", "0")])
def test_a_value_out_of_range_is_a_usage_error(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "x", "--endpoint", f"ipc://{tmp_path}/none.ipc", *option]
    assert cli.main(words) == exitcodes.USAGE
    assert "expected a value" in capsys.readouterr().err


def test_an_unknown_command_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["fly"])
    assert ended.value.code == exitcodes.USAGE


def test_a_missing_extra_prints_the_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["up"]) == exitcodes.FAILURE
    assert "pip install '.[server]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(delegate.PROGRAMS))
def test_delegated_programs_explain_themselves(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", "loopmux", name, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_a_prompt_that_is_not_utf8_is_refused_with_the_byte_and_its_place() -> None:
    with pytest.raises(BadRequestError, match="0xff at position 2"):
        talk._read_prompt(b"ab\xff".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.9, "59s"), (185, "3m05s"), (7620, "2h07m")])
def test_durations(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


def test_status_shows_workers_and_models() -> None:
    worker = WorkerStatus("w1", ("a", "b"), 4, 1, "plain", 77, "h", "ready", 9, 100, 12.4, 61, {}, 800, 90)
    status = Status(b"e" * 8, 5, "0.1.0", 42, 1, 0, 1, (ModelStatus("a", "ready", 1),), (worker,))
    text = show.render_status(status)
    assert "pid 42" in text
    assert "w1      ready  1/4      9       100     12     800     90        plain   77   1m01s  a b" in text
    assert "a      ready  1" in text


def test_status_shows_what_workers_note_once() -> None:
    report = {"notes": ["shout: no chat template"]}
    workers = [WorkerStatus(n, ("a",), 1, 0, "plain", 7, "h", "ready", report=report) for n in ("w1", "w2")]
    text = show.render_status(Status(b"e" * 8, 5, "0.1.0", 42, 1, 0, 0, (), tuple(workers)))
    assert text.splitlines()[-1] == "note: shout: no chat template"
    assert text.count("note:") == 1


def test_for_programs_every_field_is_there_whatever_it_holds() -> None:
    status = Status(b"\1\2", 1.0, "broker 1", 7, 1, 0, 0, models=(ModelStatus("m", "idle"),))
    shown = json.loads(as_json(status))
    assert shown.keys() == {field.name for field in fields(Status)}
    assert (shown["epoch"], shown["workers"], shown["settled"]) == ("0102", [], True)
    assert shown["models"] == [
        {"id": "m", "phase": "idle", "workers": 0, "queued": 0, "running": 0, "detail": "", "elapsed": 0.0}
    ]


def test_status_without_workers_has_no_empty_table() -> None:
    assert show.render_status(Status(b"e" * 8, 5, "0.1.0", 42, 1, 0, 0)).endswith("no models")


@pytest.mark.parametrize("program", ["loopmux_broker --config configs/broker.yaml", "loopmux_launcher --help"])
def test_programs_in_an_environment_with_the_client_alone_say_what_to_install(program: str, tmp_path: Path) -> None:
    for package in ("yaml", "structlog"):  # as if it were not installed
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", *program.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "pip install '.[server]'" in done.stderr


def test_a_full_disk_behind_the_output_is_one_clear_line(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/b.ipc"
    command = [sys.executable, "-m", "loopmux", "status", "--endpoint", endpoint]
    with broker("--endpoint", endpoint), Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "loopmux: [Errno 28] No space left on device\n"


def test_an_error_after_some_text_starts_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def stream() -> Iterator[TextDelta]:
        yield TextDelta("half an ans")
        raise BadRequestError("no more")

    with pytest.raises(BadRequestError):
        Printer().show(stream())
    assert capsys.readouterr().out == "half an ans\n"


def test_what_a_model_thinks_is_no_part_of_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    events = [ReasoningDelta("I "), TextDelta(""), ReasoningDelta("add."), TextDelta("4"), TextDelta("2")]
    Printer().show(events)
    assert capsys.readouterr() == ("42\n", "I add.\n")


def test_what_happens_in_the_middle_of_an_answer_is_no_part_of_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        TextDelta("for"),
        Waiting("queued", elapsed=1),
        TextDelta("ty"),
        ReasoningDelta("two?"),
        TextDelta("-two"),
    ]
    Printer().show(events)
    assert capsys.readouterr() == ("forty-two\n", "\n[queued, 1 s]\n\ntwo?\n")
