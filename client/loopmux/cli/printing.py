"""Printing what a stream or a loop brings: its text on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loopmux.loopevents import ToolResult, ToolStarted
from loopmux.results import TextDelta, Waiting

_SHOWN = 200
"""Characters of a call or a result that are shown: two or three lines of a terminal."""


@dataclass(slots=True)
class Printer:
    """Prints text as it arrives, and what else happens as lines of their own."""

    _midline: bool = False

    def show(self, events: Iterable[Any]) -> Any:
        """Print events to their end; the last one comes back. However it ends, the next print begins a line."""
        last = None
        try:
            for last in events:
                match last:
                    case TextDelta(text=text):
                        print(text, end="", flush=True)
                        self._midline = True
                    case Waiting(phase=phase, elapsed=elapsed, detail=detail):
                        self.note(f"[{phase}, {elapsed:.0f} s{detail and f' ({detail})'}]")
                    case ToolStarted(call=call):
                        self.note(f"[{call.name} {_short(call.arguments)}]")
                    case ToolResult(call=call, content=content):
                        self.note(f"[{call.name}: {_short(content)}]")
        finally:
            self.end_line()
        return last

    def note(self, text: str) -> None:
        """Print a line on standard error."""
        self.end_line()
        print(text, file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """End the line of text that is being printed, if there is one."""
        if self._midline:
            print(flush=True)
            self._midline = False


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)  # also keeps control characters from the terminal
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
