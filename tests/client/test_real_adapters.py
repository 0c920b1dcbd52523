"""Adapters at run time through both clients: the real broker and two real echo workers, without a launcher."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loopmux
from fakebroker import PATIENCE, wait_until


def start(folder: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, "--parent-pid", str(os.getpid()), *arguments]
    with (folder / f"{module}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Workers ``a`` and ``b`` of the model ``m``; ``a`` has an adapter ``own`` of itself."""
    folder = tmp_path_factory.mktemp("a")
    endpoint = f"ipc://{folder / 'b'}"
    running = [start(folder, "loopmux_broker", "--endpoint", endpoint)]
    for name, more in (("a", [{"id": "own", "adapter_dir": "/own"}]), ("b", [])):
        spec = {"name": name, "endpoint": f"{endpoint}.work", "models": [{"id": "m"}, *more], "engine": "echo"}
        (folder / f"{name}.json").write_text(json.dumps(spec | {"echo": {"tokens": 10**6, "rate": 200}}))
        running.append(start(folder, "loopmux_worker", "--spec", str(folder / f"{name}.json")))
    try:
        with loopmux.Client(endpoint, connect_timeout=PATIENCE) as client:
            wait_until(lambda: len(client.status().workers) == 2, "both workers joined")
        yield endpoint
    finally:
        for process in running:
            process.kill()
            process.wait(10)


def test_loaded_by_all_used_beside_a_stream_and_unloaded_while_in_use(endpoint: str) -> None:
    with loopmux.Client(endpoint, model="m", max_new_tokens=3) as client:
        with client.stream("x", max_new_tokens=10**6) as beside:
            next(iter(beside))
            done = client.load_adapter("m", "loud", "/adapters/loud")
            assert (done.content, done.workers, done.remembered) == ("echo", ("a", "b"), False)
            assert client.generate("x", model="loud").text
            assert client.generate("x", adapter="loud").text
            assert {one.name: one.workers for one in client.adapters()} == {"loud": 2, "own": 1}
            with client.stream("x", model="loud", max_new_tokens=60) as using:
                next(iter(using))
                assert client.unload_adapter("m", "loud").workers == ("a", "b")
                assert using.result.usage.completion_tokens == 60
            next(iter(beside))
        with pytest.raises(loopmux.ModelNotFoundError, match="'loud' is not known"):
            client.generate("x", model="loud")
        with pytest.raises(loopmux.AdapterNotFoundError, match="has no adapter 'loud'"):
            client.generate("x", adapter="loud")


def test_where_one_of_two_cannot_it_is_taken_back_from_the_other(endpoint: str) -> None:
    with loopmux.Client(endpoint, model="m", max_new_tokens=3) as client:
        with pytest.raises(loopmux.BadRequestError) as caught:
            client.load_adapter("m", "own", "/another")
        assert caught.value.message.startswith("adapter 'own' was loaded nowhere: a: adapter 'own': a model or adapter")
        assert caught.value.message.endswith("; taken back from b")
        wait_until(lambda: [one.workers for one in client.adapters()] == [1], "b to have unloaded it")


def test_with_asyncio(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def all_of_it() -> None:
        async with loopmux.AsyncClient(endpoint, model="m", max_new_tokens=3) as client:
            assert (await client.load_adapter("m", "soft", "folder")).workers == ("a", "b")
            assert (await client.generate("x", model="soft")).text
            assert [one.name for one in await client.adapters()] == ["own", "soft"]
            with pytest.raises(loopmux.BadRequestError, match="with other contents"):
                await client.load_adapter("m", "soft", "other")
            await client.load_adapter("m", "soft", tmp_path / "folder")  # the same one
            assert (await client.unload_adapter("m", "soft")).content == ""
            with pytest.raises(loopmux.AdapterNotFoundError):
                await client.unload_adapter("m", "soft")

    asyncio.run(all_of_it())


def test_nobody_there(tmp_path: Path) -> None:
    with loopmux.Client(f"ipc://{tmp_path / 'nobody'}", connect_timeout=0.2) as client:
        with pytest.raises(loopmux.ConnectionLostError, match="no broker answers"):
            client.load_adapter("m", "loud", "/a")


def adapter(*words: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loopmux", "adapter", words[0], "--endpoint", endpoint, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_on_the_command_line(endpoint: str) -> None:
    done = adapter("load", "m", "loud", "/adapters/loud", endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "loud: loaded, content echo, in a, b",
        "no launcher answers for these workers: it is gone when they end",
    ]
    assert [line.split() for line in adapter("list", endpoint=endpoint).stdout.splitlines()] == [
        ["ADAPTER", "WORKERS", "CONTENT", "LOADED", "FOR", "FOLDER"],
        ["loud", "2", "echo", "-"],
        ["own", "1", "echo", "-"],
    ]
    done = adapter("unload", "m", "loud", endpoint=endpoint)
    assert done.stdout == "loud: unloaded from a, b; what runs with it ends by itself\n"
    done = adapter("unload", "m", "loud", endpoint=endpoint)
    assert (done.returncode, done.stderr) == (1, "loopmux: model 'm' has no adapter 'loud', loaded are: own\n")
