"""Over random loops: the transcript only grows, by each turn once and each result once, in call order."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loopmux.loopevents import (
    AbandonTool,
    Action,
    AskApproval,
    AskModel,
    Decided,
    Deny,
    Fail,
    Finish,
    Limits,
    Report,
    Run,
    RunTool,
    Substitute,
    TimePassed,
    ToolFinished,
    ToolResult,
    TurnFinished,
)
from loopmux.outcome import failed, succeeded
from loopmux.results import ToolCall
from loopmux.tools import collect
from loopmux.turns import Loop
from scripted import turn


def add(a: int, b: int = 1) -> int:
    """Add."""
    return a + b


TOOLS = collect([add])


@st.composite
def calls(draw: st.DrawFn) -> tuple[ToolCall, ...]:
    made = []
    for at in range(draw(st.integers(0, 5))):
        name = draw(st.sampled_from(["add", "add", "add", "sub"]))
        arguments = draw(st.sampled_from([{"a": 1}, {"a": 2}, {"a": 3, "b": 4}, {"a": "x"}, {}]))
        error = draw(st.sampled_from([None, None, None, "broken"]))
        made.append(ToolCall(f"c{at}", name, {} if error else arguments, error, "<raw>" if error else ""))
    return tuple(made)


class Storm:
    """Plays model, tools, caller and clock at random until the loop ends."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        limits = Limits(
            max_turns=draw(st.integers(1, 6)),
            max_tool_calls=draw(st.integers(1, 12)),
            concurrency=draw(st.integers(1, 4)),
            timeout=draw(st.none() | st.just(20.0)),
            tool_timeout=5,
            stop_when_denied=draw(st.booleans()),
        )
        self.loop = Loop([{"role": "user", "content": "go"}], TOOLS, limits, draw(st.booleans()))
        self.now = 0.0
        self.asked: list[AskModel] = []
        self.turns: list[tuple[ToolCall, ...]] = []
        self.results: list[ToolResult] = []
        self.running: dict[int, RunTool] = {}
        self.end: Finish | Fail | None = None

    def play(self) -> None:
        queue = self.loop.start(self.now)
        while self.end is None:
            while queue:
                queue += self.perform(queue.pop(0))
                self.could_be_resumed()
            if self.end is None:
                queue = self.something_happens()
        assert not queue

    def could_be_resumed(self) -> None:
        """Whenever it is stopped: each call has its one answer."""
        _, *said = self.loop.transcript()
        told = [(m["tool_call_id"], m["name"]) for m in said if m["role"] == "tool"]
        assert told == [(c.id, c.name) for made in self.turns for c in made]
        Loop([{"role": "user", "content": "go"}, *said], TOOLS)

    def perform(self, action: Action) -> list[Action]:
        match action:
            case AskModel():
                assert not self.running
                self.asked.append(action)
                made = self.draw(calls())
                self.turns.append(made)
                reason = self.draw(st.sampled_from([None, None, None, None, "length"]))
                return self.loop.handle(TurnFinished(action.turn, turn("t", *made, reason=reason)), self.now)
            case AskApproval(number=number):
                decision = self.draw(st.sampled_from([Run(), Run(), Deny(), Deny("no"), Substitute(1)]))
                return self.loop.handle(Decided(number, decision), self.now)
            case RunTool():
                self.running[action.number] = action
                self.loop.began(action.number, self.now)
                assert len(self.running) <= self.loop.limits.concurrency
            case AbandonTool(number):
                self.running.pop(number)
            case Report(event):
                if isinstance(event, ToolResult):
                    self.results.append(event)
            case Finish() | Fail():
                self.end = action
        return []

    def something_happens(self) -> list[Action]:
        assert self.running, "nothing is under way and the loop has not ended"
        self.now += self.draw(st.sampled_from([0.0, 1.0, 3.0]))
        wake = self.loop.wake
        assert wake is not None
        if self.draw(st.booleans()):
            self.now = max(self.now, wake)
            return self.loop.handle(TimePassed(), self.now)
        job = self.running.pop(self.draw(st.sampled_from(sorted(self.running))))
        outcome = self.draw(st.sampled_from([succeeded(3), succeeded("x"), failed("no")]))
        return self.loop.handle(ToolFinished(job.number, outcome), self.now)


@given(st.data())
def test_every_turn_is_the_one_before_and_what_came_of_it(data: st.DataObject):
    storm = Storm(data.draw)
    storm.play()
    final = storm.loop.messages
    lists = [ask.messages for ask in storm.asked] + [final]
    assert lists[0] == [{"role": "user", "content": "go"}]
    for before, after, made in zip(lists, lists[1:], storm.turns, strict=False):
        assert after[: len(before)] == before
        assistant, *tools = after[len(before) :]
        assert assistant["role"] == "assistant"
        assert [c["id"] for c in assistant.get("tool_calls", [])] == [c.id for c in made if c.error is None]
        assert [(m["role"], m["tool_call_id"], m["name"]) for m in tools] == [("tool", c.id, c.name) for c in made]
    assert len(final) == len(lists[-2]) + 1 + len(storm.turns[-1])


@given(st.data())
def test_every_call_has_one_result_and_one_log_entry(data: st.DataObject):
    storm = Storm(data.draw)
    storm.play()
    made = [call for turn_ in storm.turns for call in turn_]
    assert len(storm.results) == len(made) == len(storm.loop.tool_log)
    assert [(e["tool"], e["args"]) for e in storm.loop.tool_log] == [(c.name, c.arguments) for c in made]


@given(st.data())
def test_limits_hold(data: st.DataObject):
    storm = Storm(data.draw)
    storm.play()
    limits = storm.loop.limits
    assert len(storm.turns) <= limits.max_turns
    ran = storm.loop.result("").tool_calls
    assert ran <= limits.max_tool_calls
    assert ran >= sum(entry["status"] == "success" for entry in storm.loop.tool_log)
    assert not storm.running
