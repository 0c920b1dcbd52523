"""The one state machine for text, reasoning and calls: an answer's text in pieces in, what it means out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loopmux_worker.engine.calls.output import Output, Parsed
from loopmux_worker.engine.calls.source import Marks, Source, Waiting, marks

Syntax = Callable[[Source, Output, str], Waiting[None]]
"""Reads on behind the mark that it is given."""


class Parser:
    """Splits an answer into text, reasoning and calls; the result does not depend on how the text is cut.

    Each call is given out whole, with an id that is unique in the request. One that is malformed or cut has ``error``
    and ``raw`` set. White space around calls and reasoning belongs to their layout and is dropped.
    """

    def __init__(self, source: Source, output: Output, reading: Waiting[None]) -> None:
        self._source, self._output, self._reading = source, output, reading

    @property
    def count(self) -> int:
        """Calls so far, malformed ones included."""
        return self._output.count

    def push(self, piece: str) -> Parsed:
        """Take a piece of text."""
        self._source.feed(piece)
        next(self._reading, None)
        return self._output.taken()

    def flush(self) -> Parsed:
        """The end of the answer: held text is text, an unfinished call is an error."""
        self._source.end()
        next(self._reading, None)
        self._output.end()
        return self._output.taken()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What stands around reasoning; ``label`` is a word behind ``opening`` that is no part of it."""

    opening: str
    closing: str
    label: str = ""


def prose(
    source: Source,
    output: Output,
    begins: Mapping[str, Syntax],
    tokens: tuple[str, ...],
    around: Reasoning | None,
    *,
    reasoning: bool,
) -> Waiting[None]:
    """Read text with calls and reasoning between it.

    Args:
        begins: what begins a call, and who reads it.
        tokens: what is never text: where it means nothing, it is left out.
        around: what stands around reasoning, in which nothing else is looked for.
        reasoning: it begins in the middle of reasoning.
    """
    openings = {around.opening: around} if around else {}
    stop = marks(*dict.fromkeys((*begins, *tokens)))
    mark = around.opening if around and reasoning else ""
    while mark or (mark := (yield from source.until(stop, output.text.add))):
        if mark in openings:
            yield from _reason(source, output, openings[mark], marks(*tokens))
        elif mark in begins:
            yield from begins[mark](source, output, mark)
        mark = ""


def _reason(source: Source, output: Output, around: Reasoning, stop: Marks) -> Waiting[None]:
    if around.label:
        yield from source.accept(around.label)
    while (yield from source.until(stop, output.reasoning.add)) not in (around.closing, ""):
        pass
    output.reasoning.interrupt()
    output.text.interrupt()
