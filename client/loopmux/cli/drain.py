"""``loopmux drain``."""

from __future__ import annotations

import argparse
import time
from typing import Any

import loopmux
from loopmux.endpoints import admin_endpoint, default_endpoint
from loopmux.errors import LoopmuxError
from loopmux.messages import Status, WorkerStatus

_LOOK = 0.2
"""Seconds between two looks at what still runs there."""
_LATE = 5.0
"""Seconds after its time in which a worker still leaves that was in the middle of a step, or lost its connection."""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``drain`` to the parser's subcommands."""
    text = "let a worker leave: it gets nothing new, what it runs ends there or goes on elsewhere"
    drain = commands.add_parser("drain", parents=[common], help=text, description=text)
    drain.add_argument("worker", metavar="WORKER", help="its name, as `loopmux status` shows it")
    drain.add_argument(
        "--within",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="what runs has half of them to end there, then goes on elsewhere (%(default)g)",
    )
    drain.set_defaults(run=_drain)


def _drain(options: argparse.Namespace) -> int:
    with loopmux.Client(admin_endpoint(options.endpoint or default_endpoint())) as client:
        began, running = time.monotonic(), -1
        status = client.drain(options.worker, within=options.within)
        [pid] = [worker.pid for worker in status.workers if worker.name == options.worker]
        while (worker := _found(status, options.worker, pid)) is not None:
            if worker.running != running:
                running = worker.running
                print(f"{worker.name}: {running} running", flush=True)
            if time.monotonic() > began + options.within + _LATE:
                raise LoopmuxError(
                    f"worker {worker.name!r} (pid {pid}) is still there {_LATE:g} s after its time, with {running} "
                    "running: it gets no new work; see its log (loopmux logs), or end it by SIGTERM"
                )
            time.sleep(_LOOK)
            status = client.status()
    print(f"{options.worker} has left after {time.monotonic() - began:.1f} s")
    return 0


def _found(status: Status, name: str, pid: int) -> WorkerStatus | None:
    """The process that was asked to leave; its launcher may have started another one of its name."""
    return next((worker for worker in status.workers if (worker.name, worker.pid) == (name, pid)), None)
