"""A client that answers from a script: for the tool loop's shells, whose real client is tried elsewhere."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from loopmux.errors import CancelledError
from loopmux.results import FinishReason, Result, StreamEvent, TextDelta, Timing, ToolCall, Usage


def call(name: str = "add", /, identity: str = "c0", **arguments: Any) -> ToolCall:
    return ToolCall(identity, name, arguments)


def turn(text: str = "", *calls: ToolCall, reason: FinishReason | None = None, request_id: str = "r") -> Result:
    reason = reason or ("tool_calls" if calls else "stop")
    return Result(text, (), reason, Usage(10, 2, 1), Timing(), "m", None, "w", request_id, tuple(calls))


@dataclass
class ScriptedStream:
    answer: Result | BaseException
    left: list[str]
    done: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def result(self) -> Result:
        assert self.done, "the loop asked for the result before the end of the stream"
        assert isinstance(self.answer, Result)
        return self.answer

    def events(self) -> Iterator[StreamEvent]:
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.cancelled:
            raise CancelledError("the client cancelled the request")
        if self.answer.text:
            yield TextDelta(self.answer.text)
        yield from self.answer.tool_calls
        yield self.answer.usage
        self.done = True

    def __enter__(self) -> ScriptedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.left.append("finished" if self.done else "cancelled")

    def __iter__(self) -> Iterator[StreamEvent]:
        return self.events()

    async def __aenter__(self) -> ScriptedStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.left.append("finished" if self.done else "cancelled")

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        for event in self.events():
            yield event


@dataclass
class ScriptedClient:
    """Answers with ``script`` in order.

    ``requests``, ``hints`` and ``expected`` are what it was told, ``left`` how streams ended.
    """

    script: list[Result | BaseException]
    requests: list[dict[str, Any]] = field(default_factory=list)
    hints: list[tuple[str, str]] = field(default_factory=list)
    expected: list[float | None] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def stream(self, **request: Any) -> ScriptedStream:
        self.requests.append(copy.deepcopy(request))
        return ScriptedStream(self.script.pop(0), self.left)

    def hint(self, session: str, state: str, expected: float | None = None) -> None:
        self.hints.append((session, state))
        self.expected.append(expected)

    def messages(self, request: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.requests[request]["messages"]
        return found


class AsyncScriptedClient(ScriptedClient):
    async def hint(self, session: str, state: str, expected: float | None = None) -> None:  # type: ignore[override]
        super().hint(session, state, expected)
