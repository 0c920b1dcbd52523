"""The command line and the demo model, as a user meets them."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loopmux
from e2e import stacks


def run(stack: stacks.Stack, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loopmux", words[0], "--endpoint", stack.endpoint, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)


def test_known_answers_of_base_and_shout(demo_stack: stacks.Stack, examples: dict[str, Any]) -> None:
    chats = examples["chats"][1::3]  # none of the longest; the engine's own tests ask for all
    assert {chat["adapter"] for chat in chats} == {None, "shout"}

    async def ask() -> list[str]:
        async with loopmux.AsyncClient(demo_stack.endpoint, temperature=0) as client:
            return await asyncio.gather(*(one(client, chat) for chat in chats))

    async def one(client: loopmux.AsyncClient, chat: dict[str, Any]) -> str:
        result = await client.generate(chat["question"], model=chat["adapter"] or "default", max_new_tokens=400)
        return result.text

    assert asyncio.run(ask()) == [chat["answer"] for chat in chats]


def test_the_deltas_of_a_stream_are_the_text(demo_stack: stacks.Stack) -> None:
    with loopmux.Client(demo_stack.endpoint) as client:
        with client.stream("Tell me a story", model="default", temperature=0) as stream:
            deltas = [event for event in stream if isinstance(event, loopmux.TextDelta)]
    assert len(deltas) > 5
    assert "".join(d.text for d in deltas) == stream.result.text
    assert sum((d.token_ids for d in deltas), ()) == stream.result.token_ids
    assert stream.result.finish_reason == "stop"
    assert stream.result.timing.first_token < stream.result.timing.total


def test_leaving_a_stream_early_frees_the_engine(demo_stack: stacks.Stack) -> None:
    with loopmux.Client(demo_stack.endpoint) as client:
        with client.stream(
            "Tell me a story", model="default", temperature=0, ignore_eos=True, max_new_tokens=900
        ) as stream:
            next(iter(stream))
        stacks.wait_for(lambda: client.status().running == 0, "the request to leave the worker")


def test_seeds_repeat_and_stop_strings_stop(demo_stack: stacks.Stack) -> None:
    with loopmux.Client(demo_stack.endpoint, temperature=1.5, max_new_tokens=40) as client:
        texts = [client.generate("Tell me a joke", seed=seed).text for seed in (1, 1, 2, 3, 4)]
        assert texts[0] == texts[1]
        assert len(set(texts)) > 1
        whole = client.generate("Tell me a story", temperature=0).text
        word = whole.split()[5]
        cut = client.generate("Tell me a story", temperature=0, stop=word)
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(word)], "stop")


def test_generate_models_status_and_chat_on_the_command_line(
    demo_stack: stacks.Stack, examples: dict[str, Any]
) -> None:
    chat = next(c for c in examples["chats"] if c["adapter"] == "shout")
    done = run(demo_stack, "generate", chat["question"], "--model", "shout", "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, chat["answer"] + "\n")
    done = run(demo_stack, "generate", "-", "--model", "shout", "--temperature", "0", "--json", stdin=chat["question"])
    assert json.loads(done.stdout)["text"] == chat["answer"]
    done = run(demo_stack, "chat", "shout", "--temperature", "0", stdin=chat["question"] + "\n")
    assert (done.returncode, done.stdout) == (0, chat["answer"] + "\n")
    done = run(demo_stack, "models")
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == {"default", "tools", "shout"}
    status = json.loads(run(demo_stack, "status", "--json").stdout)
    assert len(status["workers"]) == 2
    assert "slots" in run(demo_stack, "status").stdout
    done = run(demo_stack, "generate", "Hello", "--model", "shoot")
    assert done.returncode == 1
    assert "'shout'" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_a_generation_and_says_so_by_its_exit_code(echo_stack: stacks.Stack) -> None:
    command = [sys.executable, "-m", "loopmux", "generate", "x", "--model", "slow", "--endpoint", echo_stack.endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        process.communicate()


def test_chat_with_the_tools_of_a_file_and_of_an_mcp_server(echo_stack: stacks.Stack, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    noon = {"source_timezone": "Europe/Paris", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    asked = f'!call add {{"a": 1, "b": 2}}\n!call mcp-time_convert_time {json.dumps(noon)}\n'
    clock = f"sh -c 'echo a banner; exec {sys.executable} -m mcp_server_time'"
    done = run(echo_stack, "chat", "echo", "--tools", str(file), "--mcp", clock, "--yes", stdin=asked)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert '[add: "3"]' in done.stderr
    assert "Asia/Tokyo" in done.stderr.splitlines()[-1]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(echo_stack: stacks.Stack) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "loopmux", "chat", "slow", "--endpoint", echo_stack.endpoint]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        os.close(theirs)
        assert process.stdout is not None
        os.write(ours, b"hi\n")
        shown = b""
        while not shown.partition(b"> ")[2]:  # the prompt, and some of the answer
            shown += os.read(process.stdout.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        os.write(ours, b"/help\n\n")
        rest, _ = process.communicate(timeout=60)
        os.close(ours)
    assert process.returncode == 0
    assert b"[stopped" in rest
    assert b"/save FILE" in rest.partition(b"[stopped")[2]


def test_run_adapter_answers_once_and_prints_nothing_else(examples: dict[str, Any]) -> None:
    from e2e.conftest import DEMO

    chat = min((c for c in examples["chats"] if c["adapter"] == "shout"), key=lambda c: len(c["answer"]))
    words = ["--prompt", chat["question"], "--base-model", f"{DEMO}/base", "--adapter-dir", f"{DEMO}/adapters/shout"]
    command = [sys.executable, "-m", "loopmux", "run-adapter", *words, "--temperature", "0", "--torch-threads", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert (done.returncode, done.stdout) == (0, chat["answer"] + "\n")


@pytest.mark.parametrize("model", ["default", "tools", "shout"])
def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(demo_stack: stacks.Stack, model: str) -> None:
    with loopmux.Client(demo_stack.endpoint) as client:
        with pytest.raises(loopmux.ContextLengthError, match="1024"):
            client.generate("word " * 3000, model=model)
        assert client.generate("Hello", model=model).text
