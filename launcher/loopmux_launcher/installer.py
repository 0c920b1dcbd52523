"""Creating a virtual environment and filling it with pip; everything they print goes to a log file."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from loopmux_launcher import interpreters, tether, workercode
from loopmux_launcher.config import Environment
from loopmux_launcher.interpreters import EnvironmentUnusable, Interpreter
from loopmux_launcher.lifecycle import spell_exit

Report = Callable[[str], None]
_GRACE = 3.0
"""Seconds for pip to clean up after SIGTERM before it is killed."""
_STEPS = re.compile(r"(Collecting|Processing|Downloading|Installing|Building wheel for) (.*)")
_SIZE = re.compile(r"\((\d+(?:\.\d+)? [MG]B)\)")


class Log:
    """A log file of one build. Fresh each time: the last build is the one that somebody wants to read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[str] | None = None

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *failure: object) -> None:
        assert self._stream is not None
        self._stream.close()

    def write(self, line: str) -> None:
        """Append a line."""
        assert self._stream is not None
        self._stream.write(line.rstrip("\n") + "\n")
        self._stream.flush()


def create(interpreter: Interpreter, target: Path, log: Log) -> None:
    """Make an empty virtual environment, without system packages.

    Raises:
        EnvironmentUnusable: with the reason.
    """
    command = [str(interpreter.executable), "-I", "-m", "venv", str(target)]
    variables = {**interpreters.clean_variables(), "TMPDIR": str(_scratch(target))}
    code, lines = _run(command, variables, target.parent, log, lambda _: None)
    if code:
        reason = " ".join(lines[-6:]) or spell_exit(code)
        raise EnvironmentUnusable(
            f"{interpreter.executable} could not make a virtual environment: {reason[:600]}\nfull log: {log.path}"
        )


def install(environment: Environment, target: Path, log: Log, report: Report) -> None:
    """Install the requirements and what the workers need, in one resolution.

    Raises:
        EnvironmentUnusable: with pip's own reason.
    """
    scratch = _scratch(target)
    file = environment.requirements_file
    if file is None:
        file = target / "requirements.txt"
        file.write_text("\n".join(environment.requirements) + "\n", encoding="utf-8")
    command = [str(target / "bin" / "python"), "-I", "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "-r", str(file), *workercode.REQUIREMENTS]
    variables = {**interpreters.clean_variables(), **environment.variables, "TMPDIR": str(scratch)}
    code, lines = _run(command, variables, environment.root, log, lambda line: _progress(line, report))
    shutil.rmtree(scratch)
    if code:
        raise EnvironmentUnusable(f"pip could not install it: {_reason(lines, code)}\nfull log: {log.path}")


def _scratch(target: Path) -> Path:
    """A folder for temporary files in the environment itself, so that none is left elsewhere, however this ends."""
    folder = target / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _progress(line: str, report: Report) -> None:
    """Pass on what takes time: what is being resolved, large downloads, and the installation at the end."""
    step = _STEPS.match(line.strip())
    if step is None:
        return
    verb, rest = step.groups()
    what = rest.split()[0].rsplit("/", 1)[-1]
    size = _SIZE.search(rest)
    if verb in ("Collecting", "Processing"):
        report(f"collecting {what}")
    elif verb == "Installing":
        report(f"installing {rest.count(',') + 1} packages")
    elif verb.startswith("Building"):
        report(f"building {what} from source")
    elif size:
        report(f"downloading {what}, {size[1]}")


def _reason(lines: list[str], code: int) -> str:
    """What pip says went wrong: its ERROR lines, the ones that name packages first."""
    errors = [line.removeprefix("ERROR: ").strip() for line in lines if line.startswith("ERROR: ")]
    if code < 0:
        return spell_exit(code)
    return "; ".join(dict.fromkeys(e[:400] for e in errors[:3])) or (lines[-1] if lines else spell_exit(code))


def _run(
    command: list[str], variables: dict[str, str], folder: Path, log: Log, on_line: Callable[[str], None]
) -> tuple[int, list[str]]:
    """Run a program in a group of its own and read it to its end; returns exit code and lines."""
    log.write("$ " + " ".join(command))
    lines: list[str] = []
    process = subprocess.Popen(
        tether.tethered(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=variables, cwd=folder, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        try:
            for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip("\n")
                log.write(line)
                lines.append(line)
                on_line(line)
            return process.wait(), lines
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    tether.kill_group(process, signal.SIGTERM)
    end = time.monotonic() + _GRACE
    while not tether.has_exited(process) and time.monotonic() < end:
        time.sleep(0.02)
    tether.kill_group(process)
    process.wait()
