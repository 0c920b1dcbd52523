"""The ``loopmux`` command.

It needs what the client needs and no more. A subcommand that belongs to another part becomes that part's program
(``delegate``); the rest talks to the broker (``talk``, ``chat``, ``show``, ``adapters``, ``drain``) or makes ``keys``.
"""

from __future__ import annotations

import argparse
import sys

import loopmux
from loopmux.cli import adapters, arguments, chat, delegate, drain, keys, running, show, talk


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (``exitcodes``)."""
    words = sys.argv[1:] if argv is None else argv
    return running.run(lambda: _run(words), debug="--debug" in words)


def _run(words: list[str]) -> int:
    if words and words[0] in delegate.PROGRAMS:
        return delegate.run(words[0], words[1:])
    options = _parser().parse_args(words)
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loopmux",
        description="Run many tool-call loops against local language models with adapters.",
        epilog=f"`loopmux COMMAND --help` has the options of a command. {_needs()}",
    )
    parser.add_argument("--version", action="version", version=f"loopmux {loopmux.__version__}")
    common = arguments.common()
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    talk.add_commands(commands, common)
    chat.add_commands(commands, common)
    show.add_commands(commands, common)
    adapters.add_commands(commands, common)
    drain.add_commands(commands, common)
    keys.add_commands(commands)
    for name, program in delegate.PROGRAMS.items():
        commands.add_parser(name, help=program.help, add_help=False)
    return parser


def _needs() -> str:
    """Which commands need more than the client."""
    by_extra: dict[str, list[str]] = {}
    for name, program in delegate.PROGRAMS.items():
        if program.extra:
            by_extra.setdefault(program.extra, []).append(name)
    return " ".join(f"The extra [{extra}] is for {', '.join(names)}." for extra, names in by_extra.items())
