"""What docs/protocol.md says is enough for a client: one that was written from it, against a real broker and worker."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq

from plainclient import ATTACH, CANCEL, CANCELLED, CREDIT, END, ERROR, HELLO, Client, Request

WINDOW, ENDLESS = 32, 1_000_000


@dataclass
class Stack:
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.folder / 'b'}"

    def start(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, "--parent-pid", str(os.getpid()), *arguments]
        with (self.folder / f"{module}.log").open("ab") as log:
            self.processes[module] = subprocess.Popen(command, stdout=log, stderr=log)

    def start_broker(self) -> None:
        (self.folder / "broker.yaml").write_text(f"window: {WINDOW}\ngrace: 1.0")
        self.start("loopmux_broker", "--config", str(self.folder / "broker.yaml"), "--endpoint", self.endpoint)

    def start_worker(self) -> None:
        spec = {"name": "w", "endpoint": f"{self.endpoint}.work", "models": [{"id": "echo"}], "engine": "echo"}
        (self.folder / "spec.json").write_text(json.dumps(spec | {"echo": {"tokens": ENDLESS, "rate": 1000}}))
        self.start("loopmux_worker", "--spec", str(self.folder / "spec.json"))

    def kill(self, module: str) -> None:
        process = self.processes.pop(module)
        process.send_signal(signal.SIGKILL)
        process.wait(10)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("p"))
    running.start_broker()
    running.start_worker()
    yield running
    for module in list(running.processes):
        running.kill(module)


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    made = Client(stack.endpoint)
    try:
        made.until(lambda: any(model.get("workers") for model in made.status().get("models", ())))
        yield made
    finally:
        made.close()


def echoed(request: Request) -> bytes:
    """The ids that the echo worker gives a request: two bytes of a hash of id and position, modulo its vocabulary."""
    hashes = (hashlib.blake2b(request.id + i.to_bytes(8), digest_size=2).digest() for i in range(request.received))
    return b"".join((int.from_bytes(two) % 4096).to_bytes(4) for two in hashes)


def test_a_stream_that_is_longer_than_its_credit(client: Client) -> None:
    request = client.start("echo", prompt="hello", max_new_tokens=400)
    kind, end = client.finish(request)
    assert (kind, end["finish_reason"], request.received, request.ids) == (END, "length", 400, echoed(request))
    assert end["usage"]["completion_tokens"] == len(request.text.split()) == 400
    assert client.sent[CREDIT] >= 400 // WINDOW


def test_a_reader_that_pauses_is_sent_no_more_than_its_credit(client: Client) -> None:
    request = client.start("echo", prompt="hello", max_new_tokens=200)
    request.paused = True
    client.until(lambda: request.received > WINDOW - 8)  # a TOK of up to 8 tokens that crosses the limit waits
    end = time.monotonic() + 1.0
    client.until(lambda: time.monotonic() > end)
    assert request.received <= WINDOW
    request.paused = False
    client.take(request)
    assert client.finish(request)[0] == END
    assert request.ids == echoed(request)


def test_cancel_in_mid_stream(client: Client) -> None:
    request = client.start("echo", prompt="hello", max_new_tokens=ENDLESS)
    client.until(lambda: request.received > WINDOW)
    client.cancel(request)
    kind, failure = client.finish(request)
    assert (kind, failure["code"]) == (CANCELLED, "cancelled")
    client.until(lambda: client.status()["running"] == 0)


def test_refusals(client: Client) -> None:
    client.until(lambda: client.status().get("settled", True))
    kind, failure = client.finish(client.start("nope", prompt="hello"))
    assert (kind, failure["code"]) == (ERROR, "model_not_found")
    assert client.finish(client.start("echo"))[1]["code"] == "bad_request"
    assert (
        client.finish(client.start("echo", prompt="hello", max_new_tokens=ENDLESS, timeout=0.3))[1]["code"]
        == "deadline"
    )


def test_a_refusal_of_what_was_said_twice_is_followed_by_cancel(client: Client) -> None:
    client.until(lambda: client.status().get("settled", True))
    request = client.start("nope", prompt="hello")
    client.submit(request)
    assert client.finish(request)[0] == ERROR
    assert client.sent[CANCEL] == 1


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the broker has given it up"])
def test_a_client_that_comes_back_over_another_connection(stack: Stack, client: Client, late: bool) -> None:
    request = client.start("echo", prompt="hello", max_new_tokens=600)
    client.until(lambda: request.received > WINDOW)
    client.socket.disconnect(stack.endpoint)
    if late:
        other = Client(stack.endpoint)
        while other.status()["tables"]["requests"]:
            # ØMQ closes the connection in its own time, with the help of such calls.
            client.socket.getsockopt(zmq.EVENTS)
        other.close()
    client.socket.connect(stack.endpoint)
    assert client.finish(request)[0] == END
    assert (request.received, request.ids, len(request.text.split())) == (600, echoed(request), 600)
    assert client.sent[HELLO] > 1
    assert bool(client.sent[ATTACH]) == late


@pytest.mark.parametrize("with_its_worker", [False, True], ids=["broker", "broker and worker"])
def test_a_broker_that_is_killed_and_started_again(stack: Stack, client: Client, with_its_worker: bool) -> None:
    request = client.start("echo", prompt="hello", max_new_tokens=2000)
    client.until(lambda: request.received > WINDOW)
    stack.kill("loopmux_broker")
    if with_its_worker:
        stack.kill("loopmux_worker")
        stack.start_worker()
    before = request.received
    stack.start_broker()
    assert client.finish(request)[0] == END
    assert (request.received, request.ids, len(request.text.split())) == (2000, echoed(request), 2000)
    assert client.sent[ATTACH] >= 1
    assert before > 0
    assert request.attempt == (2 if with_its_worker else 1)
