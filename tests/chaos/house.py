"""A broker and its workers as real processes, each followed by another one when it ends, as users have it.

The broker that serves is a child of the program that is started, which forks the next one by itself. A worker is
started again as soon as a launcher may do so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

import loopmux
from chaos.line import Line
from loopmux import keys
from loopmux.keys import KEY_VARIABLE, SERVER_KEY_VARIABLE
from loopmux.listening import Listening
from loopmux.messages import Status
from loopmux_launcher.backoff import FIRST_DELAY

MODEL = "echo"
FAST = "fast"
"""The model that bad neighbours use: more than any of them takes."""
READY_LIMIT = 120.0
"""Seconds until everything serves; loading torch three times on a busy machine takes most of it."""
_EMPTY_LIMIT = 40.0
"""Seconds after the last client's goodbye in which the tables must have emptied. What a worker brings a broker that was
started again, and whose client has left meanwhile, is kept for 30."""
_AGAIN = FIRST_DELAY / 2
"""Seconds before a process is started again, the fewest that a launcher waits."""
_VARIABLES = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": os.pathsep.join(sys.path)}
"""Programs that are installed have been compiled; those of a checkout are with the first start, not with each."""


@dataclass
class Part:
    """One process that is always there: whoever kills it gets another one.

    ``kept``: what serves is a child of the process that is started.
    """

    name: str
    command: list[str]
    log: Path
    process: asyncio.subprocess.Process | None = None
    ends: int = 0
    killed: int = 0
    inherits: tuple[int, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    kept: bool = False
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Keep it running from now on."""
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            with self.log.open("ab") as log:
                self.process = await asyncio.create_subprocess_exec(
                    *self.command, stdout=log, stderr=log, env=_VARIABLES | self.variables, pass_fds=self.inherits
                )
            await self.process.wait()
            self.ends += 1
            await asyncio.sleep(_AGAIN)

    @property
    def pid(self) -> int:
        """The process that serves at present."""
        assert self.process is not None, f"{self.name} was never started"
        if not self.kept:
            return self.process.pid
        children = psutil.Process(self.process.pid).children()
        if not children:
            raise psutil.NoSuchProcess(self.process.pid, msg=f"{self.name} has no child at present")
        return int(children[0].pid)

    @property
    def deaths(self) -> int:
        """How often it has ended."""
        return self.ends + (self.log.read_text().count("again=True") if self.kept else 0)

    def signal(self, number: int) -> None:
        """Send it a signal; SIGKILL is remembered as ours."""
        self.killed += number == signal.SIGKILL
        os.kill(self.pid, number)

    def thaw(self) -> None:
        """Let it go on if it was stopped."""
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(self.pid, signal.SIGCONT)

    def memory(self) -> float:
        """Resident MiB; 0 while there is no process."""
        try:
            return float(psutil.Process(self.pid).memory_info().rss) / 2**20
        except psutil.NoSuchProcess:
            return 0.0

    async def stop(self) -> None:
        """Do not keep it any longer, and end it."""
        assert self._task is not None
        self._task.cancel()
        if self.process is not None and self.process.returncode is None:
            self.thaw()
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), 10)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()


class House:
    """The processes, and a client of our own that asks the broker how it is.

    ``specs`` are what the workers' specifications have beside name and endpoint (``WorkerSpec``), ``settings`` what the
    broker's file has. ``keyed``: over tcp with keys, else over ipc. ``far``: over tcp, too, and through the lines
    ``front`` (clients) and ``back`` (workers).
    """

    def __init__(
        self,
        specs: Sequence[dict[str, Any]],
        settings: dict[str, Any] | None = None,
        *,
        keyed: bool = False,
        far: bool = False,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lmx-"))  # short: socket paths are limited
        front, back = (
            ("tcp://127.0.0.1:0",) * 2 if keyed or far else (f"ipc://{self.folder / name}" for name in ("b", "b.work"))
        )
        # they are ours, as a service manager's: connections wait while the broker is started again
        self._listening = {"clients": Listening(front, keyed=keyed), "workers": Listening(back, keyed=keyed)}
        self.endpoint, self.worker_endpoint = near = tuple(one.endpoint for one in self._listening.values())
        self.lines = [Line(endpoint) for endpoint in near] if far else []
        if self.lines:
            self.endpoint, self.worker_endpoint = (line.endpoint for line in self.lines)
        self._keys: dict[str, str] = {}
        if keyed:
            settings = (settings or {}) | self._make_keys()
        handed = [word for who, one in self._listening.items() for word in ("--listen-fd", f"{who}={one.fileno()}")]
        self.broker = self._part("broker", "loopmux_broker", *handed, *self._config(settings))
        self.broker.kept = True
        self.broker.inherits = tuple(one.fileno() for one in self._listening.values())
        self.workers = [self._worker(f"w{n}", spec) for n, spec in enumerate(specs)]
        # one connection for all questions: to make one anew each time would cost the callers, whose process this is
        self._client = loopmux.AsyncClient(near[0], connect_timeout=READY_LIMIT, **self._keys)

    def client(self, **options: Any) -> loopmux.AsyncClient:
        """A client of the broker, with the key that it needs."""
        return loopmux.AsyncClient(self.endpoint, **self._keys, **options)

    @property
    def front(self) -> Line:
        """The line between clients and broker."""
        return self.lines[0]

    @property
    def back(self) -> Line:
        """The line between workers and broker."""
        return self.lines[1]

    def _make_keys(self) -> dict[str, Any]:
        """One for the broker, one for everybody else; the broker's settings with both."""
        (broker, server), (other, shown) = (keys.new(name, self.folder) for name in ("broker", "other"))
        self._keys = {"key": str(other), "server_key": server.public}
        known = {"other": shown.public}
        return {"key": str(broker), "client_keys": known, "worker_keys": known}

    def _config(self, settings: dict[str, Any] | None) -> list[str]:
        if settings is None:
            return []
        file = self.folder / "broker.yaml"
        file.write_text(json.dumps(settings))  # JSON is YAML
        return ["--config", str(file)]

    def _part(self, name: str, module: str, *arguments: str) -> Part:
        # the parent: a run that is killed leaves nothing behind
        command = [sys.executable, "-m", module, *arguments, "--parent-pid", str(os.getpid())]
        return Part(name, command, self.folder / f"{name}.log")

    def _worker(self, name: str, spec: dict[str, Any]) -> Part:
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps({**spec, "name": name, "endpoint": self.worker_endpoint}))
        worker = self._part(name, "chaos.hanging", "--spec", str(file))
        if self._keys:
            worker.variables = {KEY_VARIABLE: self._keys["key"], SERVER_KEY_VARIABLE: self._keys["server_key"]}
        return worker

    @property
    def parts(self) -> list[Part]:
        """Broker and workers."""
        return [self.broker, *self.workers]

    async def __aenter__(self) -> Self:
        for line in self.lines:
            line.start()
        for part in self.parts:
            part.start()
        await self.whole()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()
        await asyncio.gather(*(part.stop() for part in self.parts))
        if error is not None:
            print(self.last_words(), file=sys.stderr)
        for line in self.lines:
            await line.close()
        for one in self._listening.values():
            one.close()
        shutil.rmtree(self.folder)

    async def status(self) -> Status:
        """What the broker says about itself now."""
        return await self._client.status()

    async def whole(self) -> None:
        """Wait until every worker serves."""

        async def all_there() -> bool:
            ready = [w.pid for w in (await self.status()).workers if w.state == "ready"]
            return sorted(ready) == sorted(w.pid for w in self.workers)

        await until(all_there, "all workers serve", READY_LIMIT)

    async def left_open(self) -> dict[str, int]:
        """What is in the broker's and workers' tables once it had the time to go; empty when all went."""
        found: dict[str, int] = {}

        async def nothing() -> bool:
            status = await self.status()
            found.clear()
            found.update({name: size for name, size in status.tables.items() if size and name != "strikes"})
            found.update({f"{w.name} running": w.running for w in status.workers if w.running})
            found["clients"] -= 1  # we who ask
            return not any(found.values())

        try:
            await until(nothing, "the tables are empty", _EMPTY_LIMIT)
        except AssertionError:
            pass  # what is left is the answer
        return {name: size for name, size in found.items() if size}

    def memory(self) -> tuple[float, float]:
        """Resident MiB of the broker, and of all workers together."""
        return self.broker.memory(), sum(worker.memory() for worker in self.workers)

    def unasked_deaths(self) -> int:
        """How often a process ended that nobody had killed."""
        return sum(part.deaths - part.killed for part in self.parts)

    def troubles(self) -> list[str]:
        """Lines of the logs that should not be there."""
        words = ("internal error", "Traceback", "Assertion failed")
        lines = [f"{part.name}: {line}" for part in self.parts for line in part.log.read_text().splitlines()]
        return [line for line in lines if any(word in line for word in words)]

    def last_words(self) -> str:
        """The end of every log."""
        return "\n".join(f"--- {part.name}\n{part.log.read_text()[-2000:]}" for part in self.parts)


async def until(condition: Callable[[], Awaitable[bool]], what: str, limit: float) -> None:
    """Ask again and again until it holds."""
    end = time.monotonic() + limit
    while not await condition():
        assert time.monotonic() < end, f"after {limit:.0f} s still not: {what}"
        await asyncio.sleep(0.05)
