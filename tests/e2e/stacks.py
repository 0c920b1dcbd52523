"""A real stack (``loopmux up``) for end-to-end tests, and a look at what it leaves behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

import waiting

READY_LIMIT = 120.0
"""Seconds for a start without building an environment; loading torch on a busy two-core machine takes most of it."""
wait_for = partial(waiting.wait_for, limit=60.0)


@dataclass
class Stack:
    """A running ``loopmux up``; ``lines`` is what it printed."""

    process: subprocess.Popen[str]
    endpoint: str
    folder: Path
    home: Path
    lines: list[str] = field(default_factory=list)

    def family(self) -> list[psutil.Process]:
        """``up`` and all its descendants."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def part(self, module: str) -> list[psutil.Process]:
        """The descendants that run a module, such as ``loopmux_worker``."""
        found = []
        for process in self.family()[1:]:
            try:
                if module in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to ``up`` and wait until it is gone."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def left_behind(self) -> list[str]:
        """Socket, lock and state files that are still in the socket's folder."""
        return sorted(p.name for p in self.folder.iterdir()) if self.folder.exists() else []


def environment(home: Path) -> dict[str, str]:
    """The process environment with all user folders below ``home``."""
    return {
        **os.environ,
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_RUNTIME_DIR": str(home / "run"),
    }


def interpreter(path: Path, worker: str = "-m loopmux_worker") -> Path:
    """A script that is this interpreter to a launcher, with a probe that takes no seconds.

    Args:
        path: where it is written.
        worker: what it runs as a worker, in the words of a shell.
    """
    path.write_text(
        f"""#!/bin/sh
# called as  python -P -s -m loopmux_worker ARGUMENTS…
case "$*" in
*" probe") set -- "$@" --engine echo;;  # which imports no torch: whether that is there was seen by the whole stack
*" --spec "*) shift 4; exec "{sys.executable}" -P -s {worker} "$@";;
esac
exec "{sys.executable}" "$@"
"""
    )
    path.chmod(0o755)
    return path


def start(config: Path, home: Path, *, limit: float = READY_LIMIT, folder: Path | None = None) -> Stack:
    """Start ``loopmux up`` and wait for the line that says it is ready."""
    folder = folder or home / "s"
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = f"ipc://{folder / 'client.ipc'}"
    pid = str(os.getpid())
    process = subprocess.Popen(
        # the parent: a test run that is killed leaves no stack
        [sys.executable, "-m", "loopmux", "up", "--config", str(config), "--endpoint", endpoint, "--parent-pid", pid],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(home),
    )
    stack = Stack(process, endpoint, folder, home)
    news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process, stack.lines, news), daemon=True).start()
    end = time.monotonic() + limit
    while True:
        try:
            line = news.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            stack.stop(signal.SIGKILL)
            raise AssertionError(f"not ready after {limit} s:\n" + "\n".join(stack.lines)) from None
        if line is None:
            raise AssertionError(f"`up` ended with {process.wait()}:\n" + "\n".join(stack.lines))
        if line.startswith("ready"):
            return stack


def _read(process: subprocess.Popen[str], lines: list[str], news: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            lines.append(line.rstrip())
            news.put(line)
    news.put(None)
