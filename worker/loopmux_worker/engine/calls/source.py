"""A model's text as it comes in pieces, read up to marks. What is read does not depend on how the text was cut.

Syntaxes are generators: where they need more text they yield, and go on when there is more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

_T = TypeVar("_T")
Waiting = Generator[None, None, _T]
"""What reads a text: yields where it needs more of it, returns what it found."""
Keep = Callable[[str], object]
"""Told of text as it passes."""

_KEPT = 256
"""Sets of marks that are kept: some are made of the names of a request's tools."""
_NO_SPACE = re.compile(r"\S")


class Marks:
    """Some texts that are looked for at once; none of them is part of another, so that whichever ends first counts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._first = re.compile("|".join(re.escape(text[0]) for text in texts) or "(?!)")
        self._longest = max(map(len, texts), default=1)

    def held(self, text: str, start: int) -> int:
        """From where on ``text`` could still become one of them; its end if from nowhere."""
        for found in self._first.finditer(text, max(start, len(text) - self._longest + 1)):
            if any(mark.startswith(text[found.start() :]) for mark in self.texts):
                return found.start()
        return len(text)


@lru_cache(_KEPT)
def marks(*texts: str) -> Marks:
    """Marks, made once."""
    return Marks(*texts)


class Source:
    """The text that is there and not read yet: the last piece, and the beginning of a mark in front of it."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False

    def feed(self, piece: str) -> None:
        """More text."""
        self._text, self._at = self._text[self._at :] + piece, 0

    def end(self) -> None:
        """There is no more."""
        self._ended = True

    def until(self, stop: Marks, keep: Keep) -> Waiting[str]:
        """Read up to the first of some marks and past it: the mark, or nothing at the end of the text."""
        while True:
            found = stop.pattern.search(self._text, self._at)
            if found:
                self._pass(found.start(), keep)
                self._at = found.end()
                return found.group()
            self._pass(len(self._text) if self._ended else stop.held(self._text, self._at), keep)
            if self._ended:
                return ""
            yield

    def _pass(self, end: int, keep: Keep) -> None:
        if end > self._at:
            keep(self._text[self._at : end])
            self._at = end

    def space(self) -> Waiting[str]:
        """Read white space."""
        taken: list[str] = []
        while True:
            found = _NO_SPACE.search(self._text, self._at)
            self._pass(found.start() if found else len(self._text), taken.append)
            if found or self._ended:
                return "".join(taken)
            yield

    def starts(self, text: str) -> Waiting[bool]:
        """Whether that is what comes next; it is not read."""
        while True:
            ahead = self._text[self._at : self._at + len(text)]
            if ahead == text:
                return True
            if self._ended or not text.startswith(ahead):
                return False
            yield

    def accept(self, text: str) -> Waiting[bool]:
        """Read that if it comes next; whether it did."""
        came = yield from self.starts(text)
        if came:
            self._at += len(text)
        return came

    def character(self) -> Waiting[str]:
        """Read one character; nothing at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        one = self._text[self._at : self._at + 1]
        self._at += len(one)
        return one

    def done(self) -> Waiting[bool]:
        """Whether nothing comes any more."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._at == len(self._text)
