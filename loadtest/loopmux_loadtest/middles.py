"""What stands in the middle: our broker, what ØMQ alone can do, and HTTP servers; started, measured, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq

from loopmux import keys
from loopmux_loadtest.ends import PATIENCE, Callers, HttpCallers, WireCallers
from loopmux_loadtest.stopping import times

_OURS = ("--parent-pid", str(os.getpid()))
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Middle:
    """Something running that callers can be connected to.

    Attributes:
        forwards: the process that passes messages on; None where the answer is made in the same one.
        serves: all processes of the server's side, without their children.
    """

    name: str
    address: str
    serves: list[int]
    forwards: int | None = None
    port: int = 0

    def callers(self, connections: int) -> Callers:
        """Connect so many callers."""
        if self.port:
            return HttpCallers(self.port, connections)
        return WireCallers(self.address, connections, introduce=self.name == "loopmux")

    def processor_time(self) -> float:
        """Seconds of processor time of everything on the server's side."""
        return sum(processor_time(process) for process in _with_children(self.serves))

    def memory(self) -> float:
        """Resident MiB of what forwards, or of everything on the server's side where that is one."""
        processes = [self.forwards] if self.forwards else _with_children(self.serves)
        return sum(resident(process) for process in processes)


def processor_time(process: int) -> float:
    """Seconds of processor time of all threads of a process so far, from the scheduler (nanoseconds)."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def resident(process: int) -> float:
    """Resident MiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE / 2**20


def _with_children(processes: list[int]) -> list[int]:
    found = list(processes)
    for process in found:  # grows while it is walked
        for task in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


@contextlib.contextmanager
def program(
    *command: str, ready: bool = False, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process for as long as the block runs; ``ready``: from its first line of log on, which has that word."""
    errors = subprocess.PIPE if ready else None
    process = subprocess.Popen(command, stderr=errors, text=True, start_new_session=True, env=variables)
    try:
        if ready and process.stderr is not None and "ready" not in (line := process.stderr.readline()):
            raise SystemExit(f"{' '.join(command)} did not start: {line}{process.stderr.read()}")
        yield process
    finally:
        family = _with_children([process.pid])
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, 9)
        if process.stderr is not None:
            process.stderr.close()


def _module(
    *arguments: str, ready: bool = False, variables: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return program(sys.executable, "-m", *arguments, ready=ready, variables=variables)


def broker(front: str, back: str, *options: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Our broker, for clients in front and workers at the back."""
    return _module("loopmux_broker", "--endpoint", front, "--worker-endpoint", back, *options, *_OURS, ready=True)


def _worker(
    endpoint: str, how: str, variables: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """The echo worker; see ``ends.work``."""
    return _module("loopmux_loadtest.ends", endpoint, how, ready=how == "joined", variables=variables)


@contextlib.contextmanager
def _joined(front: str, back: str, *options: str, variables: Mapping[str, str] | None = None) -> Iterator[Middle]:
    with broker(front, back, *options) as ours, _worker(back, "joined", variables) as worker:
        _, serving = _with_children([ours.pid])
        yield Middle("loopmux", front, [ours.pid, worker.pid], serving)


@contextlib.contextmanager
def loopmux(folder: str) -> Iterator[Middle]:
    """Our broker and one echo worker that joined it."""
    with _joined(f"ipc://{folder}/front", f"ipc://{folder}/back") as middle:
        yield _answering(middle)


def tcp(folder: str, *, keyed: bool) -> contextlib.AbstractContextManager[Middle]:
    """As ``loopmux``, over tcp: in the clear, or with keys ``broker`` and ``bench`` of the folder, for both sides."""
    front, back = (f"tcp://127.0.0.1:{_free_port()}" for _ in range(2))
    settings, variables = Path(folder, f"keyed-{keyed}.yaml"), dict(os.environ)
    settings.write_text("{}")
    if keyed:
        public = keys.read(Path(folder, "bench.key")).public
        names = {"client_keys": {"bench": public}, "worker_keys": {"bench": public}}
        settings.write_text(json.dumps({"key": "broker.key", **names}))  # JSON is YAML
        variables |= {keys.KEY_VARIABLE: f"{folder}/bench.key", keys.SERVER_KEY_VARIABLE: f"{folder}/broker.key"}
    return _joined(front, back, "--config", str(settings), variables=variables)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def direct(folder: str) -> Iterator[Middle]:
    """Nothing in the middle: callers are connected to the worker."""
    endpoint = f"ipc://{folder}/direct"
    with _worker(endpoint, "direct") as worker:
        yield _answering(Middle("direct", endpoint, [worker.pid]))


@contextlib.contextmanager
def passing(folder: str, how: str) -> Iterator[Middle]:
    """A ROUTER and a DEALER that pass everything on: ``zmq.proxy`` in C, or a ``poller`` in Python."""
    front, back = f"ipc://{folder}/{how}-front", f"ipc://{folder}/{how}-back"
    with _module("loopmux_loadtest.middles", how, front, back) as middle, _worker(back, "behind") as worker:
        yield _answering(Middle(how, front, [middle.pid, worker.pid], middle.pid))


@contextlib.contextmanager
def server(python: str, name: str) -> Iterator[Middle]:
    """An HTTP server of a peer, run by the Python that has it."""
    port = _free_port()
    option = ["--port"] if name == "mosec" else []
    with program(python, str(Path(__file__).with_name(f"peer_{name}.py")), *option, str(port)) as running:
        _await_answer(port, running)
        yield _answering(Middle(name, f"http://127.0.0.1:{port}", [running.pid], port=port))


def _answering(middle: Middle) -> Middle:
    """Wait until a first request has been answered."""
    with contextlib.closing(middle.callers(1)) as callers:
        callers.run(times(1), 0, at_once=1)
    return middle


def _await_answer(port: int, running: subprocess.Popen[str]) -> None:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/echo", b'{"text": ""}', {"Content-Type": "application/json"}
    )
    end = time.monotonic() + 3 * PATIENCE
    while True:
        try:
            urllib.request.urlopen(asked, timeout=PATIENCE).close()  # noqa: S310 - the URL is ours
            return
        except OSError as error:
            if running.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the peer does not answer on port {port} ({error}): {running.args!r}") from error
            time.sleep(0.1)


def _pass_on(how: str, front: str, back: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    callers, workers = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for one, endpoint in ((callers, front), (workers, back)):
        one.setsockopt(zmq.SNDHWM, 100_000)
        one.setsockopt(zmq.RCVHWM, 100_000)
        one.bind(endpoint)
    if how == "proxy":
        zmq.proxy(callers, workers)
    poller = zmq.Poller()
    poller.register(callers, zmq.POLLIN)
    poller.register(workers, zmq.POLLIN)
    other = {callers: workers, workers: callers}
    while True:
        for ready, _ in poller.poll():
            assert isinstance(ready, zmq.Socket)
            for _ in range(64):
                try:
                    other[ready].send_multipart(ready.recv_multipart(zmq.NOBLOCK))
                except zmq.Again:
                    break


if __name__ == "__main__":
    _pass_on(*sys.argv[1:])
