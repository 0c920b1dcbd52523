"""The launcher as a real program, for tests: started, read line by line, and looked at from outside."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil

import waiting
from processes import running

BUILD_LIMIT = 200.0
"""Seconds for a command that may build an environment, which takes five on an idle machine."""
LIMIT = 60.0
"""Seconds that a test waits for something that takes one on an idle machine."""
wait_for = partial(waiting.wait_for, limit=LIMIT)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie has ended and waits for its parent."""
    return list(filter(running, processes))


class Program:
    """A running launcher command; ``lines`` is what it has printed so far, both streams together."""

    def __init__(self, *words: str, module: str = "loopmux_launcher") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self._news.put(line.rstrip("\n"))
        self._news.put(None)

    def line(self, part: str, limit: float = LIMIT) -> str:
        """Wait for a line that contains ``part``."""
        end = time.monotonic() + limit
        while True:
            try:
                news = self._news.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line with {part!r} in {limit} s:\n" + "\n".join(self.lines)) from None
            if news is None:
                self._news.put(None)  # for ``wait``
                raise AssertionError(f"it ended without a line with {part!r}:\n" + "\n".join(self.lines))
            self.lines.append(news)
            if part in news:
                return news

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit code; ``lines`` is complete afterwards."""
        code = self.process.wait(limit)
        self._reader.join(limit)
        while (news := self._news.get()) is not None:
            self.lines.append(news)
        self._news.put(None)
        return code

    def family(self) -> list[psutil.Process]:
        """It and all its descendants."""
        itself = psutil.Process(self.process.pid)
        return [itself, *itself.children(recursive=True)]

    def children(self, module: str) -> list[psutil.Process]:
        """The descendants that run a module."""
        found = []
        for process in self.family()[1:]:
            try:
                if module in process.cmdline():
                    found.append(process)
            except psutil.NoSuchProcess:
                pass  # it has just ended
        return found

    @property
    def text(self) -> str:
        """All that it printed."""
        return "\n".join(self.lines)


@contextmanager
def program(*words: str, module: str = "loopmux_launcher") -> Iterator[Program]:
    """Run a command; whatever is left of it at the end is killed."""
    one = Program(*words, module=module)
    try:
        yield one
    finally:
        family = one.family() if one.process.poll() is None else []
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        one.wait()


def launch(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "loopmux_launcher", *words], capture_output=True, text=True, check=False,
        timeout=BUILD_LIMIT, env={**os.environ, **variables},
    )  # fmt: skip
