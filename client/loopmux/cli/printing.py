"""Printing what a stream or a loop brings: its text on standard output, everything else on standard error; and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TextIO

from loopmux.loopevents import ToolResult, ToolStarted, TurnFinished
from loopmux.results import ReasoningDelta, TextDelta, Waiting

_SHOWN = 200
"""Characters of a call or a result that are shown: two or three lines of a terminal."""


@dataclass(slots=True)
class Printer:
    """Prints text as it arrives, and what else happens between lines: what a model thinks, waits, calls, results.

    Standard output gets each answer and the end of its line, nothing in between, whatever a terminal shows there.
    """

    _answering: bool = False
    """An answer was begun; the end of its line is due on standard output."""
    _unfinished: TextIO | None = None
    """Who wrote last on the terminal's line, while that has no end."""

    def show(self, events: Iterable[Any]) -> Any:
        """Print events to their end; the last one comes back. However it ends, the next print begins a line."""
        last = None
        try:
            for last in events:
                match last:
                    case TextDelta(text=text) if text:
                        self._print(text, sys.stdout)
                        self._answering = True
                    case ReasoningDelta(text=text):
                        self._print(text, sys.stderr)
                    case Waiting(phase=phase, elapsed=elapsed, detail=detail):
                        self.note(f"[{phase}, {elapsed:.0f} s{detail and f' ({detail})'}]")
                    case TurnFinished():
                        self._end()
                    case ToolStarted(call=call):
                        self.note(f"[{call.name} {_short(call.arguments)}]")
                    case ToolResult(call=call, content=content):
                        self.note(f"[{call.name}: {_short(content)}]")
        finally:
            self._end()
        return last

    def note(self, text: str) -> None:
        """Print a line on standard error."""
        self._print(f"{text}\n", sys.stderr, begin=True)
        self._unfinished = None

    def _end(self) -> None:
        if self._answering or self._unfinished is not None:
            print(file=sys.stdout if self._answering else sys.stderr, flush=True)
        self._answering, self._unfinished = False, None

    def _print(self, text: str, where: TextIO, *, begin: bool = False) -> None:
        if self._unfinished is not None and (begin or where is not self._unfinished):
            print(file=sys.stderr, flush=True)
        print(text, end="", file=where, flush=True)
        self._unfinished = where


def as_json(value: Any) -> str:
    """A value for programs. Of a dataclass every field is there, whatever it holds, so that none need ask first."""
    return json.dumps(value, ensure_ascii=False, default=_spelled)


def _spelled(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"found {type(value).__name__}, expected what JSON has a form for")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)  # also keeps control characters from the terminal
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
