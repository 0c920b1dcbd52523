"""What a syntax makes of a model's text: clean text, reasoning, calls; taken piece by piece."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loopmux.results import ToolCall
from loopmux_worker.engine.calls.values import Call, Schemas, check


@dataclass(frozen=True, slots=True)
class Parsed:
    """What came of a piece: text outside of calls, the calls that were completed by it, reasoning."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""


class Prose:
    """Text without the white space around what interrupts it, in whose place is a line end.

    ``begun``: some came since it was interrupted.
    """

    def __init__(self) -> None:
        self.begun = False
        self._pieces: list[str] = []
        self._space: list[str] = []  # white space whose fate is open
        self._after = False  # behind something else, white space is layout until text begins
        self._any = False

    def add(self, text: str) -> None:
        """More text."""
        body = text.rstrip()
        if body:
            between = (["\n"] if self._any else []) if self._after else self._space
            self._pieces += [*between, body.lstrip() if self._after else body]
            self._space, self._after, self._any, self.begun = [], False, True, True
        self._space.append(text[len(body) :])

    def interrupt(self) -> None:
        """Something else comes in between: the white space around it is layout."""
        self._space, self._after, self.begun = [], True, False

    def end(self) -> None:
        """Nothing else comes: open white space was text."""
        if not self._after:
            self._pieces += self._space
        self._space = []

    def taken(self) -> str:
        """What is certain since the last time."""
        text, self._pieces = "".join(self._pieces), []
        return text


class Output:
    """Collects what comes of a request's text.

    Args:
        request: the request's id; the call ids begin with three of its bytes, so that calls of several turns differ.
        schemas: what the tools' parameters look like, for syntaxes whose values have no types.
        tokens: marks that are never text.
    """

    def __init__(self, request: bytes, schemas: Schemas, tokens: Iterable[str]) -> None:
        self.schemas = schemas
        self.text = Prose()
        self.reasoning = Prose()
        self.reasoning.interrupt()
        self.count = 0
        """Calls so far, malformed ones included."""
        self._request = request[:3].hex()
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._calls: list[ToolCall] = []

    def say(self, text: str) -> None:
        """Text that was looked at as something else, and may have marks in it."""
        self.text.add(self._tokens.sub("", text))

    def call(self, raw: str, read: Callable[[str], Call], *, whole: bool = True) -> None:
        """A call, by its text; one that is malformed, or not ``whole``, has ``error`` set, and its text."""
        self.text.interrupt()
        # nine letters and digits: the templates of Mistral's models take no other ids
        call_id = f"{self._request}{self.count:03}"
        self.count += 1
        self._calls.append(_read(raw, call_id, read) if whole else _cut(raw, call_id))

    def end(self) -> None:
        """The end of the text."""
        self.reasoning.interrupt()
        if self.count:
            self.text.interrupt()
        self.text.end()

    def taken(self) -> Parsed:
        """What came since the last time."""
        parsed = Parsed(self.text.taken(), tuple(self._calls), self.reasoning.taken())
        self._calls = []
        return parsed


def _cut(raw: str, call_id: str) -> ToolCall:
    return ToolCall(call_id, "", error="the call was cut off before its end: write it again, whole", raw=raw)


def _read(raw: str, call_id: str, read: Callable[[str], Call]) -> ToolCall:
    try:
        name, arguments = read(raw)
        check(name, arguments)
    except (ValueError, RecursionError) as error:
        return ToolCall(call_id, "", error=f"malformed tool call: {error}", raw=raw)
    return ToolCall(call_id, name, arguments)  # with its text, too, it would be sent twice
