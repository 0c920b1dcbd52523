"""A broker, a launcher and their workers as one child process of this program, in a folder of its own."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO, cast

from loopmux import exitcodes, program, uninterrupted
from loopmux.endpoints import ipc_path, private_folder, runtime_folder
from loopmux.errors import ConfigError, ConnectionLostError, LoopmuxError
from loopmux.pulse import exists

_LAST_LINES = 20
"""Lines of a stack that did not start which its error carries."""
_KEPT_LINES = 1000
"""Lines kept for callers that wait for the same start; an environment's build prints a few hundred."""
_STOP_GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL: workers get 10 to finish what they run, and the launcher some more."""
_ON_ITS_WAY = 2.0
"""Seconds that what is left of a killed stack may still write to its folder."""
_LOOK_AGAIN = 1.0
"""Seconds after which a waiting caller looks for a child that died while something else held its output open."""
_SERVES = re.compile(r"ready\b")
"""The line that says that requests are served: by all models, or by those that did not fail."""
_NEEDED = ("yaml", "structlog", "packaging")


_numbers = itertools.count()


def launcher_command() -> list[str]:
    """The program that runs a stack, in this interpreter.

    Raises:
        ConfigError: a package it needs is not installed.
    """
    if missing := program.missing(_NEEDED):
        raise ConfigError(program.needs("no broker is running, and starting one", missing, "server"))
    return [sys.executable, "-m", "loopmux_launcher"]


def default_environment(command: Sequence[str], log: Callable[[str], None] | None) -> dict[str, Any]:
    """The configuration's ``default`` environment as an entry for another configuration, built if it is not yet.

    Empty where no configuration is found, or none of its models uses one: the launcher then has its own default.

    Raises:
        ConfigError: the configuration is wrong.
        ConnectionLostError: the environment cannot be built.
    """
    found = _ask(command, "path")
    if "is not built" in found.stderr:
        _build(command, log)
        found = _ask(command, "path")
    if found.returncode == 0:
        return {"default": {"path": found.stdout.strip()}}
    if "found no configuration" in found.stderr or "found no environment" in found.stderr:
        return {}
    raise _refused("the default environment cannot be used", found.returncode, found.stderr.splitlines())


def _ask(command: Sequence[str], question: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, "env", question, "default"], capture_output=True, text=True, check=False)


def _build(command: Sequence[str], log: Callable[[str], None] | None) -> None:
    words = [*command, "env", "build", "default", "--log-format", "plain", "--parent-pid", str(os.getpid())]
    said: deque[str] = deque(maxlen=_LAST_LINES)
    with ExitStack() as ending:
        process = ending.enter_context(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        )
        ending.callback(_end, process)  # where Ctrl-C comes, or the callback raises
        for line in cast(TextIO, process.stdout):
            said.append(line.rstrip())
            if log is not None:
                log(line.rstrip())
        process.wait()
    if process.returncode:
        raise _refused("the default environment cannot be built", process.returncode, said)


def _refused(what: str, code: int, lines: Iterable[str]) -> LoopmuxError:
    """The error for a program that ended with an exit code and these last lines."""
    said = "\n".join(list(lines)[-_LAST_LINES:]) or "(it printed nothing)"
    if code == exitcodes.CONFIG:
        return ConfigError(f"{what}:\n{said}")
    return ConnectionLostError(f"{what} (exit code {code}):\n{said}", retryable=False)


class PrivateStack:
    """One ``up`` process, started by ``begin``; ``wait_ready`` waits for its models.

    Args:
        config: the configuration to write for it, or None for the one that ``up`` finds by itself.
        command: the launcher program.

    Attributes:
        endpoint: where its broker listens.
        models: the model ids that callers have asked for; kept by the caller.
    """

    def __init__(self, config: Mapping[str, Any] | None, command: Sequence[str]) -> None:
        self.models: set[str] = set()
        self.folder = _new_folder()
        self.endpoint = f"ipc://{self.folder / 'client.ipc'}"
        self._changed = threading.Condition()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._printed = 0
        self._ready = False
        self._config, self._command = config, command
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, name="loopmux-private-stack", daemon=True)

    def begin(self) -> None:
        """Start the process. Whatever is raised, Ctrl-C too, ``stop`` ends what was started.

        Raises:
            ConfigError: its folder has too long a name for an endpoint.
            OSError: it cannot be started.
        """
        ipc_path(self.endpoint)
        uninterrupted.run(self._spawn)  # who is interrupted while he starts a process never learns its number

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, log: Callable[[str], None] | None) -> None:
        """Wait until every required model is ready; ``log`` gets each line of progress, in this thread.

        Raises:
            ConfigError: the configuration is wrong.
            ConnectionLostError: the stack ended before it was ready.
        """
        told = 0
        while True:
            fresh, told, ready = self._news(told)
            alive = self.alive  # after the news: a dead one's last lines are then among them, or in its error
            if log is not None:
                for line in fresh:
                    log(line)
            if not alive:
                raise self._failure()
            if ready:
                return

    def _news(self, told: int) -> tuple[list[str], int, bool]:
        """The lines printed since the first ``told`` of them, their new number, and whether the stack is ready."""
        with self._changed:
            self._changed.wait_for(lambda: self._printed > told or self._ready, _LOOK_AGAIN)
            fresh = list(self._lines)[told - self._printed :] if self._printed > told else []
            return fresh, self._printed, self._ready

    def stop(self) -> None:
        """End the process and everything it started, and remove its folder. A second time does nothing.

        The logs of a stack that failed to start stay until another process starts one: its last lines name them.
        """
        failed = not self._ready and not self.alive
        if self._process is not None:
            _end(self._process)
            if self._reader.is_alive():
                self._reader.join()
        if not (failed and any((self.folder / "state").rglob("*.log"))):
            _remove(self.folder)

    def _spawn(self) -> None:
        words = [*self._command, "up", "--endpoint", self.endpoint]
        if self._config is not None:
            file = self.folder / "llm_backends.yaml"
            file.write_text(json.dumps(self._config, indent=2))  # JSON is YAML, and the client has no YAML library
            words += ["--config", str(file)]
        words += ["--parent-pid", str(os.getpid()), "--log-format", "plain"]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "XDG_STATE_HOME": str(self.folder / "state")},  # logs go when the stack goes
            start_new_session=True,  # Ctrl-C is for the application, which then stops the stack in its own order
        )
        self._reader.start()

    def _read(self) -> None:
        """Take the process's lines as long as it prints any, so that it never waits for a full pipe."""
        assert self._process is not None
        with cast(TextIO, self._process.stdout) as output:
            for line in output:
                with self._changed:
                    self._lines.append(line.rstrip())
                    self._printed += 1
                    self._ready = self._ready or _SERVES.match(line) is not None
                    self._changed.notify_all()
        self._process.wait()
        with self._changed:
            self._changed.notify_all()

    def _failure(self) -> LoopmuxError:
        self._reader.join(_LOOK_AGAIN)  # its last lines
        assert self._process is not None
        return _refused("no broker is running, and a private one did not start", self._process.returncode, self._lines)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _new_folder() -> Path:
    """A fresh folder for this process's stack, after removing those of processes that died without doing so."""
    parent = private_folder(runtime_folder())
    for old in parent.glob("private-*-*"):
        owner = old.name.split("-")[1]
        if not (owner.isdecimal() and exists(int(owner))):
            shutil.rmtree(old, ignore_errors=True)
    # numbered on: what is left of a killed stack may still be on its way out of the folder before
    folder = parent / f"private-{os.getpid()}-{next(_numbers)}"
    folder.mkdir(mode=0o700)
    return folder


def _remove(folder: Path) -> None:
    """Remove a folder. What is left of a killed stack may be writing there for a moment, on its way out."""
    end = time.monotonic() + _ON_ITS_WAY
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists() or time.monotonic() > end:
            return
        time.sleep(_ON_ITS_WAY / 40)
