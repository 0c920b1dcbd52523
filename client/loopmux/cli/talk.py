"""``loopmux generate``, and the options that it shares with other commands."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import loopmux
from loopmux.cli.printing import Printer
from loopmux.codec import plain
from loopmux.errors import BadRequestError


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``generate`` to the parser's subcommands."""
    generate = commands.add_parser("generate", parents=[common, sampling()], help="answer one prompt, streamed")
    generate.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    generate.add_argument("--model", default="default", help="model id (default: default)")
    generate.add_argument("--json", action="store_true", help="print the whole result as JSON when it is complete")
    generate.set_defaults(run=_generate)


def common() -> argparse.ArgumentParser:
    """A parent parser with the options of every command that speaks to a broker."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--endpoint", help="the broker's endpoint; default: $LOOPMUX_ENDPOINT, else the user's ipc socket"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def sampling() -> argparse.ArgumentParser:
    """A parent parser with the options of a request."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--adapter", help="adapter to use on top of the model")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to produce")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--timeout", type=float, metavar="S", help="total deadline, seconds")
    return parser


_OPTIONS = ("adapter", "max_new_tokens", "temperature", "top_p", "seed", "stop", "timeout")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Those of ``sampling`` that were said, as the client takes them."""
    return {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}


def _generate(options: argparse.Namespace) -> int:
    prompt = _read_prompt(options.prompt)
    with loopmux.Client(options.endpoint) as client:
        if options.json:
            result = client.generate(prompt, model=options.model, **given(options))
            print(json.dumps(plain(result), ensure_ascii=False))
        else:
            with client.stream(prompt, model=options.model, **given(options)) as stream:
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
