"""The tool loop's core, told as stories: what happened in, what to do out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from loopmux.errors import BadRequestError, DeadlineExceededError, MaxTurnsError
from loopmux.loopevents import (
    AbandonTool,
    Action,
    AskApproval,
    AskModel,
    Decided,
    Decision,
    Deny,
    Event,
    Fail,
    Finish,
    HintWaiting,
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
from loopmux.outcome import Outcome, failed, succeeded
from loopmux.results import Result, ToolCall
from loopmux.tools import Tool, collect
from loopmux.turns import Loop
from scripted import call, turn


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def echo(text: str) -> str:
    """Say it again."""
    return text


TOOLS = collect([add, echo])
ADD, ECHO = TOOLS["add"], TOOLS["echo"]
USER = {"role": "user", "content": "go"}


def new(*, approval: bool = False, tools: dict[str, Tool] = TOOLS, **limits: Any) -> Loop:
    loop = Loop([USER], tools, Limits(**limits), approval)
    assert loop.start(0.0) == [AskModel(1, [USER], limits.get("timeout"))]
    return loop


def told(loop: Loop, event: Event, now: float = 0.0) -> list[Action]:
    """What follows from an event, where the shell runs at once what it is to run."""
    actions = loop.handle(event, now)
    for action in actions:
        if isinstance(action, RunTool):
            loop.began(action.number, now)
    return actions


def asked(loop: Loop, result: Result, now: float = 0.0) -> list[Action]:
    return told(loop, TurnFinished(loop.turn, result), now)


def listed(made: ToolCall) -> dict[str, Any]:
    return {"id": made.id, "type": "function", "function": {"name": made.name, "arguments": made.arguments}}


def answer(made: ToolCall, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": made.id, "name": made.name, "content": content}


def contents(loop: Loop) -> list[str]:
    return [m["content"] for m in loop.messages if m["role"] == "tool"]


def test_a_turn_keeps_its_reasoning_in_the_transcript():
    loop = new()
    asked(loop, replace(turn("", call("add", a=1, b=2)), reasoning="I add."))
    assert loop.messages[-1]["reasoning_content"] == "I add."
    loop = new()
    asked(loop, turn("hello"))
    assert "reasoning_content" not in loop.messages[-1]


def test_an_answer_without_calls_ends_the_loop():
    loop = new()
    result = turn("hello")
    actions = asked(loop, result)
    assert actions[0] == Report(TurnFinished(1, result))
    (finish,) = actions[1:]
    assert isinstance(finish, Finish)
    assert finish.result.text == "hello"
    assert finish.result.finish_reason == "stop"
    assert finish.result.messages == [USER, {"role": "assistant", "content": "hello"}]
    assert finish.result.tool_log == []
    assert (finish.result.turns, finish.result.tool_calls, finish.result.request_ids) == (1, 0, ("r",))


def test_a_call_is_run_and_its_result_goes_back():
    loop = new()
    made = call(a=1, b=2)
    result = turn("let me see", made)
    assert asked(loop, result) == [Report(TurnFinished(1, result)), HintWaiting(), RunTool(0, 1, made, ADD)]
    transcript = [
        USER,
        {"role": "assistant", "content": "let me see", "tool_calls": [listed(made)]},
        answer(made, "3"),
    ]
    assert loop.handle(ToolFinished(0, succeeded(3)), 1.0) == [
        Report(ToolResult(1, made, "success", "3", 3)),
        AskModel(2, transcript),
    ]
    assert loop.tool_log == [
        {"tool": "add", "args": {"a": 1, "b": 2}, "status": "success", "result": 3, "error": None, "iteration": 1}
    ]
    assert loop.handle(TimePassed(), 2.0) == []  # it is the model's turn


def test_results_go_back_in_call_order_whatever_order_they_came_in():
    loop = new()
    first, second, third = (call("echo", f"c{i}", text=str(i)) for i in range(3))
    actions = asked(loop, turn("", first, second, third))
    assert actions[2:] == [RunTool(0, 1, first, ECHO), RunTool(1, 1, second, ECHO), RunTool(2, 1, third, ECHO)]
    loop.handle(ToolFinished(2, succeeded("C")), 0)
    loop.handle(ToolFinished(0, succeeded("A")), 0)
    (_, ask) = loop.handle(ToolFinished(1, succeeded("B")), 0)
    assert isinstance(ask, AskModel)
    assert ask.messages[2:] == [answer(first, "A"), answer(second, "B"), answer(third, "C")]


def test_no_more_run_at_once_than_allowed():
    loop = new(concurrency=2)
    calls = [call("echo", f"c{i}", text=str(i)) for i in range(3)]
    actions = asked(loop, turn("", *calls))
    assert [a.number for a in actions if isinstance(a, RunTool)] == [0, 1]
    (_, started) = loop.handle(ToolFinished(1, succeeded("")), 0)
    assert started == RunTool(2, 1, calls[2], ECHO)


BAD_CALLS = [
    (ToolCall("c0", "add", {}, "not JSON", '{"a": 1'), "Error: the call could not be read: not JSON"),
    (call("sub", a=1), "Error: unknown tool 'sub', expected one of: add, echo"),
    (
        call(a=1),
        "Error: bad arguments for add: b: missing, expected a whole number",
    ),
    (call(a="1", b=2), 'Error: bad arguments for add: a: found "1", expected a whole number'),
    (call(a=1, b=2, c=3), "Error: bad arguments for add: c: unknown, expected a, b"),
]


@pytest.mark.parametrize(("made", "content"), BAD_CALLS)
def test_a_call_that_cannot_be_run_is_answered_with_the_reason(made: ToolCall, content: str):
    loop = new()
    _, told, ask = asked(loop, turn("", made))
    assert told == Report(ToolResult(1, made, "error", content, None, content.removeprefix("Error: ")))
    assert isinstance(ask, AskModel)
    assert ask.messages[-1] == answer(made, content)
    assert loop.tool_log[0]["status"] == "error"


def test_unknown_tool_without_any_tools():
    loop = new(tools={})
    asked(loop, turn("", call("sub")))
    assert contents(loop) == ["Error: unknown tool 'sub', expected one of: there are none"]


def test_a_malformed_call_stays_in_the_text_as_it_was_written():
    loop = new()
    broken = ToolCall("c1", "add", {}, "not JSON", '<tool_call>{"a": 1')
    good = call(a=1, b=2)
    asked(loop, turn("Hm.", broken, good))
    assert loop.messages[1] == {
        "role": "assistant",
        "content": 'Hm.\n<tool_call>{"a": 1',
        "tool_calls": [listed(good)],
    }


def test_calls_of_a_turn_that_was_cut_are_never_run():
    loop = new()
    made = call(a=1, b=2)
    actions = asked(loop, turn("so", made, reason="length"))
    assert not [a for a in actions if isinstance(a, RunTool)]
    assert isinstance(actions[-1], Finish)
    assert actions[-1].result.finish_reason == "length"
    assert actions[-1].result.messages[-1] == answer(made, "Not run: the answer was cut at max_new_tokens.")
    assert actions[-1].result.tool_calls == 0


def test_a_cut_answer_without_calls_is_an_answer():
    actions = asked(new(), turn("so", reason="length"))
    assert isinstance(actions[-1], Finish)
    assert actions[-1].result.finish_reason == "length"


def test_turns_run_out():
    loop = new(max_turns=2)
    asked(loop, turn("", call(a=1, b=2)))
    loop.handle(ToolFinished(0, succeeded(3)), 0)
    made = call(a=3, b=4)
    actions = asked(loop, turn("more", made))
    (fail,) = [a for a in actions if isinstance(a, Fail)]
    error = fail.error
    assert isinstance(error, MaxTurnsError)
    assert "max_turns=2" in str(error)
    assert error.result.finish_reason == "max_turns"
    assert error.result.text == "more"
    assert error.messages == error.result.messages
    assert error.messages[-1] == answer(made, "Not run: the limit of 2 turns was reached.")
    assert [entry["status"] for entry in error.result.tool_log] == ["success", "skipped"]


def test_calls_run_out():
    loop = new(max_tool_calls=1)
    first, second = call(a=1, b=2), call(identity="c1", a=3, b=4)
    actions = asked(loop, turn("", first, second))
    assert [a.number for a in actions if isinstance(a, RunTool)] == [0]
    actions = loop.handle(ToolFinished(0, succeeded(3)), 0)
    assert isinstance(actions[-1], Fail)
    assert isinstance(actions[-1].error, MaxTurnsError)
    assert "max_tool_calls=1" in str(actions[-1].error)
    assert contents(loop) == ["3", "Not run: the limit of 1 tool calls was reached."]


def fail_once(loop: Loop, made: ToolCall) -> list[Action]:
    actions = asked(loop, turn("", made))
    (job,) = [a for a in actions if isinstance(a, RunTool)]
    return loop.handle(ToolFinished(job.number, failed("no")), 0)


def test_the_same_call_failing_three_times_ends_the_loop():
    loop = new()
    for _ in range(2):
        assert isinstance(fail_once(loop, call(a=1, b=2))[-1], AskModel)
    finish = fail_once(loop, call(b=2, a=1))[-1]
    assert isinstance(finish, Finish)
    assert finish.result.finish_reason == "repeat"
    assert finish.result.turns == 3


def test_the_same_call_denied_three_times_ends_the_loop():
    loop = new(approval=True)
    last = []
    for number in range(3):
        asked(loop, turn("", call(a=1, b=2)))
        last.append(loop.handle(Decided(number, Deny()), 0)[-1])
    assert [type(action) for action in last] == [AskModel, AskModel, Finish]
    assert last[-1].result.finish_reason == "repeat"


def test_other_arguments_are_another_call():
    loop = new()
    for n in range(5):
        assert isinstance(fail_once(loop, call(a=n, b=2))[-1], AskModel)


def test_a_success_wipes_the_failures_out():
    loop = new(max_turns=20)
    for _ in range(3):
        fail_once(loop, call(a=1, b=2))
        (job,) = [a for a in asked(loop, turn("", call(a=1, b=2))) if isinstance(a, RunTool)]
        assert isinstance(loop.handle(ToolFinished(job.number, succeeded(3)), 0)[-1], AskModel)
    assert [type(fail_once(loop, call(a=1, b=2))[-1]) for _ in range(3)] == [AskModel, AskModel, Finish]


def test_failures_of_one_turn_count_once():
    loop = new()
    asked(loop, turn("", *(call("sub", f"c{i}", a=1) for i in range(4))))
    assert loop.turn == 2


def test_a_tool_that_takes_too_long_is_abandoned_and_its_late_result_ignored():
    loop = new(tool_timeout=5)
    asked(loop, turn("", call(a=1, b=2)), 10.0)
    assert loop.wake == 15.0
    assert loop.handle(TimePassed(), 14.9) == []
    actions = loop.handle(TimePassed(), 15.0)
    assert actions[0] == AbandonTool(0)
    assert contents(loop) == ["Error: no result within 5 s"]
    before = list(loop.messages)
    assert loop.handle(ToolFinished(0, succeeded(3)), 16.0) == []
    assert loop.messages == before


def test_the_time_of_a_queued_call_begins_when_it_starts():
    loop = new(tool_timeout=5, concurrency=1)
    asked(loop, turn("", call("echo", text="a"), call("echo", "c1", text="b")), 0.0)
    told(loop, ToolFinished(0, succeeded("a")), 4.0)
    assert loop.wake == 9.0


def test_a_tool_may_have_its_own_time():
    slow = Tool("slow", "", {"type": "object"}, add, timeout=60)
    loop = new(tools={"slow": slow}, tool_timeout=5)
    asked(loop, turn("", call("slow")), 0.0)
    assert loop.wake == 60.0


def test_the_deadline_is_shared_out_to_turns_and_tools():
    loop = new(timeout=20, tool_timeout=15)
    asked(loop, turn("", call(a=1, b=2)), 8.0)
    assert loop.wake == 20.0
    (_, ask) = loop.handle(ToolFinished(0, succeeded(3)), 12.0)
    assert isinstance(ask, AskModel)
    assert ask.timeout == 8.0


def test_a_deadline_that_passes_ends_the_loop_with_a_whole_transcript():
    loop = new(timeout=20, concurrency=1)
    running, waiting = call("echo", text="a"), call("echo", "c1", text="b")
    asked(loop, turn("", running, waiting), 15.0)
    actions = loop.handle(TimePassed(), 20.0)
    assert actions[0] == AbandonTool(0)
    assert isinstance(actions[-1], Fail)
    error = actions[-1].error
    assert isinstance(error, DeadlineExceededError)
    assert error.messages[-2:] == [
        answer(running, "Error: no result within the loop's deadline"),
        answer(waiting, "Error: not run: the loop's deadline passed"),
    ]


def test_a_call_that_the_deadline_ends_is_no_repetition():
    loop = new(timeout=10, max_failures=1)
    asked(loop, turn("", call(a=1, b=2)))
    fail = loop.handle(TimePassed(), 10.0)[-1]
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, DeadlineExceededError)


def test_nobody_is_asked_about_what_the_deadline_keeps_from_running():
    loop = new(approval=True, timeout=10)
    asked(loop, turn("", call("echo", text="a"), call("echo", "c1", text="b")))
    *reports, fail = loop.handle(Decided(0, Run()), 10.0)
    assert [type(action) for action in reports] == [Report, Report]
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, DeadlineExceededError)
    assert contents(loop) == ["Error: not run: the loop's deadline passed"] * 2


def test_a_long_result_is_cut_and_said_to_be():
    loop = new(max_result_size=4)
    asked(loop, turn("", call("echo", text="x")))
    loop.handle(ToolFinished(0, succeeded("0123456789")), 0)
    cut = "0123\n[cut: 10 characters, only the first 4 are shown]"
    assert contents(loop) == [cut]
    assert loop.tool_log[0]["result"] == cut


def test_the_caller_is_asked_in_call_order_before_anything_runs():
    loop = new(approval=True)
    calls = [call("echo", f"c{i}", text=str(i)) for i in range(3)]
    actions = asked(loop, turn("", *calls))
    assert actions[1:] == [HintWaiting(), AskApproval(0, calls[0])]
    assert loop.handle(Decided(0, Run()), 0) == [AskApproval(1, calls[1])]
    assert loop.handle(Decided(1, Deny("not today")), 0) == [
        Report(ToolResult(1, calls[1], "denied", "Denied: not today", None, "not today")),
        AskApproval(2, calls[2]),
    ]
    assert told(loop, Decided(2, Substitute({"a": 1}))) == [
        Report(ToolResult(1, calls[2], "substituted", '{"a": 1}', {"a": 1})),
        RunTool(0, 1, calls[0], ECHO),
    ]
    assert isinstance(loop.handle(ToolFinished(0, succeeded("0")), 0)[-1], AskModel)
    assert contents(loop) == ["0", "Denied: not today", '{"a": 1}']
    assert [entry["status"] for entry in loop.tool_log] == ["success", "denied", "substituted"]


def test_the_time_of_a_tool_begins_when_it_runs_not_when_it_is_allowed_to():
    loop = new(approval=True, tool_timeout=5)
    asked(loop, turn("", call("echo", text="a"), call("echo", "c1", text="b")), 0.0)
    loop.handle(Decided(0, Run()), 1.0)
    loop.handle(Decided(1, Run()), 60.0)
    loop.began(0, 61.0)
    loop.began(1, 62.0)
    assert loop.wake == 66.0


@pytest.mark.parametrize("limit", [60, math.inf])
def test_a_transcript_in_the_middle_of_a_turn_is_whole(limit: float):
    loop = new(concurrency=2, tool_timeout=limit)
    calls = [call("echo", f"c{i}", text=str(i)) for i in range(3)]
    asked(loop, turn("", call("sub", "c9"), *calls))
    assert loop.handle(ToolFinished(2, succeeded("1")), 0)[1:] == [RunTool(3, 1, calls[2], ECHO)]
    before = loop.transcript()
    assert before[2:] == [
        answer(call("sub", "c9"), "Error: unknown tool 'sub', expected one of: add, echo"),
        answer(calls[0], "Error: the loop was stopped while this ran; whether it did its work is not known"),
        answer(calls[1], "1"),
        answer(calls[2], "Not run: the loop was stopped."),
    ]
    loop.began(3, 0.0)
    loop.handle(ToolFinished(1, succeeded("0")), 0)
    loop.handle(ToolFinished(3, succeeded("2")), 0)
    assert contents(loop)[1:] == ["0", "1", "2"]
    assert loop.transcript() == loop.messages
    loop = new(approval=True)
    asked(loop, turn("", calls[0]))
    assert loop.transcript()[2:] == [answer(calls[0], "Not run: the loop was stopped.")]


def test_only_calls_that_could_be_run_are_asked_about():
    loop = new(approval=True)
    actions = asked(loop, turn("", call("sub"), call("echo", "c1", text="a")))
    assert [a for a in actions if isinstance(a, AskApproval)] == [AskApproval(1, call("echo", "c1", text="a"))]


def test_whoever_is_asked_cannot_change_the_call():
    loop = new(approval=True)
    (*_, question) = asked(loop, turn("", call("echo", text="a")))
    assert isinstance(question, AskApproval)
    question.call.arguments["text"] = "b"
    assert loop.handle(Decided(0, Run()), 0) == [RunTool(0, 1, call("echo", text="a"), ECHO)]


def test_a_denied_call_is_logged_without_result():
    loop = new(approval=True)
    asked(loop, turn("", call("echo", text="a")))
    report, _ = loop.handle(Decided(0, Deny()), 0)
    said = "Denied: the user did not allow this call."
    assert report == Report(ToolResult(1, call("echo", text="a"), "denied", said, None, None))
    assert loop.tool_log == [{"tool": "echo", "args": {"text": "a"}, "status": "denied", "iteration": 1}]
    assert contents(loop) == ["Denied: the user did not allow this call."]


@pytest.mark.parametrize("stop", [True, False])
def test_all_denied_ends_the_loop_if_so_asked(stop: bool):
    loop = new(approval=True, stop_when_denied=stop)
    asked(loop, turn("I try", call("echo", text="a"), call("echo", "c1", text="b")))
    loop.handle(Decided(0, Deny()), 0)
    last = loop.handle(Decided(1, Deny()), 0)[-1]
    if stop:
        assert isinstance(last, Finish)
        assert last.result.finish_reason == "denied"
        assert last.result.text == "I try"
    else:
        assert isinstance(last, AskModel)


def test_some_denied_goes_on():
    loop = new(approval=True, stop_when_denied=True)
    asked(loop, turn("", call("echo", text="a"), call("sub", "c1")))
    assert isinstance(loop.handle(Decided(0, Deny()), 0)[-1], AskModel)


def test_denied_calls_do_not_use_up_the_limit():
    loop = new(approval=True, max_tool_calls=1)
    asked(loop, turn("", call("echo", text="a")))
    loop.handle(Decided(0, Deny()), 0)
    asked(loop, turn("", call("echo", text="b")))
    assert loop.handle(Decided(1, Run()), 0) == [RunTool(1, 2, call("echo", text="b"), ECHO)]


@pytest.mark.parametrize("decided", [Deny(), Substitute(1)])
def test_a_call_that_is_not_run_leaves_its_place_to_the_next_of_its_turn(decided: Decision):
    loop = new(approval=True, max_tool_calls=1)
    calls = [call("echo", f"c{i}", text=str(i)) for i in range(3)]
    asked(loop, turn("", *calls))
    assert loop.handle(Decided(0, decided), 0)[1:] == [AskApproval(1, calls[1])]
    report, job = told(loop, Decided(1, Run()))  # about the third nobody is asked in vain
    assert isinstance(report, Report)
    assert job == RunTool(1, 1, calls[1], ECHO)
    assert isinstance(loop.handle(ToolFinished(1, succeeded("1")), 0)[-1], Fail)
    assert contents(loop)[1:] == ["1", "Not run: the limit of 1 tool calls was reached."]


def test_the_callers_messages_are_copied():
    given = [{"role": "user", "content": "go", "extra": {"a": [1]}}]
    loop = Loop(given, TOOLS)
    loop.start(0)
    loop.messages[0]["extra"]["a"].append(2)
    asked(loop, turn("hi"))
    assert given == [{"role": "user", "content": "go", "extra": {"a": [1]}}]


def test_arguments_in_the_transcript_are_not_those_of_the_call():
    loop = new()
    made = call("echo", text="a")
    asked(loop, turn("", made))
    made.arguments["text"] = "b"
    assert loop.messages[1]["tool_calls"][0]["function"]["arguments"] == {"text": "a"}


def test_equal_ids_in_different_turns_are_different_calls():
    loop = new()
    asked(loop, turn("", call("echo", text="a")))
    loop.handle(ToolFinished(0, succeeded("a")), 0)
    (*_, job) = asked(loop, turn("", call("echo", text="b")))
    assert job == RunTool(1, 2, call("echo", text="b"), ECHO)
    assert loop.handle(ToolFinished(0, succeeded("late")), 0) == []


ASSISTANT = {"role": "assistant", "content": "", "tool_calls": [listed(call(a=1, b=2))]}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty list"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0]"),
        ([USER, ASSISTANT], "messages[1]: its tool call 'c0' has no answer"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": ["c0"]}]}], "its tool call ['c0'] has no answer"),
        ([USER, ASSISTANT, USER], "messages[1]"),
        ([USER, ASSISTANT | {"tool_calls": 5}], "messages[1].tool_calls: found 5, expected a list of dicts"),
        ([USER, ASSISTANT | {"tool_calls": ["c0"]}], "messages[1].tool_calls: found ['c0']"),
    ],
)
def test_a_transcript_that_cannot_be_continued(messages: list[Any], said: str):
    with pytest.raises(BadRequestError) as caught:
        Loop(messages, TOOLS)
    assert said in str(caught.value)


def test_a_transcript_with_all_answers_is_resumed():
    loop = Loop([USER, ASSISTANT, answer(call(), "3"), USER], TOOLS)
    (ask,) = loop.start(0)
    assert isinstance(ask, AskModel)
    assert len(ask.messages) == 4


@pytest.mark.parametrize(
    "limits",
    [
        {"max_turns": 0},
        {"max_turns": "10"},
        {"max_tool_calls": None},
        {"concurrency": 0},
        {"tool_timeout": -1},
        {"timeout": 0},
        {"timeout": True},
        {"timeout": 10**400},  # more than a float holds
        {"tool_timeout": 10**400},
        {"max_result_size": 0},
    ],
)
def test_limits_out_of_range(limits: dict[str, Any]):
    with pytest.raises(BadRequestError) as caught:
        Limits(**limits)
    assert str(caught.value).startswith(next(iter(limits)))


def test_usage_and_ids_add_up():
    loop = new()
    asked(loop, turn("", call(a=1, b=2), request_id="r1"))
    loop.handle(ToolFinished(0, succeeded(3)), 0)
    finish = asked(loop, turn("3", request_id="r2"))[-1]
    assert isinstance(finish, Finish)
    assert finish.result.request_ids == ("r1", "r2")
    assert (finish.result.usage.prompt_tokens, finish.result.usage.completion_tokens) == (20, 4)
    assert finish.result.tool_calls == 1


def test_an_outcome_without_result_stays_without_when_cut():
    loop = new(max_result_size=10)
    asked(loop, turn("", call("echo", text="a")))
    loop.handle(ToolFinished(0, Outcome("error", "Error: " + "x" * 50, error="x" * 50)), 0)
    assert loop.tool_log[0]["result"] is None
    assert loop.tool_log[0]["error"] == "x" * 10
