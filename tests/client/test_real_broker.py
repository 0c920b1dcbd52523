"""The client against the real broker and real workers with the echo engine, each its own process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import loopmux
from brokerwire import Peer
from fakebroker import PATIENCE, wait_until
from loopmux import codec, wire
from loopmux.messages import Failure, Submit
from loopmux.wire import Header, Kind, Message
from loopmux_worker.engine.echo import echo_token

ENDLESS = 10_000_000


@dataclass
class Stack:
    endpoint: str
    folder: Path
    broker: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]


def start(folder: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, "--parent-pid", str(os.getpid()), *arguments]
    with (folder / f"{module}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def start_broker(folder: Path, endpoint: str) -> subprocess.Popen[bytes]:
    return start(folder, "loopmux_broker", "--endpoint", endpoint)


def start_worker(folder: Path, endpoint: str, model: str, name: str = "", **echo: float) -> subprocess.Popen[bytes]:
    file = folder / f"{name or model}.json"
    spec = {"name": name or model, "endpoint": f"{endpoint}.work", "models": [{"id": model}], "engine": "echo"}
    file.write_text(json.dumps({**spec, "echo": {"tokens": ENDLESS, **echo}}))
    return start(folder, "loopmux_worker", "--spec", str(file))


def serving(client: loopmux.Client) -> bool:
    return {model.id for model in client.models() if model.workers} == {"echo", "paced"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("s")
    endpoint = f"ipc://{folder / 'b'}"
    workers = [start_worker(folder, endpoint, "echo"), start_worker(folder, endpoint, "paced", rate=2000)]
    running = Stack(endpoint, folder, start_broker(folder, endpoint), workers)
    try:
        with loopmux.Client(endpoint, connect_timeout=PATIENCE) as client:
            wait_until(lambda: serving(client), "both workers joined")
        yield running
    finally:
        for process in (*running.workers, running.broker):
            process.kill()  # how they stop when asked is tested where they live
            process.wait(10)


@pytest.fixture
def client(stack: Stack) -> Iterator[loopmux.Client]:
    with loopmux.Client(stack.endpoint, model="echo") as c:
        yield c


def test_long_and_short_answers_from_many_threads(client: loopmux.Client) -> None:
    def one(i: int) -> bool:
        total = 2000 if i % 20 == 0 else 5 + i
        with client.stream("x", max_new_tokens=total) as stream:
            deltas = [e for e in stream if isinstance(e, loopmux.TextDelta)]
        ids = tuple(token for d in deltas for token in d.token_ids)
        return stream.result.token_ids == ids and len(ids) == total and stream.text == stream.result.text

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(60)))


def test_many_tasks(stack: Stack) -> None:
    async def main() -> list[int]:
        async with loopmux.AsyncClient(stack.endpoint, model="echo") as client:
            results = await asyncio.gather(*(client.generate("x", max_new_tokens=9 + i) for i in range(80)))
            return [r.usage.completion_tokens for r in results]

    assert asyncio.run(main()) == [9 + i for i in range(80)]


def test_leaving_cancels_in_the_engine(client: loopmux.Client) -> None:
    with client.stream("x", max_new_tokens=ENDLESS) as stream:
        next(stream)
    wait_until(lambda: client.status().running == 0, "the broker runs nothing")


def test_cancel_deadline_and_refusals(client: loopmux.Client) -> None:
    with client.stream("x", max_new_tokens=ENDLESS) as stream:
        next(stream)
        stream.cancel()
        with pytest.raises(loopmux.CancelledError) as cancelled:
            list(stream)
    assert cancelled.value.partial_text == stream.text != ""
    with pytest.raises(loopmux.DeadlineExceededError) as late:
        client.generate("x", model="paced", max_new_tokens=ENDLESS, timeout=2.0)
    assert late.value.partial_text
    with pytest.raises(loopmux.ModelNotFoundError, match="nope"):
        client.generate("x", model="nope")


def test_an_argument_of_a_megabyte_reaches_its_tool_and_the_loop_goes_on(client: loopmux.Client) -> None:
    big, got = "é" * 500_000, []

    def keep(text: str) -> str:
        got.append(text)
        return "kept"

    script = f"!call keep {json.dumps({'text': big}, ensure_ascii=False)}\n!say done"
    out = client.run_tools(script, tools=[keep], max_new_tokens=ENDLESS)
    assert got == [big]
    assert out.text == "done"


def test_a_request_that_is_nested_without_end_is_refused_and_ends_nobody(stack: Stack, client: loopmux.Client) -> None:
    deep = b"\x91" * 1000 + b"\xc0"
    with Peer(stack.endpoint) as peer:
        peer.hello()
        for field in (b"\xa6prompt", b"\xa8messages\x91\x81\xa7content"):
            request = wire.new_id()
            peer.send(Message(Header(Kind.SUBMIT, request), codec.pack(Submit("echo")), b"\x81" + field + deep))
            assert codec.unpack(Failure, peer.expect(Kind.ERROR).body).code == "bad_request"
        peer.send(Message(Header(Kind.SUBMIT, wire.new_id()), b"\x81\xa5model" + deep, b"\x80"))
        assert codec.unpack(Failure, peer.expect(Kind.ERROR).body).code == "protocol"
    status = client.status()
    assert [status.counters.get(name, 0) for name in ("workers_lost", "requeued", "internal_errors")] == [0, 0, 0]
    assert [worker.poll() for worker in stack.workers] == [None, None]
    assert client.generate("x", max_new_tokens=3).usage.completion_tokens == 3


def test_one_turn_with_a_tool_and_a_whole_loop(client: loopmux.Client) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    script = '!call add {"a": 12, "b": 30}\n!say done'
    turn = client.chat([{"role": "user", "content": script}], tools=[add])
    assert turn.finish_reason == "tool_calls"
    assert [(c.name, c.arguments) for c in turn.tool_calls] == [("add", {"a": 12, "b": 30})]
    loop = client.run_tools(script, tools=[add])
    assert loop.text == "done"
    assert any(m.get("role") == "tool" and "42" in m["content"] for m in loop.messages)


def test_a_whole_loop_in_asyncio(stack: Stack) -> None:
    async def twice(number: int) -> int:
        """Double a number."""
        return 2 * number

    async def main() -> list[str]:
        async with loopmux.AsyncClient(stack.endpoint, model="echo") as client:
            script = '!call twice {"number": 4}\n!say fine'
            kinds = [type(event).__name__ async for event in client.iter_tools(script, tools=[twice])]
            assert (await client.run_tools(script, tools=[twice])).text == "fine"
            return kinds

    kinds = asyncio.run(main())
    assert kinds[0] == "TurnStarted"
    assert kinds[-1] == "LoopFinished"


def test_a_killed_broker_is_survived(stack: Stack, client: loopmux.Client) -> None:
    # at a pace that a client on a busy machine keeps, or it is cut off as one that never reads
    with client.stream("x", model="paced", max_new_tokens=ENDLESS) as stream:
        next(stream)
        stack.broker.send_signal(signal.SIGKILL)
        stack.broker.wait()
        before = len(stream.text.split())
        stack.broker = start_broker(stack.folder, stack.endpoint)
        for event in stream:
            if isinstance(event, loopmux.TextDelta) and event.position > before + 2_000:  # more than was under way
                break
    assert client.generate("x", max_new_tokens=3).usage.completion_tokens == 3
    assert client.status().counters["recovered"] == 1


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Stack]:
    """Two workers of one model."""
    endpoint = f"ipc://{tmp_path / 'b'}"
    workers = [start_worker(tmp_path, endpoint, "paced", name, rate=200) for name in ("one", "two")]
    running = Stack(endpoint, tmp_path, start_broker(tmp_path, endpoint), workers)
    try:
        with loopmux.Client(endpoint, connect_timeout=PATIENCE) as client:
            wait_until(lambda: len(client.status().workers) == 2, "both workers joined")
        yield running
    finally:
        for process in (*running.workers, running.broker):
            process.kill()
            process.wait(10)


def drain(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loopmux", "drain", *arguments, "--endpoint", stack.endpoint]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_an_administrator_drains_a_worker_under_its_running_streams(pair: Stack) -> None:
    with loopmux.Client(pair.endpoint, model="paced") as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.generate, "x", max_new_tokens=1200) for _ in range(8)]
        wait_until(lambda: [w.running for w in client.status().workers] == [4, 4], "both run four")
        done = drain(pair, "one", "--within", "0.5")  # the streams take six seconds, and the command has to start
        assert done.returncode == 0, done.stderr
        first, *_, last = done.stdout.splitlines()
        assert (first, last.startswith("one has left after ")) == ("one: 4 running", True), done.stdout
        assert pair.workers[0].wait(PATIENCE) == 0
        results = [answer.result(60) for answer in answers]
        status = client.status()
    for result in results:
        request = bytes.fromhex(result.request_id)
        assert result.token_ids == tuple(echo_token(request, i) for i in range(1200))
    assert sorted(result.attempts for result in results) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert {name: status.counters.get(name, 0) for name in ("migrated", "requeued", "workers_left")} == {
        "migrated": 4,
        "requeued": 0,
        "workers_left": 1,
    }


def test_who_may_drain_and_what(pair: Stack) -> None:
    done = drain(pair, "nobody")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "loopmux: worker: found 'nobody', expected one of one, two\n"
    with loopmux.Client(pair.endpoint) as client, pytest.raises(loopmux.ProtocolError, match="may not send EVICT"):
        client.drain("one")
    done = drain(pair, "two")  # which runs nothing
    assert done.returncode == 0, done.stderr
    assert pair.workers[1].wait(PATIENCE) == 0
