"""``loopmux load`` against a stack."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loopmux
from e2e import stacks
from loopmux_loadtest import load
from loopmux_loadtest.tally import arrivals


def measured(
    stack: stacks.Stack, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0, said: str = ""
) -> dict[str, Any]:
    assert load.main([*words, "--endpoint", stack.endpoint, "--json"]) == code
    shown = capsys.readouterr()
    assert shown.err == said
    figures: dict[str, Any] = json.loads(shown.out)
    return figures


def test_a_closed_loop(echo_stack: stacks.Stack, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(
        echo_stack, capsys, "echo", "--at-once", "4", "--requests", "30", "--max-new-tokens", "16", "--connections", "2"
    )
    assert (found["model"], found["at_once"], found["connections"]) == ("echo", 4, 2)
    assert (found["requests"], found["ended"], found["failed"], found["stopped"]) == (30, 30, {}, 0)
    assert (found["tokens"], found["prompt_tokens"], found["reused_tokens"]) == (480, 30 * 4, 0)
    for name in ("first_token_ms", "between_tokens_ms", "latency_ms"):
        assert 0 <= found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]
    assert 0 < found["first_token_ms"]["p50"] < found["latency_ms"]["p50"]


def test_what_arrives_faster_than_it_is_served_shows_the_time_in_the_queue(
    echo_stack: stacks.Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 requests at once for 8 slots, each of which is busy for a fifth of a second."""
    words = ["slow", "--rate", "1000", "--requests", "24", "--max-new-tokens", "11", "--seed", "7"]
    found = measured(echo_stack, capsys, *words)
    assert (found["rate"], found["ended"], found["tokens"]) == (1000, 24, 24 * 11)
    spent = 10 / 50  # seconds between the first and the last token
    latest = max(arrivals(1000, 7, requests=24))
    assert found["latency_ms"]["p99"] >= 1e3 * (3 * spent - latest)
    assert found["first_token_ms"]["p99"] >= 1e3 * (2 * spent - latest)


def test_a_test_for_some_time_has_the_arrivals_of_that_time(
    echo_stack: stacks.Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(echo_stack, capsys, "echo", "--rate", "100", "--seconds", "0.3", "--max-new-tokens", "1")
    assert found["requests"] == found["ended"] == len(list(arrivals(100, 0, seconds=0.3)))
    found = measured(echo_stack, capsys, "echo", "--at-once", "2", "--seconds", "0.1", "--max-new-tokens", "1")
    assert found["requests"] == found["ended"] >= 2


def test_failures_are_counted_by_their_code(
    echo_stack: stacks.Stack, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": "x", "model": "nope"}\n')
    words = ["echo", "--prompts", str(file), "--requests", "5", "--max-new-tokens", "40"]
    said = "loopmux: 2 of 5 requests failed\n"
    found = measured(echo_stack, capsys, *words, code=1, said=said)
    assert (found["ended"], found["failed"], found["tokens"]) == (3, {"model_not_found": 2}, 120)
    assert "'nope' is not known" in found["errors"]["model_not_found"]
    assert load.main([*words, "--endpoint", echo_stack.endpoint]) == 1
    shown = capsys.readouterr()
    assert shown.err == said
    counts, times, failures = shown.out.split("\n\n")
    assert counts.splitlines()[1].split()[:4] == ["5", "3", "2", "0"]
    assert [line.split("  ")[0] for line in times.splitlines()[1:]] == ["first token", "between tokens", "latency"]
    assert failures.splitlines()[1].startswith("model_not_found  2         model 'nope' is not known")


def test_connections_get_the_files_that_they_take_or_are_refused(echo_stack: stacks.Stack) -> None:
    words = f"{sys.executable} -m loopmux load echo --connections 20 --requests 20 --endpoint {echo_stack.endpoint}"

    def limited(limit: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", f"{limit}; {words}"], capture_output=True, text=True, timeout=60)

    done = limited("ulimit -Sn 100")
    assert (done.returncode, done.stderr) == (0, "")
    done = limited("ulimit -n 164")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "loopmux: --connections: found 20, expected at most 10 with `ulimit -Hn` 164\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    terminal: bool, echo_stack: stacks.Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(load, "_LIVE" if terminal else "_PLAIN", 0.02)
    assert load.main(["slow", "--requests", "2", "--max-new-tokens", "20", "--endpoint", echo_stack.endpoint]) == 0
    begin, end = ("\r", "\x1b[K") if terminal else ("", "\n")
    look = rf"{begin}\d+ s: \d ended, 0 failed, \d under way, \d+ tokens/s{re.escape(end)}"
    assert re.fullmatch(f"({look})+" + (re.escape("\r\x1b[K") if terminal else ""), shown.getvalue())
    assert "\x1b" not in capsys.readouterr().out


def test_ctrl_c_cancels_what_is_under_way_and_prints_what_was_measured(
    echo_stack: stacks.Stack, tmp_path: Path
) -> None:
    file = tmp_path / "asked.jsonl"
    endless = json.dumps({"prompt": "x", "model": "slow", "max_new_tokens": 100_000})
    file.write_text(f'{{"prompt": "x", "max_new_tokens": 5}}\n{endless}\n')
    words = ["echo", "--prompts", str(file), "--at-once", "1", "--json", "--endpoint", echo_stack.endpoint]
    command = [sys.executable, "-m", "loopmux", "load", *words]
    with (
        loopmux.Client(echo_stack.endpoint) as client,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):

        def running() -> int:
            return next(model.running for model in client.models() if model.id == "slow")

        stacks.wait_for(running, "the second request to run")
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
        stacks.wait_for(lambda: not running(), "the second request to be cancelled")
    assert (process.returncode, said) == (130, "")
    found = json.loads(out)
    assert (found["requests"], found["ended"], found["stopped"], found["failed"]) == (2, 1, 1, {})
    assert found["tokens"] >= 5
