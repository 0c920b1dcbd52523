"""Loop programs at random, played by both shells to their end and stopped anywhere.

A program is what a model answers turn by turn, what its tools do, what the caller says to each call, and which limits
hold. ``Program.expected`` tells what comes of it in the plainest words and looks at none of the loop's own code.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

from loopmux import loop, options
from loopmux.errors import EngineError, LoopmuxError, MaxTurnsError
from loopmux.loopevents import Deny, LoopFinished, Run, Substitute, ToolResult, ToolStarted, TurnFinished, TurnStarted
from loopmux.results import Result, ToolCall
from loopmux.tools import Tool, ToolError
from scripted import AsyncScriptedClient, ScriptedClient, ScriptedStream, call, turn

SEEDS = range(40)
LATE = 0.02
"""Seconds that a tool gets which never returns."""
SIZE = 200
"""``max_result_size``"""


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


RETURNED: list[tuple[Any, str]] = [
    (None, "null"),
    ("", ""),
    ("half \ud83d", "half ?"),
    ("x" * 300, "x" * SIZE + f"\n[cut: 300 characters, only the first {SIZE} are shown]"),
    (float("nan"), "NaN"),
    ({1: [True, {"ä"}]}, '{"1": [true, ["ä"]]}'),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>"),
]
RAISED: list[tuple[BaseException, str]] = [
    (ToolError("word for word"), "word for word"),
    (SystemExit(2), "SystemExit: 2"),
    (GeneratorExit(), "GeneratorExit"),
    (asyncio.CancelledError(), "CancelledError"),
    (Mute(), "Mute: (its text cannot be shown)"),
    (EngineError("\udc80"), "EngineError: ?"),
]
UNREADABLE = [b"bytes", object(), (n for n in ()), 10**5000]
DECISIONS: list[tuple[Any, str, str]] = [
    (True, "", ""),
    (Run(), "", ""),
    (False, "denied", "Denied: the user did not allow this call."),
    (Deny("not \udc80"), "denied", "Denied: not ?"),
    ("instead", "substituted", "instead"),
    (Substitute([1, None]), "substituted", "[1, null]"),
]


@dataclass(frozen=True)
class Made:
    """A call, and what comes of it unless something keeps it from running; ``runs``: it reaches its tool."""

    call: ToolCall
    status: str
    content: str
    runs: bool = True


Row = tuple[str, list[ToolCall], list[Made]]
"""What is told of a turn: its text, its calls, and what came of each of them."""


class Program:
    """One loop; ``ran`` are the numbers of the calls that came to a tool."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.ran: list[int] = []
        self.over = threading.Event()
        self.limits: dict[str, Any] = {
            "max_turns": dice.choice([1, 2, 3, 9]),
            "max_tool_calls": dice.choice([1, 2, 4, 50]),
            "max_failures": dice.choice([1, 2, 3]),
            "concurrency": dice.choice([1, 2, 4]),
            "stop_when_denied": dice.random() < 0.3,
        }
        self.turns = [self._turn() for _ in range(dice.randint(0, 5))]
        self.fails = dice.random() < 0.2
        self.decisions = dice.choices(DECISIONS, k=40) if dice.random() < 0.5 else []

    def _turn(self) -> tuple[str, list[Made], str]:
        made = [self._call(f"c{at}") for at in range(self.dice.choice([1, 1, 2, 3, 5]))]
        if self.dice.random() < 0.2:
            made = [replace(one, call=replace(one.call, id="same")) for one in made]
        return self.dice.choice(["", "Hm. "]), made, self.dice.choice(["tool_calls"] * 9 + ["length"])

    def _call(self, identity: str) -> Made:
        name = self.dice.choice(["plain", "coroutine", "awaitable"])
        at, number = self.dice.randrange(100), self.dice.randrange(10**9)
        returns, raises, odd = (call(name, identity, does=it, at=at, number=number) for it in ("return", "raise", ""))
        broken = ToolCall(identity, "", error="why", raw=f"<tool_call>{number}")
        kinds = [
            Made(returns, "success", RETURNED[at % len(RETURNED)][1]),
            Made(raises, "error", "Error: " + RAISED[at % len(RAISED)][1]),
            Made(odd, "error", "Error: "),
            Made(call("late", identity), "error", f"Error: no result within {LATE:g} s"),
            Made(call("nested", identity), "success", "inner"),
            Made(call(name, identity, at="x"), "error", f"Error: bad arguments for {name}: at: ", runs=False),
            Made(broken, "error", "Error: the call could not be read: why", runs=False),
            Made(call("nobody", identity), "error", "Error: unknown tool 'nobody', expected one of: ", runs=False),
        ]
        return self.dice.choice(kinds)

    def expected(self) -> tuple[list[Row], str]:
        """What is told of each turn, and how the loop ends."""
        rows: list[Row] = []
        failures: Counter[str] = Counter()
        decisions, ran = iter(self.decisions), 0
        for text, calls, reason in self.turns:
            end = reason if reason == "length" else "max_turns" if len(rows) + 1 >= self.limits["max_turns"] else ""
            cut, came = bool(end), []
            for made in calls:
                if cut:
                    made = Made(made.call, "skipped", "Not run: ", runs=False)
                elif made.runs and ran >= self.limits["max_tool_calls"]:
                    made, end = Made(made.call, "skipped", "Not run: the limit of ", runs=False), "max_tool_calls"
                elif made.runs and self.decisions and (decided := next(decisions))[1]:
                    made = Made(made.call, *decided[1:], runs=False)
                ran += made.runs
                came.append(made)
            rows.append((text, [made.call for made in calls], came))
            bad = {str((m.call.name, m.call.raw, m.call.arguments)): m.status in ("error", "denied") for m in came}
            for key, failed in bad.items():
                failures[key] = failures[key] + 1 if failed else 0
            if self.limits["stop_when_denied"] and {made.status for made in came} == {"denied"}:
                return rows, "denied"
            if any(failures[key] >= self.limits["max_failures"] for key in bad):
                return rows, "repeat"
            if end:
                return rows, end
        return (rows, "EngineError") if self.fails else ([*rows, ("the end", [], [])], "stop")

    def script(self) -> list[Result | BaseException]:
        said = [turn(text, *(m.call for m in calls), reason=reason) for text, calls, reason in self.turns]  # type: ignore[arg-type]
        return [*said, EngineError("the engine broke") if self.fails else turn("the end")]

    def settings(self) -> dict[str, Any]:
        def plain(does: str, at: int, number: int) -> Any:
            self.ran.append(number)
            if does == "raise":
                raise RAISED[at % len(RAISED)][0]
            return RETURNED[at % len(RETURNED)][0] if does else UNREADABLE[at % len(UNREADABLE)]

        async def coroutine(**arguments: Any) -> Any:
            await asyncio.sleep(0)
            return plain(**arguments)

        def awaitable(**arguments: Any) -> Any:
            return coroutine(**arguments)

        def nested() -> str:
            return loop.run(Client([turn("", call("late")), turn("inner")]), "go", tools=[late]).text

        late = Tool("late", "", {"type": "object"}, self.over.wait, timeout=LATE)
        schema = {"type": "object", "properties": {"at": {"type": "integer"}}}
        tools = [Tool(act.__name__, "", schema, act) for act in (plain, coroutine, awaitable, nested)]
        decisions = iter(self.decisions)
        asked = {"before_tool": lambda _: next(decisions)[0]} if self.decisions else {}
        return {"tools": [*tools, late], "max_result_size": SIZE, **self.limits, **asked}

    def check(self, messages: list[dict[str, Any]], *, stopped: bool) -> None:
        """The transcript is what was to be said, up to where it was stopped, and can be sent; no call ran twice."""
        options.prepare({"messages": messages})
        first, *rest = messages
        assert first == {"role": "user", "content": "go"}
        rows, _ = self.expected()
        for text, calls, came in rows if not stopped else rows[: sum(m["role"] == "assistant" for m in rest)]:
            said, told, rest = rest[0], rest[1 : len(calls) + 1], rest[len(calls) + 1 :]
            assert said["role"] == "assistant"
            assert said["content"] == "\n".join(filter(None, [text, *(one.raw for one in calls)]))
            listed = [(one["id"], *one["function"].values()) for one in said.get("tool_calls", ())]
            assert listed == [(one.id, one.name, one.arguments) for one in calls if not one.error]
            heads = [(m["role"], m["tool_call_id"], m["name"]) for m in told]
            assert heads == [("tool", one.id, one.name) for one in calls]
            for message, made in zip(told, came, strict=True):
                unanswered = stopped and "the loop was stopped" in message["content"]
                assert unanswered or message["content"].startswith(made.content), (message, made)
        assert rest == []
        ran = Counter(made.call.arguments.get("number") for *_, came in rows for made in came if made.runs)
        del ran[None]
        assert Counter(self.ran) <= ran if stopped else Counter(self.ran) == ran


class Client(ScriptedClient):
    """Refuses what the real client would."""

    def stream(self, **request: Any) -> ScriptedStream:
        options.prepare(request)
        return super().stream(**request)


class AsyncClient(AsyncScriptedClient, Client): ...


def check_order(events: list[Any], most: int) -> None:
    """Turns come one after the other, a call's result behind its start, no more run at once than may."""
    running: Counter[str] = Counter()
    unanswered = 0
    for event in events:
        match event:
            case TurnStarted() | LoopFinished():
                assert not unanswered + running.total()
            case TurnFinished(result=result):
                unanswered = len(result.tool_calls)
            case ToolStarted(call=one):
                running[one.id] += 1
                assert running.total() <= most
            case ToolResult(call=one):
                running -= Counter([one.id])
                unanswered -= 1
    assert not any(isinstance(event, LoopFinished) for event in events[:-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_both_shells_play_a_program_to_the_end_that_the_documents_tell(seed: int):
    played = []
    for client in (Client([]), AsyncClient([])):
        program, seen = Program(seed), list[Any]()
        client.script = program.script()
        settings = {"on_event": seen.append, "session": "s", **program.settings()}
        try:
            awaited = isinstance(client, AsyncClient)
            out = asyncio.run(loop.arun(client, "go", **settings)) if awaited else loop.run(client, "go", **settings)
            end, messages = out.finish_reason, out.messages
        except LoopmuxError as error:
            end = error.result.finish_reason if isinstance(error, MaxTurnsError) else type(error).__name__
            messages = error.messages
        program.over.set()
        rows, how = program.expected()
        assert end == how
        program.check(messages, stopped=False)
        check_order(seen, program.limits["concurrency"])
        results = Counter((event.call.id, event.status) for event in seen if isinstance(event, ToolResult))
        assert results == Counter((made.call.id, made.status) for *_, came in rows for made in came)
        assert client.left.count("finished") == len(rows)
        played.append((end, messages, client.requests, client.hints, Counter(map(repr, seen))))
    assert played[0] == played[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_program_that_is_stopped_anywhere_leaves_what_was_said_by_then(seed: int):
    async def stop(events: Any, after: int, *, cancel: bool) -> None:
        async def read(most: int) -> None:
            while most and await anext(events, None):
                most -= 1

        task = asyncio.create_task(read(-1 if cancel else after))
        for _ in range(after if cancel else 0):
            await asyncio.sleep(0)
        _ = cancel and task.cancel()
        with contextlib.suppress(LoopmuxError, asyncio.CancelledError):
            await task
        await events.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for after in random.Random(seed).sample(range(1, 60), 3):
        for how in ("close", "aclose", "cancel"):
            program, client = Program(seed), AsyncClient(Program(seed).script())
            if how == "close":
                client = Client(client.script)
                events = loop.iterate(client, "go", **program.settings())
                with contextlib.suppress(LoopmuxError):
                    _ = [event for _, event in zip(range(after), events, strict=False)]
                events.close()
            else:
                events = loop.aiterate(client, "go", **program.settings())
                asyncio.run(stop(events, after, cancel=how == "cancel"))
            program.check(events.messages, stopped=True)
            program.over.set()
            assert bool(client.requests) <= [state for _, state in client.hints].count("done") <= 1
