"""The rules of one grammar in llguidance's dialect of Lark, and the parts that all grammars are made of. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loopmux_worker.engine.grammars import schemas


class Rules:
    """Rules as they come together.

    Args:
        added: the tokenizer's added tokens. In a grammar they are tokens of their own: as characters they never match.
        ends: token ids that end an output, which a grammar leaves to whoever uses it.
    """

    def __init__(self, added: Mapping[str, int], ends: Iterable[int]) -> None:
        self._added, self._ends = added, frozenset(ends)
        texts = sorted((text for text in added if text.strip()), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._rules = ["ANY: /(?s:.*)/", "SOME: /(?s:.+)/"]

    @property
    def written(self) -> str:
        """The grammar."""
        return "\n".join(self._rules)

    def add(self, name: str, body: str) -> str:
        """One more rule; its name."""
        self._rules.append(f"{name}: {body}")
        return name.partition("[")[0]

    def json(self, name: str, schema: Mapping[str, Any]) -> str:
        """A rule for JSON by a schema; its name."""
        return self.add(name, _json(schema))

    def pieces(self, text: str) -> list[str]:
        """A text as the tokenizer reads it, piece by piece: added tokens and characters."""
        parts, at = [], 0
        for found in self._tokens.finditer(text):
            parts += [quoted(text[at : found.start()]), f"<[{self._added[found.group()]}]>"]
            at = found.end()
        return [part for part in [*parts, quoted(text[at:])] if part]

    def is_token(self, text: str) -> bool:
        """Whether a text is one added token."""
        return text in self._added

    def text(self, text: str) -> str:
        """A text as the tokenizer reads it."""
        return " ".join(self.pieces(text))

    def prose(self, name: str, without: Iterable[str]) -> str:
        """A rule for any text, empty text included, in which some marks do not occur; its name."""
        marks = sorted(without)
        terminal = self._without(name, "SOME", marks)
        excluded = {self._added[mark] for mark in marks if mark in self._added}
        tokens = sorted(set(self._added.values()) - self._ends - excluded)
        # Two terminals never stand side by side: a mark could be halved between them
        more = f" (<[{','.join(map(str, tokens))}]> {terminal}?)*" if tokens else ""
        return self.add(name, f"{terminal}?{more}")

    def prose_up_to(self, name: str, closing: str, without: Iterable[str] = ()) -> str:
        """A rule for any text without some marks, and the mark that ends it; its name."""
        if self.is_token(closing):
            return self.add(name, f"{self.prose(f'{name}_text', {closing, *without})} {self.text(closing)}")
        marks = [mark for mark in without if mark != closing]
        terminal = self._without(name, "ANY", marks) if marks else "ANY"
        # A lazy terminal ends as soon as the mark is there
        return self.add(f"{name}[lazy]", f"{terminal} {quoted(closing)}")

    def characters(self, name: str, body: str, closing: str, after: str) -> str:
        """Characters that match ``body``, in which ``closing`` does not occur, and the text ``after`` them, as Lark.

        ``after`` is where ``closing`` is.
        """
        terminal = self._without(name, body, [closing])
        first, *rest = self.pieces(after)
        if first.startswith("<["):
            return f"{terminal} {' '.join([first, *rest])}"
        return " ".join([self.add(f"{name}_end[lazy]", f"{terminal} {first}"), *rest])

    def _without(self, name: str, body: str, marks: Iterable[str]) -> str:
        """A terminal for what matches ``body`` and holds none of some marks; its name."""
        terminal = name.upper()
        self.add(f"{terminal}_MARKED", f"ANY ({' | '.join(map(quoted, marks))}) ANY")
        return self.add(terminal, f"{body} & ~{terminal}_MARKED")


def quoted(text: str) -> str:
    """Characters in Lark; nothing for none."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def alone(schema: Mapping[str, Any]) -> str:
    """The grammar of one schema."""
    return f"start: {_json(schema)}"


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(schemas.bounded(schema))}"
