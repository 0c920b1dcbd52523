"""Control tokens in what users, tools and earlier turns say stay text. Pure.

A tool result that holds ``<|im_end|>`` is read as those ten characters: it is marked before a template sees it, and
encoded in two halves. transformers 5 does the like (``sanitize_control_tokens``), but gives no text that a conversation
could be continued in, and older ones do not have it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private use: around a control token found in content


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: str | None
    added_tokens_decoder: Mapping[int, Any]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text to ids."""
        ...

    def decode(self, token_ids: list[int], **kwargs: Any) -> Any:
        """Ids to text."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """Messages to text or ids."""
        ...


class Found(NamedTuple):
    """A control token in a text, or what looks like one in content; ``own`` is one that the template wrote."""

    token: str
    start: int
    stop: int
    own: bool


class Marks:
    """Tells a tokenizer's control tokens from content that looks like them.

    Attributes:
        tokens: those that content must not turn into, longest first: special ones, and other added ones that the chat
            template writes. What else was added (words of a trade, say) is text like any other.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        template = str(tokenizer.chat_template)
        added = {number: (token.content, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
        self._ids = {text: n for n, (text, special) in added.items() if text.strip() and (special or text in template)}
        self.tokens = sorted(self._ids, key=len, reverse=True)
        token = "|".join(map(re.escape, self.tokens)) or "(?!)"
        self._token = re.compile(token)
        self._marked = re.compile(f"{_OPEN}({token}){_CLOSE}|[{_OPEN}{_CLOSE}]")
        self._either = re.compile(f"{_OPEN}({token}){_CLOSE}|({token})")

    def mark(self, value: Any) -> Any:
        """Content (texts, or maps and lists of them) with its control tokens marked; keys stay as they are."""
        if isinstance(value, str):
            bare = value.replace(_OPEN, "").replace(_CLOSE, "")
            return self._token.sub(f"{_OPEN}\\g<0>{_CLOSE}", bare)
        if isinstance(value, Mapping):
            return {key: self.mark(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(entry) for entry in value]
        return value

    def encode(self, text: str, *, start: bool) -> list[int]:
        """The ids of a whole text; with ``start`` behind what the tokenizer puts in front of one."""
        first, *rest = self._marked.split(text)
        return self._encode(first, start=start) + self._encode_pieces(rest)

    def encode_inside(self, text: str) -> list[int]:
        """The ids of a text that stands behind others."""
        return self._encode_pieces([None, *self._marked.split(text)])

    def found(self, text: str, start: int) -> list[Found]:
        """The control tokens in a text from ``start`` on, and what looks like them in content."""
        matches = self._either.finditer(text, start)
        return [Found(m[1] or m[2], m.start(), m.end(), m[1] is None) for m in matches]

    def said(self, ids: list[int]) -> list[str]:
        """The control tokens among ids, and what looks like them in their text."""
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return list(self._token.findall(str(text)))

    def among(self, token: str, ids: Collection[int]) -> bool:
        """Whether a control token's id is one of these."""
        return self._ids[token] in ids

    def _encode_pieces(self, pieces: list[str | None]) -> list[int]:
        """Ids of what was split at marks: in turn a marked control token, or None for a mark that a template tore off
        its other half, and the text behind it.
        """
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if not piece:
                continue
            ids += self._inside(piece) if i % 2 else self._inside(piece[:1]) + self._inside(piece[1:])
        return ids

    def _encode(self, text: str, *, start: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=start))

    def _inside(self, text: str) -> list[int]:
        """Encode text that stands inside other text: some tokenizers put a space in front of whatever begins."""
        if not text:
            return []
        line = self._encode("\n", start=False)
        ids = self._encode("\n" + text, start=False)
        return ids[len(line) :] if line and ids[: len(line)] == line else self._encode(text, start=False)
