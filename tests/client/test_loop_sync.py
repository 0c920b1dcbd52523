"""The loop's sync shell: threads, approval, observers, sessions, errors."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

import loopmux
from fakebroker import FakeBroker
from loopmux import codec, loop, options, transcript, turns
from loopmux.errors import (
    BadRequestError,
    CancelledError,
    ConnectionLostError,
    DeadlineExceededError,
    MaxTurnsError,
    ToolLoopError,
    ToolNotFoundError,
    WorkerLostError,
)
from loopmux.loopevents import (
    Deny,
    LoopFinished,
    Run,
    Substitute,
    ToolResult,
    ToolStarted,
    TurnFinished,
    TurnStarted,
)
from loopmux.messages import Generate
from loopmux.results import TextDelta, ToolCall, Usage
from loopmux.tools import Tool, schemas
from loopmux.wire import Kind
from scripted import AsyncScriptedClient, ScriptedClient, call, turn


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def run(client: ScriptedClient, *, tools: Any = (add,), **settings: Any) -> loop.ToolLoopResult:
    return loop.run(client, "go", tools=tools, **settings)


def test_a_whole_loop():
    client = ScriptedClient([turn("", call(a=12, b=30)), turn("It is 42.")])
    out = run(client, temperature=0)
    assert out.text == "It is 42."
    assert [m["role"] for m in out.messages] == ["user", "assistant", "tool", "assistant"]
    assert out.messages[2]["content"] == "42"
    assert (out.turns, out.tool_calls, out.finish_reason, out.usage.prompt_tokens) == (2, 1, "stop", 20)
    assert [r["temperature"] for r in client.requests] == [0, 0]
    assert client.requests[0]["tools"] == client.requests[1]["tools"] == schemas([add])
    assert client.left == ["finished", "finished"]


def test_all_turns_share_one_session_and_the_broker_is_told_when_to_wait():
    client = ScriptedClient([turn("", call(a=1, b=2)), turn("3")])
    out = run(client)
    assert out.session
    assert [r["session"] for r in client.requests] == [out.session] * 2
    assert [r["continues"] for r in client.requests] == [False, True]
    assert client.hints == [(out.session, "waiting_on_tool"), (out.session, "done")]
    assert run(ScriptedClient([turn("x")])).session != out.session


def test_the_broker_is_told_how_long_the_tools_take_once_that_is_known():
    def wait(a: int) -> int:
        """Wait."""
        time.sleep(0.02)
        return a

    client = ScriptedClient([turn("", call("wait", a=n), call("add", a=n, b=1)) for n in range(2)] + [turn("done")])
    run(client, tools=[wait, add])
    first, second, end = client.expected
    assert (first, end) == (None, None)
    assert second is not None
    assert 0.02 <= second < 5, "the longest of them"


def test_where_somebody_is_asked_first_nobody_knows():
    client = ScriptedClient([turn("", call(a=n, b=1)) for n in range(2)] + [turn("done")])
    run(client, before_tool=lambda _: True)
    assert client.expected == [None] * 3


def test_a_turn_goes_back_with_the_ids_that_the_model_produced():
    said = [dataclasses.replace(turn("", call(a=1, b=n)), token_ids=(7, 8, n)) for n in range(2)]
    client = ScriptedClient([*said, turn("3")])
    out = run(client)
    assert not any("token_ids" in message for message in [*client.messages(0), *out.messages])
    assert [m.get("token_ids") for m in client.messages(2)] == [None, [7, 8, 0], None, [7, 8, 1], None]


def test_more_ids_than_a_list_may_have_can_be_sent():
    said = dataclasses.replace(turn("", call(a=1, b=2)), token_ids=tuple(range(codec.BODY_LIMITS.array + 1)))
    client = ScriptedClient([said, turn("3")])
    run(client)
    codec.unpack(Generate, options.prepare(client.requests[1]).body, codec.BODY_LIMITS)


def test_a_session_of_the_callers():
    client = ScriptedClient([turn("", call(a=1, b=2)), turn("3")])
    assert run(client, session="mine").session == "mine"
    assert client.hints == [("mine", "waiting_on_tool")]  # it may come back with another loop: who named it knows


def test_a_broken_connection_does_not_spoil_a_result_that_is_there():
    class Lost(ScriptedClient):
        def hint(self, session: str, state: str, expected: float | None = None) -> None:
            raise ConnectionLostError("gone")

    assert run(Lost([turn("", call(a=1, b=2)), turn("3")])).text == "3"


def test_observers_see_everything_in_order():
    made = call(a=1, b=2)
    first, second = turn("Hm", made), turn("3")
    seen: list[Any] = []
    out = run(ScriptedClient([first, second]), on_event=seen.append)
    usage = Usage(10, 2, 1)
    assert seen == [
        TurnStarted(1),
        TextDelta("Hm"),
        made,
        usage,
        TurnFinished(1, first),
        ToolStarted(1, made),
        ToolResult(1, made, "success", "3", 3),
        TurnStarted(2),
        TextDelta("3"),
        usage,
        TurnFinished(2, second),
        LoopFinished(out),
    ]
    assert list(loop.iterate(ScriptedClient([first, second]), "go", tools=[add], session=out.session)) == seen


def test_parallel_calls_run_at_the_same_time():
    meet = threading.Barrier(3, timeout=10)

    def together(n: int) -> int:
        meet.wait()
        return n

    calls = [call("together", f"c{n}", n=n) for n in range(3)]
    out = run(ScriptedClient([turn("", *calls), turn("done")]), tools=[together])
    assert [m["content"] for m in out.messages if m["role"] == "tool"] == ["0", "1", "2"]


def test_no_more_at_once_than_allowed():
    lock, now, most = threading.Lock(), [0], [0]
    two = threading.Barrier(2, timeout=20)

    def busy(n: int) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        two.wait()
        time.sleep(0.01)  # long enough for a third one to be noticed, were it started
        with lock:
            now[0] -= 1

    calls = [call("busy", f"c{n}", n=n) for n in range(8)]
    run(ScriptedClient([turn("", *calls), turn("done")]), tools=[busy], concurrency=2)
    assert most == [2]


@pytest.mark.parametrize("seconds", [float("inf"), 1e10])
def test_a_tool_may_take_as_long_as_it_likes(seconds: float):
    out = run(ScriptedClient([turn("", call(a=1, b=2)), turn("3")]), tool_timeout=seconds)
    assert [entry["result"] for entry in out.tool_log] == [3]


def test_a_loop_is_cancelled_from_another_thread_while_tools_run():
    ran = threading.Event()

    def wait(a: int) -> int:
        """Wait."""
        ran.set()
        threading.Event().wait()
        return a

    client = ScriptedClient([turn("", call("wait", a=1))])
    events = loop.iterate(client, "go", tools=[wait])
    threading.Thread(target=lambda: ran.wait() and events.cancel()).start()
    with pytest.raises(CancelledError, match="the loop was cancelled") as caught:
        list(events)
    assert [m["role"] for m in caught.value.messages] == ["user", "assistant", "tool"]
    assert client.hints[-1] == (events._loop.session, "done")
    assert list(events) == []


def test_a_loop_is_cancelled_from_another_thread_while_the_model_answers(tmp_path: Path):
    with FakeBroker(f"ipc://{tmp_path / 'b'}") as broker, loopmux.Client(broker.endpoint, model="hang") as client:
        events = client.iter_tools("go", tools=[add])

        def stop() -> None:
            broker.wait_for(Kind.SUBMIT)
            events.cancel()

        threading.Thread(target=stop).start()
        with pytest.raises(CancelledError) as caught:
            list(events)
        broker.wait_for(Kind.CANCEL)
    assert caught.value.messages == [{"role": "user", "content": "go"}]


@pytest.mark.parametrize("when", [TurnStarted, ToolStarted, ToolResult, TurnFinished])
def test_a_cancelled_loop_does_nothing_more(when: type):
    client = ScriptedClient([turn("", call(a=1, b=2)), turn("3")])
    events = loop.iterate(client, "go", tools=[add])
    while not isinstance(next(events), when):
        pass
    events.cancel()
    with pytest.raises(CancelledError):
        next(events)
    assert len(client.requests) == (when is not TurnStarted)


def test_a_tool_that_never_returns_is_left_behind():
    forever = threading.Event()

    def hang() -> None:
        forever.wait()

    out = run(ScriptedClient([turn("", call("hang")), turn("gave up")]), tools=[hang], tool_timeout=0.05)
    assert out.text == "gave up"
    assert out.messages[2]["content"] == "Error: no result within 0.05 s"
    assert out.tool_log[0]["status"] == "error"
    forever.set()


def test_the_time_of_observers_is_none_of_a_tools():
    def slow(event: Any) -> None:
        if isinstance(event, ToolStarted):
            time.sleep(1.2)

    client = ScriptedClient([turn("", call(a=1, b=2), call(a=3, b=4)), turn("ok")])
    assert [entry["result"] for entry in run(client, on_event=slow, tool_timeout=1.0).tool_log] == [3, 7]


def test_a_tool_that_never_returns_does_not_hang_the_program():
    program = """
import threading
from loopmux import loop
from scripted import AsyncScriptedClient, ScriptedClient, call, turn

def hang() -> None:
    threading.Event().wait()

print(loop.run(ScriptedClient([turn("", call("hang")), turn("ok")]), "go", tools=[hang], tool_timeout=0.01).text)
"""
    assert play(program) == (0, "ok\n", "")


def test_a_program_may_end_in_the_middle_of_a_loop():
    program = """
import loopmux

def add(a: int, b: int) -> int:
    return a + b

client = loopmux.Client("ipc:///nobody/there")
events = client.iter_tools("go", tools=[add])
print(next(events))
"""
    assert play(program) == (0, "TurnStarted(turn=1)\n", "")


def play(program: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_tools_see_the_callers_context():
    who = contextvars.ContextVar("who", default="nobody")
    who.set("me")

    def ask() -> str:
        return who.get()

    assert run(ScriptedClient([turn("", call("ask")), turn("ok")]), tools=[ask]).tool_log[0]["result"] == "me"


def test_observers_and_approval_stay_in_the_callers_thread():
    threads: set[threading.Thread] = set()

    def note(_: Any) -> bool:
        threads.add(threading.current_thread())
        return True

    run(ScriptedClient([turn("", call(a=1, b=2)), turn("3")]), on_event=note, before_tool=note)
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize(
    ("answer", "content", "ran"),
    [
        (Run(), "3", True),
        (True, "3", True),
        (Deny("no sums"), "Denied: no sums", False),
        (Deny("no \ud800 sums"), "Denied: no ? sums", False),
        (Deny(reason=None), "Denied: the user did not allow this call.", False),
        (False, "Denied: the user did not allow this call.", False),
        (Substitute({"sum": 4}), '{"sum": 4}', False),
        ("four", "four", False),
    ],
)
def test_what_before_tool_may_answer(answer: Any, content: str, ran: bool):
    runs: list[int] = []

    def count(a: int, b: int) -> int:
        runs.append(a)
        return a + b

    out = run(
        ScriptedClient([turn("", call("count", a=1, b=2)), turn("ok")]), tools=[count], before_tool=lambda _: answer
    )
    assert out.messages[2]["content"] == content
    assert bool(runs) is ran


def test_an_answer_that_is_none_of_them_is_refused_and_nothing_runs():
    def forgetful(_: ToolCall) -> None: ...

    ran: list[int] = []
    tool = Tool("t", "", {"type": "object"}, lambda: ran.append(1))
    with pytest.raises(ToolLoopError, match="before_tool answered None for 't'") as caught:
        run(ScriptedClient([turn("", call("t")), turn("ok")]), tools=[tool], before_tool=forgetful)
    assert ran == []
    assert caught.value.messages[-1]["content"] == "Not run: the loop was stopped."
    assert loop.run(ScriptedClient([turn("ok")]), caught.value.messages, tools=[tool]).text == "ok"


class Enough(Exception):
    pass


def test_what_before_tool_raises_comes_out_and_the_transcript_is_kept():
    def approve(made: ToolCall) -> bool:
        if made.arguments["a"] == 2:
            raise Enough
        return True

    script = [turn("", call(a=1, b=2)), turn("", call(a=2, b=2))]
    with pytest.raises(Enough):
        run(ScriptedClient(list(script)), before_tool=approve)
    events = loop.iterate(ScriptedClient(list(script)), "go", tools=[add], before_tool=approve)
    with pytest.raises(Enough):
        list(events)
    assert [m["content"] for m in events.messages if m["role"] == "tool"] == ["3", "Not run: the loop was stopped."]
    assert loop.run(ScriptedClient([turn("ok")]), events.messages, tools=[add]).text == "ok"


def test_coroutine_functions_are_not_called_where_nobody_awaits_them():
    async def note(_: Any) -> bool:
        return True

    client = ScriptedClient([])
    with pytest.raises(BadRequestError, match="before_tool: found a coroutine function, which AsyncClient awaits"):
        run(client, before_tool=note)
    with pytest.raises(BadRequestError, match="on_event: found a coroutine function"):
        run(client, on_event=note)


def test_a_transcript_that_was_cut_anywhere_goes_on_or_says_what_is_missing():
    calls = [call("add", f"c{n}", a=n, b=1) for n in range(2)]
    whole = json.loads(json.dumps(run(ScriptedClient([turn("Hm", *calls), turn("done")])).messages))
    for size in range(1, len(whole) + 1):
        client = ScriptedClient([turn("ok")])
        missing = [c for c in calls if size > 1 and not any(m.get("tool_call_id") == c.id for m in whole[:size])]
        if missing:
            with pytest.raises(BadRequestError, match=f"its tool call '{missing[0].id}' has no answer: append"):
                loop.run(client, whole[:size], tools=[add])
        answers = [{"role": "tool", "tool_call_id": c.id, "name": c.name, "content": "lost"} for c in missing]
        assert loop.run(client, [*whole[:size], *answers], tools=[add]).text == "ok"
        assert client.messages(0) == [*whole[:size], *answers]


def test_the_transcript_is_whole_and_true_at_every_line_of_the_loops_code():
    """Which Ctrl-C may end, and a tool's thread may look from."""
    made = [call("note", f"c{n}", n=n) for n in range(4)]
    ran: list[str] = []
    seen: list[list[str]] = []

    def note(n: int) -> None:
        ran.append(f"c{n}")

    def look(frame: types.FrameType, what: str, _: Any) -> Any:
        if frame.f_code.co_filename not in (turns.__file__, transcript.__file__):
            return None
        if what == "line":
            sys.settrace(None)
            told = [m for m in events.messages if m["role"] == "tool"]
            seen.append([m["tool_call_id"] for m in told])
            assert seen[-1] == [c["id"] for m in events.messages for c in m.get("tool_calls", ())]
            assert not [m for m in told if m["content"].startswith("Not run") and m["tool_call_id"] in ran]
            sys.settrace(look)
        return look

    script = [turn("a", *made[:3]), turn("b", made[3]), turn("c")]
    events = loop.iterate(ScriptedClient(script), "go", tools=[note])
    before = sys.gettrace()
    sys.settrace(look)
    try:
        list(events)
    finally:
        sys.settrace(before)
    assert [len(ids) for ids in seen] == sorted(len(ids) for ids in seen)
    assert {len(ids) for ids in seen} == {0, 3, 4}


def test_max_turns_carries_everything():
    client = ScriptedClient([turn("", call(a=n, b=1)) for n in range(3)])
    with pytest.raises(MaxTurnsError, match="max_turns=3") as caught:
        run(client, max_turns=3)
    assert caught.value.result.turns == 3
    assert caught.value.messages == caught.value.result.messages
    assert client.hints[-1][1] == "done"


def test_messages_may_be_any_mappings():
    message = types.MappingProxyType({"role": "user", "content": "go"})
    out = loop.run(ScriptedClient([turn("done")]), (message,), tools=[add])
    assert out.messages == [{"role": "user", "content": "go"}, {"role": "assistant", "content": "done"}]


def test_a_loop_is_resumed_from_the_messages_of_an_error():
    client = ScriptedClient([turn("", call(a=1, b=2)), WorkerLostError("gone", partial_text="It i"), turn("3")])
    with pytest.raises(WorkerLostError) as caught:
        run(client)
    messages = caught.value.messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert caught.value.partial_text == "It i"
    assert client.hints[-1][1] == "done"
    out = loop.run(client, messages, tools=[add])
    assert out.text == "3"
    assert client.messages(2) == messages


def test_a_finished_loop_is_carried_on():
    client = ScriptedClient([turn("", call(a=1, b=2)), turn("3"), turn("still 3")])
    first = run(client)
    before = list(first.messages)
    second = loop.run(client, [*first.messages, {"role": "user", "content": "sure?"}], tools=[add])
    assert first.messages == before
    assert client.messages(2) == [*before, {"role": "user", "content": "sure?"}]
    assert second.messages[: len(before)] == before


def test_the_callers_list_is_never_changed():
    mine = [{"role": "user", "content": "go"}]
    loop.run(ScriptedClient([turn("", call(a=1, b=2)), turn("3")]), mine, tools=[add])
    assert mine == [{"role": "user", "content": "go"}]


def test_the_deadline_of_the_whole_loop():
    client = ScriptedClient([turn("", call("hang"))])
    done = threading.Event()
    with pytest.raises(DeadlineExceededError, match="deadline of 1 s") as caught:
        run(client, tools=[Tool("hang", "", {"type": "object"}, lambda: done.wait())], timeout=1.0)
    done.set()
    assert [m["role"] for m in caught.value.messages] == ["user", "assistant", "tool"]
    assert 0 < client.requests[0]["timeout"] <= 1.0 + 1e-6  # a difference of two clock readings


def test_without_a_deadline_each_turn_keeps_its_own():
    client = ScriptedClient([turn("x")])
    run(client)
    assert "timeout" not in client.requests[0]


@pytest.mark.parametrize(
    ("choice", "sent"), [("required", ["required", "auto"]), ("add", ["add", "auto"]), ("auto", ["auto", "auto"])]
)
def test_a_forced_call_is_forced_once(choice: str, sent: list[str]):
    client = ScriptedClient([turn("", call(a=1, b=2)), turn("3")])
    run(client, tool_choice=choice)
    assert [r["tool_choice"] for r in client.requests] == sent


def test_a_tool_choice_that_is_not_there():
    client = ScriptedClient([])
    with pytest.raises(ToolNotFoundError, match="'sub', expected auto, none, required or a tool of: add") as caught:
        run(client, tool_choice="sub")
    assert caught.value.messages == [{"role": "user", "content": "go"}]
    assert client.requests == []


@pytest.mark.parametrize(
    ("messages", "tools", "settings"),
    [
        ([], [add], {}),
        (3, [add], {}),
        ({"role": "user"}, [add], {}),
        ([{"role": "user", "content": threading.Lock()}], [add], {}),
        ("go", add, {}),
        ("go", [add, add], {}),
        ("go", [add], {"max_turns": 0}),
        ("go", [add], {"max_result_size": 1e4}),
        ("go", [add], {"tool_timeout": float("nan")}),
        ("go", [add], {"before_tool": True}),
        ("go", [add], {"messages": [{"role": "user", "content": "go"}]}),
        ("go", [add], {"concurrency": 0}),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_sent(messages: Any, tools: Any, settings: dict[str, Any]):
    client = ScriptedClient([])
    with pytest.raises(BadRequestError):
        loop.iterate(client, messages, tools=tools, **settings)
    assert client.requests == client.hints == []


@pytest.mark.parametrize(
    ("slip", "meant"), [("max_turn", "max_turns"), ("tooltimeout", "tool_timeout"), ("before_tools", "before_tool")]
)
def test_a_slip_in_the_name_of_a_limit_is_told_before_anything_is_sent(slip: str, meant: str):
    client = ScriptedClient([])
    with pytest.raises(BadRequestError, match=f"unknown option '{slip}': did you mean '{meant}'") as caught:
        run(client, **{slip: 3})
    assert caught.value.messages == [{"role": "user", "content": "go"}]
    assert client.requests == []


def test_an_observer_that_cannot_be_called_is_refused_before_anything_is_sent():
    client = ScriptedClient([])
    with pytest.raises(BadRequestError, match=r"on_event: found \[\] \(list\), expected a function"):
        run(client, on_event=[])
    assert client.requests == client.hints == []


def test_a_limit_may_be_infinite():
    out = run(ScriptedClient([turn("", call(a=1, b=2)), turn("3")]), max_turns=math.inf, max_result_size=math.inf)
    assert out.messages[2]["content"] == "3"


def test_an_observer_that_raises_ends_the_loop_and_cancels_the_turn():
    def observer(event: Any) -> None:
        if isinstance(event, TextDelta):
            raise Enough

    client = ScriptedClient([turn("text", call(a=1, b=2))])
    with pytest.raises(Enough):
        run(client, on_event=observer)
    assert client.left == ["cancelled"]
    assert client.hints[-1][1] == "done"


def test_leaving_the_iteration_cancels_the_turn():
    client = ScriptedClient([turn("text")])
    events = loop.iterate(client, "go", tools=[add])
    assert [next(events), next(events)] == [TurnStarted(1), TextDelta("text")]
    events.close()
    assert client.left == ["cancelled"]
    assert events.messages == [{"role": "user", "content": "go"}]


def test_a_loop_without_tools():
    assert run(ScriptedClient([turn("hi")]), tools=None).text == "hi"


class Mock:
    """It has whatever it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return lambda **_: self


@pytest.mark.parametrize("given", [object(), Mock(), 10**5000], ids=["object", "mock", "long number"])
def test_a_substituted_result_without_a_json_form_ends_the_loop_with_its_messages(given: Any):
    script = [turn("", call(a=1, b=2)), turn("ok")]
    with pytest.raises(ToolLoopError, match="substitutes a result for 'add' that has no JSON form: ") as caught:
        run(ScriptedClient(script), before_tool=lambda _: Substitute(given))
    assert caught.value.messages[0]["role"] == "user"


@pytest.mark.parametrize("kind", [loopmux.Client, loopmux.AsyncClient])
def test_a_clients_own_session_and_tool_choice_hold_for_its_loops_as_if_they_were_given(
    kind: Any, monkeypatch: pytest.MonkeyPatch
):
    scripted = ScriptedClient if kind is loopmux.Client else AsyncScriptedClient
    script = scripted([turn("", call(a=1, b=2)), turn("3")] * 2)
    client = kind("ipc:///nobody", session="s", tool_choice="required")
    monkeypatch.setattr(client, "stream", script.stream)
    monkeypatch.setattr(client, "hint", script.hint)

    async def iterate() -> None:
        async for _ in client.iter_tools("go", tools=[add]):
            pass

    if kind is loopmux.Client:
        client.run_tools("go", tools=[add])
        list(client.iter_tools("go", tools=[add]))
    else:
        asyncio.run(client.run_tools("go", tools=[add]))
        asyncio.run(iterate())
    told = [(request["session"], request["tool_choice"]) for request in script.requests]
    assert told == [("s", "required"), ("s", "auto")] * 2
    assert {session for session, _ in script.hints} == {"s"}


def test_a_tool_choice_of_none_is_none_at_all():
    assert run(ScriptedClient([turn("hi")]), tool_choice=None).text == "hi"
