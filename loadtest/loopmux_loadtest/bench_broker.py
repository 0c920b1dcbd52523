"""What the broker costs: ``python -m loopmux_loadtest.bench_broker`` prints one JSON line per case.

A real broker process, an echo worker process that does nothing but speak the wire, and callers in this process that do
the same, all over ipc. Nothing of the client or the engine is measured.

- ``round_trip``: one request of one token, from SUBMIT to END, through the broker and over a direct DEALER-ROUTER pair
  to the same worker loop; alternating rounds, medians over the rounds.
- ``chunk_cpu``: processor time of the broker process per forwarded chunk (TOK of 8 tokens), when the worker sends as
  fast as it can, and paced at 2 000 a second, where nearly every chunk wakes two threads and that is most of its cost.
- ``callers``: requests per second, and chunks per second, with 64 requests always under way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from loopmux import codec, wire
from loopmux.messages import End, Hello, Register, ServedModel, Submit, Tok, Welcome
from loopmux.results import Timing, Usage
from loopmux.wire import Header, Kind, Message

CHUNK = 8
"""Tokens of one TOK: what a worker sends at most at once (docs/protocol.md)."""
CALLERS = 64
PACE = 2000
"""Chunks a second of the paced case: 40 streams of 50 chunks a second, a busy worker."""
WINDOW = 1024
PATIENCE = 20_000
"""Milliseconds without any message after which the benchmark gives up."""

_TOK_BODY = codec.pack(Tok("some words of text, as eight tokens are "))
_IDS = wire.pack_tokens(list(range(CHUNK)))
_END_BODY = codec.pack(End("stop", Usage(10, 10), Timing(), "echo", "bench"))


# --- the worker's side: a process of its own --------------------------------------------------------------------------


@dataclass
class Job:
    """What one request still wants: chunks, each of ``width`` tokens."""

    prefix: list[bytes]
    header: Header
    chunks: int
    width: int
    sent: int = 0


@dataclass
class Echo:
    """Answers RUN (of a broker) or SUBMIT (of a caller) with as many chunks as the body asks for."""

    socket: zmq.Socket[bytes]
    jobs: dict[bytes, Job] = field(default_factory=dict)
    pace: float = 0.0

    def serve(self) -> None:
        """Run until killed. Streams take turns, so that many are under way at once."""
        beat = time.monotonic()
        while True:
            while self.socket.poll(0 if self.jobs else 200):
                self._receive(self.socket.recv_multipart())
            if time.monotonic() > beat + 0.5:
                beat = time.monotonic()
                if self.socket.type == zmq.DEALER:
                    self.socket.send_multipart(wire.to_frames(Message(Header(Kind.HB), route=codec.pack({}))))
            for job in list(self.jobs.values()):
                self._step(job)

    def _receive(self, frames: list[bytes]) -> None:
        prefix = frames[:1] if self.socket.type == zmq.ROUTER else []
        message = wire.from_frames(frames[len(prefix) :])
        if message.kind not in (Kind.RUN, Kind.SUBMIT):
            return
        wish = codec.decode(message.body, codec.ROUTE_LIMITS)
        if message.kind is Kind.RUN:
            self._send([], Message(Header(Kind.RUNACK, message.header.request, attempt=message.header.attempt)))
        self.jobs[message.header.request] = Job(prefix, message.header, wish["chunks"], wish["width"])
        self.pace = 1 / wish["rate"] if wish["rate"] else 0.0

    def _step(self, job: Job) -> None:
        request, attempt = job.header.request, job.header.attempt
        position = job.sent * job.width
        if job.sent < job.chunks:
            header = Header(Kind.TOK, request, position, job.width, attempt)
            self._send(job.prefix, Message(header, body=_TOK_BODY, tokens=_IDS[: 4 * job.width]))
            job.sent += 1
            if self.pace:
                _sleep_exactly(self.pace)
            if job.sent < job.chunks:
                return
            position += job.width
        self._send(job.prefix, Message(Header(Kind.END, request, position, attempt=attempt), body=_END_BODY))
        del self.jobs[request]

    def _send(self, prefix: list[bytes], message: Message) -> None:
        self.socket.send_multipart([*prefix, *wire.to_frames(message)])


def _sleep_exactly(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(left / 2 if left > 0.0002 else 0)


def _work(endpoint: str, direct: bool) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER if direct else zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 100_000)
    if direct:
        socket.bind(endpoint)
    else:
        socket.connect(endpoint)
        served = (ServedModel("echo", "f"),)
        register = Register("worker", "bench", wire.new_id(), wire.VERSIONS, models=served, slots=CALLERS)
        socket.send_multipart(wire.to_frames(Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({}))))
        socket.recv_multipart()
    Echo(socket).serve()


# --- the callers' side ------------------------------------------------------------------------------------------------


class Caller:
    """A connection with any number of requests under way."""

    def __init__(self, endpoint: str, *, introduce: bool) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 100_000)
        self.socket.connect(endpoint)
        self.introduced = introduce
        if introduce:
            hello = Message(Header(Kind.HELLO), route=codec.pack(Hello(wire.VERSIONS, wire.new_id())))
            self.socket.send_multipart(wire.to_frames(hello))
            codec.unpack(Welcome, self._receive()[1])

    def _receive(self) -> list[bytes]:
        if not self.socket.poll(PATIENCE):
            raise SystemExit("nothing came for 20 s: the broker or the worker is gone")
        frames: list[bytes] = self.socket.recv_multipart()
        return frames

    def submit(self, chunks: int, width: int, rate: int = 0) -> None:
        """Ask for a stream."""
        body = codec.pack({"chunks": chunks, "width": width, "rate": rate})
        header = Header(Kind.SUBMIT, wire.new_id())
        self.socket.send_multipart(wire.to_frames(Message(header, _ROUTE, body)))

    def run(self, requests: int, chunks: int, width: int, *, rate: int = 0, at_once: int = CALLERS) -> None:
        """That many requests, ``at_once`` of them under way."""
        for _ in range(min(requests, at_once)):
            self.submit(chunks, width, rate)
        begun, done = min(requests, at_once), 0
        while done < requests:
            header = wire.unpack_header((self._receive())[0])
            if header.kind is Kind.TOK:
                self._credit(header)
            elif header.kind is Kind.END:
                done += 1
                self._say(Kind.ENDACK, header.request)
                if begun < requests:
                    begun += 1
                    self.submit(chunks, width, rate)
            elif header.kind in wire.TERMINALS:
                raise SystemExit(f"a request ended with {header.kind.name}")

    def _credit(self, header: Header) -> None:
        received = header.seq + header.arg
        if received % (WINDOW // 2) < header.arg:  # as the client does: when half the window was used
            self._say(Kind.CREDIT, header.request, received + WINDOW, received)

    def _say(self, kind: Kind, request: bytes, seq: int = 0, arg: int = 0) -> None:
        if self.introduced:
            self.socket.send_multipart([wire.pack_header(Header(kind, request, seq, arg))])

    def close(self) -> None:
        """Let the connection go."""
        self.socket.close(0)


_ROUTE = codec.pack(Submit("echo"))


# --- cases ------------------------------------------------------------------------------------------------------------


def _processor_time(process: int) -> float:
    """Seconds of processor time of all threads of a process so far, from the scheduler (nanoseconds)."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _trips(caller: Caller, count: int) -> list[float]:
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        caller.run(1, 1, 1, at_once=1)
        times.append(1000 * (time.perf_counter() - begun))
    return sorted(times)


def round_trip(direct: Caller, brokered: Caller, rounds: int, count: int) -> dict[str, Any]:
    """Milliseconds from SUBMIT to END of one token."""
    found: dict[str, list[float]] = {"direct_p50": [], "direct_p99": [], "broker_p50": [], "broker_p99": []}
    for _ in range(rounds):
        for name, caller in (("direct", direct), ("broker", brokered)):
            times = _trips(caller, count)
            found[f"{name}_p50"].append(times[len(times) // 2])
            found[f"{name}_p99"].append(times[len(times) * 99 // 100])
    medians = {name: round(statistics.median(values), 3) for name, values in found.items()}
    return {"case": "round_trip", "unit": "ms", **medians, "added_p50": _added(medians)}


def _added(medians: dict[str, float]) -> float:
    return round(medians["broker_p50"] - medians["direct_p50"], 3)


def chunk_cpu(broker: int, caller: Caller, rounds: int, scale: float, *, rate: int) -> dict[str, Any]:
    """Microseconds of the broker's processor time per forwarded chunk."""
    streams, chunks = (40, int(100 * scale)) if rate else (CALLERS, int(1000 * scale))
    costs, rates = [], []
    for _ in range(rounds):
        spent, begun = _processor_time(broker), time.perf_counter()
        caller.run(streams, chunks, CHUNK, rate=rate)
        rates.append(streams * chunks / (time.perf_counter() - begun))
        costs.append(1e6 * (_processor_time(broker) - spent) / (streams * chunks))
    cost, speed = round(statistics.median(costs), 2), round(statistics.median(rates))
    return {"case": "chunk_cpu", "paced": bool(rate), "us_per_chunk": cost, "chunks_per_s": speed}


def callers(broker: int, caller: Caller, rounds: int, requests: int) -> dict[str, Any]:
    """Requests of one token per second with 64 callers."""
    rates, costs = [], []
    for _ in range(rounds):
        spent, begun = _processor_time(broker), time.perf_counter()
        caller.run(requests, 1, 1)
        rates.append(requests / (time.perf_counter() - begun))
        costs.append(1e6 * (_processor_time(broker) - spent) / requests)
    speed, cost = round(statistics.median(rates)), round(statistics.median(costs), 1)
    return {"case": "callers", "callers": CALLERS, "requests_per_s": speed, "us_per_request": cost}


@contextlib.contextmanager
def _started(*arguments: str, ready: bool = False) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-m", *arguments], stderr=subprocess.PIPE if ready else None, text=True)
    try:
        if ready and process.stderr is not None and "ready" not in (line := process.stderr.readline()):
            raise SystemExit(f"the broker did not start: {line}{process.stderr.read()}")
        yield process
    finally:
        process.terminate()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _all_cases(folder: str, rounds: int, scale: float) -> Iterator[dict[str, Any]]:
    front, back, direct = (f"ipc://{folder}/{name}" for name in ("front", "back", "direct"))
    this = "loopmux_loadtest.bench_broker"
    with (
        _started("loopmux_broker", "--endpoint", front, "--worker-endpoint", back, ready=True) as broker,
        _started(this, "--worker", back),
        _started(this, "--worker", direct, "--direct"),
        contextlib.closing(Caller(front, introduce=True)) as brokered,
        contextlib.closing(Caller(direct, introduce=False)) as straight,
    ):
        _await_model(brokered)
        straight.run(100, 1, 1)
        yield round_trip(straight, brokered, rounds, int(2000 * scale))
        yield chunk_cpu(broker.pid, brokered, rounds, scale, rate=0)
        yield chunk_cpu(broker.pid, brokered, rounds, scale, rate=PACE)
        yield callers(broker.pid, brokered, rounds, int(20_000 * scale))


def _await_model(caller: Caller) -> None:
    """Wait until the worker has joined: until then the broker knows no such model."""
    while True:
        caller.submit(1, 1)
        while (kind := wire.unpack_header(caller.socket.recv_multipart()[0]).kind) not in wire.TERMINALS:
            pass
        if kind is Kind.END:
            return
        time.sleep(0.05)


def main() -> None:
    """Run every case and print it."""
    parser = argparse.ArgumentParser(description="Measure what the broker costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the runs, 1 for about a minute")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker, options.direct)
        return
    versions = {"python": sys.version.split()[0], "pyzmq": zmq.__version__, "libzmq": zmq.zmq_version()}
    with tempfile.TemporaryDirectory() as folder:
        for case in _all_cases(folder, options.rounds, options.scale):
            print(json.dumps({**case, **versions, "cores": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    main()
