"""The ``loopmux`` command.

It needs what the client needs and no more. A subcommand that belongs to another part becomes that part's program
(``delegate``); the rest talks to the broker (``talk``, ``chat``, ``show``, ``adapters``, ``drain``) or makes ``keys``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

import loopmux
from loopmux import exitcodes
from loopmux.cli import adapters, chat, delegate, drain, keys, show, talk
from loopmux.errors import LoopmuxError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code (``exitcodes``)."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    try:
        if arguments and arguments[0] in delegate.PROGRAMS:
            return delegate.run(arguments[0], arguments[1:])
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
    except LoopmuxError as error:
        if debug:
            traceback.print_exc()
        print(f"loopmux: {error}", file=sys.stderr)
        return exitcodes.of(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exitcodes.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`loopmux generate … | head`). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exitcodes.FAILURE
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"loopmux: {error}", file=sys.stderr)  # a full disk behind our output, most of the time
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exitcodes.FAILURE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loopmux",
        description="Run many tool-call loops against local language models with adapters.",
        epilog="Programs of other parts: " + "; ".join(f"{n}: {p.help}" for n, p in delegate.PROGRAMS.items()),
    )
    parser.add_argument("--version", action="version", version=f"loopmux {loopmux.__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--endpoint", help="the broker's endpoint; default: $LOOPMUX_ENDPOINT, else the user's ipc socket"
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")
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
