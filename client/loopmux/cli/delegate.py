"""Subcommands that are another part's program: this process becomes it, so signals and exit codes are its own."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from loopmux.errors import LoopmuxError
from loopmux.program import missing, needs


@dataclass(frozen=True, slots=True)
class Program:
    """Where a subcommand lives: ``python -m module words…``; ``needs`` are the packages of ``extra``."""

    module: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    extra: str
    help: str


_LAUNCHER = ("loopmux_launcher", "loopmux_broker", "yaml", "structlog", "packaging")
PROGRAMS = {
    "up": Program("loopmux_launcher", ("up",), _LAUNCHER, "server", "broker, launcher and workers in the foreground"),
    "down": Program("loopmux_launcher", ("down",), _LAUNCHER, "server", "stop what `up` started"),
    "env": Program(
        "loopmux_launcher", ("env",), _LAUNCHER, "server", "build, lock, check, list and remove model environments"
    ),
    "config": Program(
        "loopmux_launcher", ("config",), _LAUNCHER, "server", "check a configuration file; print its JSON schema"
    ),
    "logs": Program("loopmux_launcher", ("logs",), _LAUNCHER, "server", "show the logs of workers, broker and builds"),
    "systemd": Program(
        "loopmux_launcher", ("systemd",), _LAUNCHER, "server", "have this user's systemd run broker and launcher"
    ),
    "load": Program("loopmux_loadtest.load", (), (), "", "load test: many requests, what became of them and how fast"),
    "run-adapter": Program(
        "loopmux_worker",
        ("run-adapter",),
        ("loopmux_worker", "torch", "transformers", "peft", "structlog"),
        "worker",
        "one generation in this process, no broker",
    ),
}


def run(name: str, arguments: list[str]) -> int:
    """Become the program behind a subcommand.

    Raises:
        LoopmuxError: a package it needs is not installed here.
    """
    program = PROGRAMS[name]
    if lacks := missing(program.needs):
        raise LoopmuxError(needs(f"`loopmux {name}`", lacks, program.extra))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", program.module, *program.words, *arguments])  # noqa: S606
