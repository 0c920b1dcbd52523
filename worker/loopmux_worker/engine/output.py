"""What a token means to a reader: text, reasoning, tool calls, the end. Pure; engines feed each request through one.

A resumed request replays its prefix through a fresh ``Reader``, so that everything with a state (half characters, stop
strings, an open tool call) stands where the lost attempt left it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loopmux.results import FinishReason, ToolCall
from loopmux_worker.engine.calls import Parsed, Parser
from loopmux_worker.engine.text import Decode, Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a request's tokens.

    Attributes:
        decode: token ids to text.
        ends: token ids that end the output; they have no text.
        silent: token ids without text that end nothing (special tokens).
        stops: stop strings.
        limit: most tokens of the output, prefix included.
        parser: makes what finds reasoning and calls in the text; None where there is nothing to find.
        one_call: end after the first call.
    """

    decode: Decode
    ends: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    limit: int = 2**31
    parser: Callable[[], Parser | None] = lambda: None
    one_call: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token brought; with ``reason`` set it was the last one."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    reason: FinishReason | None = None


class Reader:
    """Reads one request's output token by token."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._detokenizer = Detokenizer(reading.decode)
        self._stops = StopStrings(reading.stops)
        self._parser = reading.parser()
        self.total = 0
        """Tokens so far."""
        self.reason: FinishReason | None = None
        """Why the output ended; None while it goes on."""

    def push(self, token: int, *, last: bool = False) -> Piece:
        """Take the next token. With the last one, everything that was held back comes out.

        Args:
            last: nothing may follow, though no end token came.
        """
        self.total += 1
        if token in self._reading.ends:
            return self._finish("", "stop", cut=False)
        text = "" if token in self._reading.silent else self._detokenizer.push(token)
        text, stopped = self._stops.push(text)
        if stopped:
            return self._finish(text, "stop", cut=True)
        if last:
            return self._finish(text, "stop", cut=False)
        if self.total >= self._reading.limit:
            return self._finish(text, "length", cut=False)
        parsed = self._parse(text)
        if parsed.calls and self._reading.one_call:
            self.reason = "tool_calls"
            return Piece(parsed.text, parsed.calls[:1], parsed.reasoning, self.reason)
        return Piece(parsed.text, parsed.calls, parsed.reasoning)

    def _finish(self, text: str, reason: FinishReason, *, cut: bool) -> Piece:
        """End here; ``cut`` by a stop string, behind which nothing counts."""
        if not cut:
            rest, stopped = self._stops.push(self._detokenizer.flush())
            text += rest + ("" if stopped else self._stops.flush())
            reason = "stop" if stopped else reason
        parsed = self._parse(text)
        last = self._parser.flush() if self._parser else Parsed()
        calls = parsed.calls + last.calls
        if self._reading.one_call:
            calls = calls[:1]
        called = self._parser is not None and self._parser.count > 0
        self.reason = "tool_calls" if called and reason == "stop" else reason
        return Piece(parsed.text + last.text, calls, parsed.reasoning + last.reasoning, self.reason)

    def _parse(self, text: str) -> Parsed:
        return self._parser.push(text) if self._parser else Parsed(text)
