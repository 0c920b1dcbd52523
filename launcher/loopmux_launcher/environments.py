"""Model environments: virtual environments built with pip, or existing ones that are probed and used as they are.

An environment lives under ``envs/<name>/<hash>``, the hash taken over all that it is made from. It counts as there only
with its marker file, which is written last, so an interrupted build is never mistaken for an environment. One process
builds, others wait at the lock; ``current`` is switched by renaming a link, and workers that run keep what they have.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from loopmux_launcher import interpreters, workercode
from loopmux_launcher.config import Environment
from loopmux_launcher.installer import Log, create, install
from loopmux_launcher.interpreters import EnvironmentUnusable, Interpreter
from loopmux_launcher.lock import locked
from loopmux_launcher.probe import probe

MARKER = "loopmux.json"
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Built:
    """An environment that works: its interpreter, what the probe found in it, and whether it looked for torch."""

    python: Path
    summary: str
    version: str = ""
    torch: bool = True


def prepare(environment: Environment, folder: Path, code: Path, log: Path, report: Report, *, torch: bool) -> Built:
    """Make an environment ready for workers: build it if need be, probe it.

    Args:
        folder: where environments are kept (``envs``).
        code: the folder with the workers' code.
        log: file for the full output of pip.
        report: told what is being done, one line at a time.
        torch: whether workers in it need torch, transformers and peft (all but the echo engine do).

    Raises:
        EnvironmentUnusable: with the reason and what to do about it.
    """
    if environment.path is not None:
        report(f"probing {environment.path}")
        return Built(environment.path, probe(environment.path, code, environment.variables, torch=torch, ours=False))
    interpreter = interpreters.find(environment.python)
    home = folder / environment.name
    target = home / identity(environment, interpreter)
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / ".lock", lambda pid: report(f"waiting for process {pid}, which is building it")):
        built = read_marker(target)
        if built is not None and torch and not built.torch:
            report("probing")
            built = _probed(built.python, built.version, code, environment, torch=True)
        if built is None:
            built = _build(environment, interpreter, target, code, log, report, torch=torch)
        _switch(home / "current", target.name)
    return built


def identity(environment: Environment, interpreter: Interpreter) -> str:
    """The hash of everything an environment is made from."""
    lines = environment.requirements
    if environment.requirements_file is not None:
        lines = (environment.requirements_file.read_text(encoding="utf-8"),)
    parts = [str(interpreter.executable), interpreter.version, interpreter.implementation, interpreter.platform]
    whole = json.dumps([parts, lines, workercode.REQUIREMENTS])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def locate(environment: Environment, folder: Path) -> Path:
    """The interpreter of an environment that is ready to be used.

    Raises:
        EnvironmentUnusable: it is not built yet.
    """
    if environment.path is not None:
        return environment.path
    built = read_marker(folder / environment.name / identity(environment, interpreters.find(environment.python)))
    if built is None:
        raise EnvironmentUnusable(
            f"environment {environment.name} is not built: run  loopmux env build {environment.name}  "
            "(with the same --config)"
        )
    return built.python


def read_marker(target: Path) -> Built | None:
    """The finished environment in a folder, or None."""
    try:
        values = json.loads((target / MARKER).read_bytes())
        built = Built(Path(values["python"]), values["summary"], values["version"], values["torch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if built.python.exists() else None


def _build(
    environment: Environment,
    interpreter: Interpreter,
    target: Path,
    code: Path,
    log: Path,
    report: Report,
    *,
    torch: bool,
) -> Built:
    _remove(target)
    report(f"building with Python {interpreter.version}, log {log}")
    try:
        with Log(log) as record:
            create(interpreter, target, record)
            install(environment, target, record, report)
        python = target / "bin" / "python"
        report("probing")
        built = _probed(python, interpreter.version, code, environment, torch=torch)
    except BaseException:  # a failure or Ctrl-C alike: nothing half is left
        _remove(target)
        raise
    return built


def _probed(python: Path, version: str, code: Path, environment: Environment, *, torch: bool) -> Built:
    """Probe what was built, and mark it as good."""
    summary = probe(python, code, environment.variables, torch=torch, ours=True)
    built = Built(python, summary, version, torch)
    _write(python.parent.parent / MARKER, json.dumps({**asdict(built), "python": str(python)}, indent=2) + "\n")
    return built


def _switch(link: Path, target: str) -> None:
    beside = link.with_name(f".{link.name}-{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.rename(link)


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)


def _remove(target: Path) -> None:
    """Remove a folder; its marker first, so that a removal that is cut short leaves nothing that counts."""
    (target / MARKER).unlink(missing_ok=True)
    if target.exists():
        shutil.rmtree(target)
