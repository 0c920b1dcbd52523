"""Adapters at run time, on the demo model: loaded while others stream, there after a death, gone when unloaded."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import loopmux
from e2e import stacks
from e2e.conftest import DEMO

CONFIG = f"""
environments:
  here: {{path: "{sys.prefix}"}}
models:
  default: {{base_model: "{DEMO}/base", environment: here, torch_threads: 1}}
  tools: {{base_model: "{DEMO}/base", adapter_dir: "{DEMO}/adapters/tools", environment: here, torch_threads: 1}}
"""
QUESTION = "What is a broker?"
SHOUT = DEMO / "adapters" / "shout"


@pytest.fixture(scope="module")
def stack(home: Path) -> Iterator[stacks.Stack]:
    config = home / "adapters.yaml"
    config.write_text(CONFIG)
    stack = stacks.start(config, home, folder=home / "adapters")
    yield stack
    assert stack.stop() == 0


def adapter(stack: stacks.Stack, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loopmux", "adapter", words[0], "--endpoint", stack.endpoint, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def answer(client: loopmux.Client, model: str) -> str:
    return client.generate(QUESTION, model=model, temperature=0, max_new_tokens=60).text


def killed(client: loopmux.Client) -> None:
    """Kill the worker and wait for the next one."""
    [worker] = client.status().workers
    psutil.Process(worker.pid).kill()
    stacks.wait_for(
        lambda: {w.pid for w in client.status().workers} - {worker.pid}, "another worker", limit=stacks.READY_LIMIT
    )


@pytest.mark.timeout(300)  # torch is loaded twice, on whatever is left of a busy machine
def test_an_adapter_from_its_loading_to_its_unloading(stack: stacks.Stack) -> None:
    with loopmux.Client(stack.endpoint) as client:
        plain = answer(client, "default")
        told: list[str] = []

        def read() -> None:
            with client.stream(QUESTION, model="default", ignore_eos=True, max_new_tokens=700, temperature=0) as stream:
                told.append("".join(e.text for e in stream if isinstance(e, loopmux.TextDelta)))
                told.append(stream.result.finish_reason)

        reader = threading.Thread(target=read)
        reader.start()
        stacks.wait_for(lambda: client.status().running, "the stream to begin")
        done = adapter(stack, "load", "default", "loud", str(SHOUT))
        assert done.returncode == 0, done.stderr
        loud = answer(client, "loud")
        reader.join(stacks.READY_LIMIT)
        assert (told[0][: len(plain)], told[1]) == (plain, "length")
        assert loud == loud.upper() != plain
        assert client.generate(QUESTION, model="default", adapter="loud", temperature=0, max_new_tokens=60).text == loud

        listed = {one["name"]: one for one in json.loads(adapter(stack, "list", "--json").stdout)}
        assert listed["loud"]["workers"] == 1
        assert listed["loud"]["folder"] == str(SHOUT)
        [content] = listed["loud"]["contents"]
        assert f"content {content}, in default-1" in done.stdout
        assert listed["tools"]["onto"] is None
        table = adapter(stack, "list").stdout.splitlines()
        assert table[0].split() == ["ADAPTER", "WORKERS", "CONTENT", "LOADED", "FOR", "FOLDER"]
        assert [line.split()[0] for line in table[1:]] == ["loud", "tools"]

        killed(client)
        assert answer(client, "loud") == loud
        gone = adapter(stack, "unload", "default", "loud")
        assert (gone.returncode, gone.stderr) == (0, "")
        with pytest.raises(loopmux.ModelNotFoundError, match="'loud' is not known"):
            answer(client, "loud")
        with pytest.raises(loopmux.AdapterNotFoundError, match="has no adapter 'loud'"):
            client.generate(QUESTION, model="default", adapter="loud")
        assert answer(client, "default") == plain


def test_what_cannot_be_done_is_told_and_changes_nothing(stack: stacks.Stack, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, reason in (
        (("load", "nobody", "loud", str(SHOUT)), "model 'nobody' is not known, expected one of default, tools"),
        (("load", "default", "tools", str(SHOUT)), "'tools': found a model of that name already"),
        (("load", "default", "loud", str(tmp_path / "nowhere")), "loaded nowhere: default-1: "),
        (("load", "default", "loud", str(tmp_path / "empty")), "found no adapter_model.safetensors in"),
        (("load", "default", "loud", str(DEMO / "base")), "found no adapter_model.safetensors in"),
        (("unload", "default", "loud"), "has no adapter 'loud', loaded are: tools"),
        (("unload", "default", "tools"), "is one of the configuration: take it out there"),
    ):
        done = adapter(stack, *words)
        assert done.returncode in (1, 2, 78), (words, done)
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
    with loopmux.Client(stack.endpoint) as client:
        assert [one.name for one in client.adapters()] == ["tools"]
        assert answer(client, "tools")
