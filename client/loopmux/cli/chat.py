"""``loopmux chat``: a conversation with a model that may use tools."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loopmux
from loopmux.cli import arguments, toolfile
from loopmux.cli.printing import Printer
from loopmux.errors import BadRequestError, LoopmuxError, failed_to_start, unknown_model
from loopmux.loopevents import ChatMessage, Decision, Deny, Run
from loopmux.results import ToolCall
from loopmux.tools import Tool, collect

_LOOK_AGAIN = 0.2
"""Seconds between two looks at a broker that has just started, whose models may still join."""

HELP = """\
/model NAME   ask another model from now on
/reset        forget the conversation
/save FILE    write the conversation to a file, as JSON
/help         this list
Ctrl-C stops an answer, an empty line or Ctrl-D ends the chat. A question that begins with / takes a space before it."""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``chat`` to the parser's subcommands."""
    chat = commands.add_parser("chat", parents=[common, arguments.sampling()], help="talk to a model, streamed")
    chat.add_argument("model", nargs="?", default="default", metavar="MODEL", help="model id (default: default)")
    chat.add_argument("--system", help="system prompt")
    chat.add_argument(
        "--tools",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file with tools: what it marks with @loopmux.tool, else its public functions; may be repeated",
    )
    chat.add_argument(
        "--mcp",
        action="append",
        default=[],
        metavar="SERVER",
        help="an MCP server with tools: a command or a URL; may be repeated",
    )
    chat.add_argument("--yes", action="store_true", help="run every tool without asking")
    chat.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> int:
    # What is wrong with a file is told before a broker is waited for
    sources: list[Any] = [tool for file in options.tools for tool in toolfile.load(file)]
    with loopmux.Client(options.endpoint) as client, contextlib.ExitStack() as servers:
        _expect(client, options.model)
        if options.mcp:
            from loopmux.mcp import MCPServer

            # the SDK logs tracebacks of what a server says beside the protocol; what matters comes as an error
            logging.getLogger("mcp").addHandler(logging.NullHandler())
            sources += [servers.enter_context(MCPServer(target)) for target in options.mcp]
        system = [{"role": "system", "content": options.system}] if options.system else []
        chat = Chat(client, options.model, collect(sources), arguments.given(options), system, options.yes)
        chat.run()
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


@dataclass(slots=True)
class Chat:
    """A conversation: questions and commands from standard input, answers on standard output.

    Tools of the level ``safe`` run by themselves. About others the person at the terminal is asked; where there is
    none, they are denied unless ``yes`` is set.

    Attributes:
        options: of every request.
        system: the messages that it begins with.
        always: the tools that the person allowed for the rest of the chat.
    """

    client: loopmux.Client
    model: str
    tools: Mapping[str, Tool]
    options: dict[str, Any]
    system: list[ChatMessage]
    yes: bool = False
    always: set[str] = field(default_factory=set)
    messages: list[ChatMessage] = field(init=False)
    session: str = field(init=False)
    printer: Printer = field(default_factory=Printer)

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.messages = list(self.system)
        self.session = secrets.token_hex(8)

    def run(self) -> None:
        """Read and answer to the end of the input. Without a terminal the first error ends it.

        Raises:
            LoopmuxError: without a terminal, what went wrong.
        """
        terminal = sys.stdin.isatty()
        if terminal:
            print(f"{self.model}, {len(self.tools)} tools: {', '.join(self.tools)}" if self.tools else self.model)
            print("/help lists the commands, an empty line or Ctrl-D ends the chat, Ctrl-C stops an answer")
        while line := self._read(terminal):
            before = self.messages
            try:
                if line.startswith("/"):
                    self._command(line[1:].split(maxsplit=1))
                else:
                    self._ask(line.strip())
            except KeyboardInterrupt:
                if not terminal:
                    raise
                kept = self.messages is not before
                self.printer.note(
                    f"[stopped; {'what came of it so far is kept' if kept else 'this question is forgotten'}]"
                )
            except LoopmuxError as error:
                if not terminal:
                    raise
                self.printer.note(f"loopmux: {error}")
        self.client.hint(self.session, "done")

    def _read(self, terminal: bool) -> str:
        """The next line; empty at the end of the chat."""
        while True:
            try:
                return input("> " if terminal else "").rstrip()
            except EOFError:
                return ""
            except UnicodeDecodeError as error:
                unreadable = BadRequestError(f"what was typed is not {error.encoding}, so it is dropped: {error}")
                if not terminal:
                    raise unreadable from error
                self.printer.note(f"loopmux: {unreadable}")
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print()  # as shells do: what was typed is dropped

    def _ask(self, question: str) -> None:
        """One answer, with the calls on the way; the conversation goes on from what came of it."""
        asked = [*self.messages, {"role": "user", "content": question}]
        events = self.client.iter_tools(
            asked,
            tools=self.tools.values(),
            model=self.model,
            session=self.session,
            before_tool=self._approve,
            **self.options,
        )
        try:
            with contextlib.closing(events):
                result = self.printer.show(events).result
        except (LoopmuxError, KeyboardInterrupt):
            if len(events.messages) > len(asked):
                self.messages = events.messages  # the model should know what its calls did, and not make them again
            raise
        self.messages = result.messages
        if result.finish_reason != "stop":
            self.printer.note(f"[{result.finish_reason}]")
        self.client.hint(self.session, "waiting_on_tool")  # what it waits for is the next question

    def _approve(self, call: ToolCall) -> Decision:
        danger = self.tools[call.name].danger
        if self.yes or danger == "safe" or call.name in self.always:
            return Run()
        shown = f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}"
        if not sys.stdin.isatty():
            self.printer.note(f"[{shown} was not run: nobody is there to allow it; --yes runs tools without asking]")
            return Deny("nobody is there to allow it")
        while True:
            match _answer(f"{danger}: run {shown}? [y]es, [n]o, [a]lways: "):
                case "y" | "yes":
                    return Run()
                case "n" | "no":
                    return Deny()
                case "a" | "always":
                    self.always.add(call.name)
                    return Run()

    def _command(self, words: list[str]) -> None:
        match words:
            case ["model", name]:
                _expect(self.client, name)
                self.model = name
            case ["reset"]:
                self.client.hint(self.session, "done")
                self._begin()
            case ["save", file]:
                self._save(file)
            case ["help"]:
                print(HELP)
            case _:
                raise BadRequestError(f"/{' '.join(words)} is no command; there are\n{HELP}")

    def _save(self, file: str) -> None:
        text = json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n"
        try:
            Path(file).expanduser().write_bytes(text.encode())
        except (OSError, RuntimeError, ValueError) as error:  # the last two: ~nobody, and a NUL in it
            raise LoopmuxError(f"/save {file!r}: {error}") from error


def _answer(question: str) -> str:
    try:
        return input(question).strip().lower()
    except UnicodeDecodeError:
        return ""
    except EOFError:
        return "no"
