"""``loopmux generate``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import loopmux
from loopmux.cli import arguments
from loopmux.cli.printing import Printer, as_json
from loopmux.errors import BadRequestError


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``generate`` to the parser's subcommands."""
    generate = commands.add_parser(
        "generate", parents=[common, arguments.sampling()], help="answer one prompt, streamed"
    )
    generate.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    generate.add_argument("--model", default="default", help="model id (default: default)")
    generate.add_argument("--json", action="store_true", help="print the whole result as JSON when it is complete")
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    prompt = _read_prompt(options.prompt)
    with loopmux.Client(options.endpoint) as client:
        if options.json:
            result = client.generate(prompt, model=options.model, **arguments.given(options))
            print(as_json(result))
        else:
            with client.stream(prompt, model=options.model, **arguments.given(options)) as stream:
                Printer().show(stream)
    return 0


def _read_prompt(given: str) -> str:
    data = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(
            f"the prompt is not UTF-8: found byte 0x{data[error.start]:02x} at position {error.start}; convert it first"
        ) from error
