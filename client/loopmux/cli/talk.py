"""``loopmux generate`` and ``loopmux chat``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import loopmux
from loopmux.codec import plain
from loopmux.errors import BadRequestError, LoopmuxError, failed_to_start, unknown_model
from loopmux.results import ReasoningDelta, TextDelta, Waiting

_LOOK_AGAIN = 0.2
"""Seconds between two looks at a broker that has just started, whose models may still join."""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``generate`` and ``chat`` to the parser's subcommands."""
    sampling = _sampling()
    generate = commands.add_parser("generate", parents=[common, sampling], help="answer one prompt, streamed")
    generate.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    generate.add_argument("--model", default="default", help="model id (default: default)")
    generate.add_argument("--json", action="store_true", help="print the whole result as JSON when it is complete")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", parents=[common, sampling], help="talk to a model, streamed")
    chat.add_argument("model", nargs="?", default="default", metavar="MODEL", help="model id (default: default)")
    chat.add_argument("--system", help="system prompt")
    chat.set_defaults(run=_chat)


def _sampling() -> argparse.ArgumentParser:
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


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}


def _generate(options: argparse.Namespace) -> int:
    prompt = _read_prompt(options.prompt)
    with loopmux.Client(options.endpoint) as client:
        if options.json:
            result = client.generate(prompt, model=options.model, **_given(options))
            print(json.dumps(plain(result), ensure_ascii=False))
        else:
            with client.stream(prompt, model=options.model, **_given(options)) as stream:
                _print_stream(stream)
    return 0


def _read_prompt(given: str) -> str:
    data = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(
            f"the prompt is not UTF-8: found byte 0x{data[error.start]:02x} at position {error.start}; convert it first"
        ) from error


def _print_stream(stream: Any) -> str:
    """Print text as it arrives, on standard error what the model thinks or why nothing comes; return the whole text."""
    parts: list[str] = []
    thinking = False  # a line of it is open
    try:
        for event in stream:
            match event:
                case TextDelta(text=text):
                    if text and thinking:
                        print(file=sys.stderr, flush=True)
                        thinking = False
                    parts.append(text)
                    print(text, end="", flush=True)
                case ReasoningDelta(text=text):
                    print(text, end="", file=sys.stderr, flush=True)
                    thinking = True
                case Waiting():
                    detail = f" ({event.detail})" if event.detail else ""
                    print(f"[{event.phase}, {event.elapsed:.0f} s{detail}]", file=sys.stderr, flush=True)
                case _:
                    continue
    except LoopmuxError:
        if parts:
            print(flush=True)  # what is said about it stands on a line of its own
        raise
    print(flush=True)
    return "".join(parts)


def _chat(options: argparse.Namespace) -> int:
    messages: list[dict[str, Any]] = [{"role": "system", "content": options.system}] if options.system else []
    with loopmux.Client(options.endpoint) as client:
        _expect(client, options.model)
        if sys.stdin.isatty():
            print(f"{options.model}: an empty line or Ctrl-D leaves, Ctrl-C stops an answer")
        while question := _ask():
            messages.append({"role": "user", "content": question})
            answer = _turn(client, messages, options)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    return 0


def _expect(client: loopmux.Client, model: str) -> None:
    """See that there is a broker and that it has the model, before the first question is typed."""
    while True:
        status = client.status()
        there = {known.id: known for known in status.models}
        if model in there:
            break
        if status.settled:
            raise unknown_model(model, there)
        time.sleep(_LOOK_AGAIN)
    if there[model].phase == "failed":
        raise failed_to_start(model, there[model].detail)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _turn(client: Any, messages: list[dict[str, Any]], options: argparse.Namespace) -> str | None:
    """One answer; None when it failed or was stopped, so that the question can be asked again."""
    try:
        with client.stream(messages=messages, model=options.model, **_given(options)) as stream:
            return _print_stream(stream)
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
    except LoopmuxError as error:
        if not sys.stdin.isatty():
            raise
        print(f"\nloopmux: {error}", file=sys.stderr)
    return None
