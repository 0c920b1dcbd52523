"""From token ids to clean text, piece by piece: detokenising and stop strings. Pure; knows no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Decode = Callable[[list[int]], str]
"""Token ids to text; special tokens are the caller's to leave out."""

_HOLE = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""
_LONGEST_HOLE = 3
"""A character of 4 bytes that lacks its last one shows as at most 3 holes (one per byte, from byte fallback)."""
_WINDOW = 32
"""Tokens after which a window that still ends in holes is cut: no character spans as many."""
_CONTEXT = 8
"""Tokens kept in front when a window is cut; decoders look at most at a few neighbours."""


class Detokenizer:
    """Turns a growing list of token ids into text that only grows.

    The pieces of ``push`` and ``flush``, joined, equal the decoding of all ids at once, for every decoder that does not
    rewrite characters which are already complete. Byte fallback rewrites them: bytes in a row that end within a
    character are nothing but holes to it. There what is out stays, and what comes next is decoded by itself. Each call
    decodes a short window, so its cost does not grow with the output. Half a character is held back until the rest of
    it, or the end, has come.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""  # the window's
        self._shown = 0  # characters of it that were given out
        self._context = 0  # tokens in front of the window whose text is out; decoders look at neighbours
        self._context_length = 0  # characters of those alone

    def push(self, token: int) -> str:
        """Take one more token and return the text that is now certain."""
        out, piece = self._text[: self._shown], ""
        if not (text := self._decode([*self._window, token])).startswith(out):
            piece, text = self.flush(), self._decode([token])
        self._window.append(token)
        self._text = text
        certain = max(self._shown, len(text) - _holes_at_end(text))
        piece += text[self._shown : certain]
        self._shown = certain
        if certain == len(text) > self._context_length:
            self._advance()
        elif len(self._window) > _WINDOW:
            piece += self._cut()
        return piece

    def flush(self) -> str:
        """What is held back, and is never completed any more; what comes behind it is decoded by itself."""
        held = self._text[self._shown :]
        self._window, self._text, self._shown, self._context, self._context_length = [], "", 0, 0, 0
        return held

    def _advance(self) -> None:
        """Everything is out: the tokens since the last such moment become the context of what follows."""
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._text = self._decode(self._window)
        self._shown = self._context_length = len(self._text)

    def _cut(self) -> str:
        """Shorten a window that did not come to rest (bytes that are no text, tokens without text); what comes out."""
        window, held = self._window[-_CONTEXT:], self._text[self._shown :]
        text = self._decode(window)
        if not text.endswith(held):  # the end of a row of bytes that is broken before it
            return self.flush()
        self._window, self._text, self._shown = window, text, len(text) - len(held)
        self._context = self._context_length = 0
        return ""


def _holes_at_end(text: str) -> int:
    count = 0
    while count < min(_LONGEST_HOLE, len(text)) and text[-1 - count] == _HOLE:
        count += 1
    return count


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, whatever the pieces are.

    The string that is complete first wins; of several that are complete at the same character, the longest. Text that
    may be the beginning of a stop string is held back until it is certain that it is not.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece; returns the text that is certain, and whether a stop string (not in that text) was found."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = self._first(text)
        if found is not None:
            self._held = ""
            return text[:found], True
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What is held back, at the end of the output."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> int | None:
        """Where the stop string that ends first begins."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _possible_start(self, text: str) -> int:
        """From where on the text could still become a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
