"""Asking an environment whether workers can run in it, before one is started there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopmux_launcher import interpreters, tether
from loopmux_launcher.interpreters import EnvironmentUnusable
from loopmux_launcher.lifecycle import spell_exit

_LIMIT = 300.0
"""Seconds: a first import of torch from a cold disk can take a minute, one of a network disk more."""


def worker_command(python: Path | str, *arguments: str) -> list[str]:
    """The command line of the workers' program in an environment.

    ``-P`` keeps the current folder and ``-s`` the user's site-packages from being importable.
    """
    return [str(python), "-P", "-s", "-m", "loopmux_worker", *arguments]


def worker_variables(code: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """A worker's variables: ours without what leads to our modules, the environment's own, and the code's folder."""
    return {**interpreters.clean_variables(), **extra, "PYTHONPATH": str(code), "PYTHONUNBUFFERED": "1"}


def probe(python: Path, code: Path, extra: Mapping[str, str], *, torch: bool, ours: bool) -> str:
    """One line with the versions in an environment.

    Args:
        torch: whether it must have torch, transformers and peft; the echo engine does without.
        ours: whether we built it; then what is missing belongs into its requirements.

    Raises:
        EnvironmentUnusable: something is missing or cannot be imported, with the remedy.
    """
    interpreters.find(os.path.abspath(python))  # noqa: PTH100 - a virtual environment's interpreter is a link
    command = worker_command(python, "probe", *([] if torch else ["--engine", "echo"]))
    try:
        with tether.foreign(command, worker_variables(code, extra)) as process:
            stdout, stderr = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentUnusable(f"the probe of {python} did not answer within {_LIMIT:.0f} s") from error
    report = _last_json(stdout)
    if report is None:
        said = stderr.decode(errors="replace").splitlines()
        reason = "\n".join((f"its probe failed: {spell_exit(process.returncode)}", *said[-8:]))
        raise EnvironmentUnusable(f"{python} cannot run workers: {reason}")
    if report.get("out_of_memory"):
        raise EnvironmentUnusable(
            f"{python} could not be probed: out of memory while its packages were imported "
            f"({report['out_of_memory']}); stop other programs, or raise the limit"
        )
    if not report.get("ok"):
        raise EnvironmentUnusable(f"{python} cannot run workers: {_missing(report, ours=ours)}")
    return _summary(report)


def _last_json(output: bytes) -> dict[str, Any] | None:
    """The report; libraries may print lines of their own in front of it."""
    for line in reversed(output.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        return value if isinstance(value, dict) else None
    return None


def _missing(report: dict[str, Any], *, ours: bool) -> str:
    """What is missing, each with what to do about it."""
    entries = dict.fromkeys(
        f"{entry['reason']}; " + (f"add {entry['name']} to its requirements" if ours else f"run  {entry['remedy']}")
        for entry in report["missing"]
    )
    return "".join(f"\n    {entry}" for entry in entries)


def _summary(report: dict[str, Any]) -> str:
    packages = report["packages"]
    shown = [name for name in ("torch", "transformers", "peft") if name in packages] or ["pyzmq"]
    parts = [f"Python {report['python']}", *(f"{name} {packages[name]}" for name in shown), *report["devices"]]
    return ", ".join(parts)
