"""Running an installer: to make a virtual environment, fill it, resolve for a lock. Its output goes to a log file."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loopmux_launcher import interpreters, lockfile, pipsettings, requirements, tether, tools
from loopmux_launcher.config import Environment, Installer
from loopmux_launcher.interpreters import EnvironmentUnusable, Interpreter
from loopmux_launcher.progress import Progress, Report
from loopmux_launcher.tools import Tool

_PIP_THAT_REPORTS = (23, 0)
"""The first pip whose installation report is in its final format."""
_TICK = 1.0
"""Seconds of silence after which its files are looked at for how far it is."""


class Log:
    """A log file of one build. Fresh each time: the last build is the one that somebody wants to read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("wb", buffering=0)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stream.close()

    def write(self, line: str) -> None:
        """Append a line.

        Raises:
            OSError: it cannot be written; with the file's name.
        """
        try:
            self._stream.write((line.rstrip("\n") + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def choose(wanted: Installer) -> Tool:
    """The installer for what a configuration asks for.

    Raises:
        EnvironmentUnusable: uv is asked for and not there.
    """
    if wanted == "pip":
        return Tool()
    found = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if found is None and wanted == "uv":
        raise EnvironmentUnusable(
            "installer: uv: found no uv on PATH, expected it installed: https://docs.astral.sh/uv, `pip install uv`, "
            "or `installer: pip`"
        )
    return Tool(Path(found) if found else None)


class Installation:
    """An installer at work for one environment.

    Args:
        target: the folder of the virtual environment.
    """

    def __init__(self, environment: Environment, tool: Tool, target: Path, log: Log, report: Report) -> None:
        self._environment, self._tool, self._target, self._log = environment, tool, target, log
        self._scratch = target / "tmp"  # in the environment itself, so that none is left elsewhere, however this ends
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._report = report
        self._python = target / "bin" / "python"
        variables = {**interpreters.clean_variables(), **environment.variables, "TMPDIR": str(self._scratch)}
        self._variables = variables | (pipsettings.for_uv(variables) if tool.uv else {})

    def create(self, interpreter: Interpreter) -> None:
        """Make an empty virtual environment, without system packages.

        Raises:
            EnvironmentUnusable: with the reason.
        """
        for command in self._tool.create(interpreter.executable, self._target):
            self._run(command, f"{interpreter.executable} could not make a virtual environment", lambda _: None)

    def install(self, lock: Path | None) -> None:
        """Install the lock file, or else the requirements and what the workers need in one resolution.

        Raises:
            EnvironmentUnusable: with the installer's own reason.
        """
        if lock is None:
            files = [self._written(requirements.generated(self._environment))]
        else:
            files = [self._written(requirements.index(self._environment)), lock]
            self._variables.pop("UV_CONSTRAINT", None)  # it has been heeded, and uv wants hashes of constraints too
        command = self._tool.install(self._python, files, locked=lock is not None)
        self._run(command, f"{self._tool.name} could not install it", self._report)
        shutil.rmtree(self._scratch)

    def resolve(self, interpreter: Interpreter) -> tuple[lockfile.Pin, ...]:
        """The packages that the requirements mean today.

        Raises:
            EnvironmentUnusable: with the installer's own reason.
        """
        answer = self._scratch / "answer"
        python = interpreter.executable
        if not self._tool.uv and not interpreters.has_pip(python, _PIP_THAT_REPORTS):
            self.create(interpreter)  # pip resolves for the interpreter that it runs in
            python = self._python
        command = self._tool.resolve(python, self._written(requirements.generated(self._environment)), answer)
        self._run(command, f"{self._tool.name} could not resolve the requirements", self._report)
        text = answer.read_text(encoding="utf-8")
        try:
            return lockfile.pins(text) if self._tool.uv else lockfile.from_report(json.loads(text))
        except lockfile.Unlockable as error:
            raise EnvironmentUnusable(str(error)) from error

    def _written(self, text: str) -> Path:
        file = self._scratch / "requirements.txt"
        file.write_text(text, encoding="utf-8")
        return file

    def _run(self, command: list[str], failed: str, report: Report) -> None:
        progress = Progress(self._target, self._scratch, report)
        code, lines = _run(command, self._variables, self._environment.root, self._log, progress)
        if code:
            reason = tools.reason(lines, code, shutil.disk_usage(self._target).free, self._target.parent)
            raise EnvironmentUnusable(f"{failed}: {reason}\nfull log: {self._log.path}")


def _run(
    command: list[str], variables: dict[str, str], folder: Path, log: Log, progress: Progress
) -> tuple[int, list[str]]:
    """Run a program in a group of its own and read it to its end; returns exit code and lines."""
    log.write("$ " + " ".join(command))
    lines: list[str] = []

    def take(raw: bytes) -> None:
        line = raw.decode(errors="replace")
        log.write(line)
        lines.append(line)
        progress.line(line)

    with tether.foreign(command, variables, folder, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        _read(process.stdout.fileno(), take, progress.tick)
        return process.wait(), lines


def _read(descriptor: int, take: Callable[[bytes], None], tick: Callable[[], None]) -> None:
    """Read lines to the end; ``tick`` is called in silences."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(_TICK):
                tick()
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                take(line)
    if rest:
        take(rest)
