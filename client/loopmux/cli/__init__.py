"""The ``loopmux`` command.

It needs what the client needs and no more. A subcommand that belongs to another part becomes that part's program
(``delegate``); the rest talks to the broker (``talk``, ``chat``, ``show``, ``adapters``, ``drain``) or makes ``keys``.
"""

from __future__ import annotations

import argparse
import sys

import loopmux
from loopmux.cli import adapters, chat, delegate, drain, keys, show, talk
from loopmux.cli.ending import exit_code


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (``exitcodes``)."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _run(arguments), debug="--debug" in arguments)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in delegate.PROGRAMS:
        return delegate.run(arguments[0], arguments[1:])
    options = _parser().parse_args(arguments)
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loopmux",
        description="Run many tool-call loops against local language models with adapters.",
        epilog="Programs of other parts: " + "; ".join(f"{n}: {p.help}" for n, p in delegate.PROGRAMS.items()),
    )
    parser.add_argument("--version", action="version", version=f"loopmux {loopmux.__version__}")
    common = talk.common()
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
