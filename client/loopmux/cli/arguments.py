"""Options that several commands share, as parent parsers."""

from __future__ import annotations

import argparse
from typing import Any


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
    parser.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens, of this share in all")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--timeout", type=float, metavar="S", help="total deadline, seconds")
    return parser


_OPTIONS = ("adapter", "max_new_tokens", "temperature", "top_p", "seed", "stop", "timeout")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Those of ``sampling`` that were said, as the client takes them."""
    return {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
