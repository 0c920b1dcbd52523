"""The loop's asyncio shell: coroutine tools, threads, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from loopmux import loop
from loopmux.errors import BadRequestError, DeadlineExceededError, MaxTurnsError, ToolLoopError, WorkerLostError
from loopmux.loopevents import Deny, LoopFinished, ToolResult, ToolStarted, TurnStarted
from loopmux.results import Result, TextDelta, ToolCall
from loopmux.tools import Tool
from scripted import AsyncScriptedClient, ScriptedClient, call, turn

T = TypeVar("T")


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def slow_add(a: int, b: int) -> int:
    """Add two numbers, with a pause."""
    await asyncio.sleep(0)
    return a + b


def run(client: ScriptedClient, *, tools: Any = (add, slow_add), **settings: Any) -> loop.ToolLoopResult:
    return wait(loop.arun(client, "go", tools=tools, **settings))


def wait(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


@pytest.mark.parametrize("name", ["add", "slow_add"])
def test_the_same_loop_as_without_asyncio(name: str):
    script = [turn("Hm", call(name, a=12, b=30)), turn("It is 42.")]
    seen: list[Any] = []
    client = AsyncScriptedClient(list(script))
    out = run(client, on_event=seen.append, session="s")
    sync_client, sync_seen = ScriptedClient(list(script)), []
    expected = loop.run(sync_client, "go", tools=[add, slow_add], on_event=sync_seen.append, session="s")
    assert out == expected
    assert seen == sync_seen
    assert client.requests == sync_client.requests
    assert client.hints == sync_client.hints
    assert client.left == ["finished", "finished"]


def test_coroutine_and_plain_tools_run_at_the_same_time():
    started, both = threading.Event(), threading.Event()

    def plain() -> bool:
        started.set()
        return both.wait(10)

    async def coroutine() -> bool:
        while not started.is_set():  # the plain tool's thread runs while this loop does
            await asyncio.sleep(0.001)
        both.set()
        return True

    out = run(
        AsyncScriptedClient([turn("", call("plain"), call("coroutine", "c1")), turn("ok")]), tools=[plain, coroutine]
    )
    assert [entry["result"] for entry in out.tool_log] == [True, True]


def test_async_callbacks_are_awaited():
    async def deny(_: ToolCall) -> Deny:
        await asyncio.sleep(0)
        return Deny("no")

    seen: list[Any] = []

    async def note(event: Any) -> None:
        await asyncio.sleep(0)
        seen.append(event)

    out = run(AsyncScriptedClient([turn("", call(a=1, b=2)), turn("ok")]), before_tool=deny, on_event=note)
    assert out.tool_log == [
        {"tool": "add", "args": {"a": 1, "b": 2}, "status": "denied", "error": "no", "iteration": 1}
    ]
    assert isinstance(seen[-1], LoopFinished)


def test_a_coroutine_tool_that_takes_too_long_is_cancelled_and_the_loop_goes_on():
    async def main() -> loop.ToolLoopResult:
        cancelled = asyncio.Event()

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async def see(event: Any) -> None:
            if event == TurnStarted(2):
                await cancelled.wait()

        client = AsyncScriptedClient([turn("", call("hang")), turn("gave up")])
        return await loop.arun(client, "go", tools=[hang], tool_timeout=0.05, on_event=see)

    assert wait(main()).messages[2]["content"] == "Error: no result within 0.05 s"


def test_ctrl_c_in_a_coroutine_tool_ends_the_program_and_is_no_result():
    async def interrupted() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # that nobody asked how its task ended
        raise KeyboardInterrupt

    client = AsyncScriptedClient([turn("", call("interrupted")), turn("ok")])
    with pytest.raises(KeyboardInterrupt):
        run(client, tools=[interrupted])
    assert len(client.requests) == 1


def test_a_plain_tool_that_never_returns_does_not_hang_the_program():
    forever = threading.Event()
    out = run(
        AsyncScriptedClient([turn("", call("hang")), turn("gave up")]),
        tools=[Tool("hang", "", {"type": "object"}, lambda: forever.wait())],
        tool_timeout=0.05,
    )
    assert out.text == "gave up"
    forever.set()


def test_loops_that_the_threads_of_asyncios_own_pool_wait_for_come_to_their_end():
    async def main() -> list[str]:
        running = asyncio.get_running_loop()
        running.set_default_executor(ThreadPoolExecutor(1))

        async def one() -> str:
            client = AsyncScriptedClient([turn("", call(a=1, b=2)), turn("3")])
            return (await loop.arun(client, "go", tools=[add])).text

        def job() -> str:
            return asyncio.run_coroutine_threadsafe(one(), running).result(10)

        return await asyncio.gather(*(asyncio.to_thread(job) for _ in range(3)))

    assert wait(main()) == ["3"] * 3


def test_a_source_of_tools_that_never_answers_does_not_hang_the_program():
    class Silent:
        def tools(self) -> list[Tool]:
            forever.wait()
            return []

    async def main() -> None:
        async with asyncio.timeout(0.05):
            await loop.arun(AsyncScriptedClient([]), "go", tools=[Silent()])

    forever = threading.Event()
    late = threading.Timer(60, forever.set)  # for the sake of a test that fails
    late.start()
    with pytest.raises(TimeoutError):
        wait(main())
    assert not forever.is_set()
    late.cancel()
    forever.set()


def test_a_source_of_tools_that_raises_what_no_future_takes_is_told():
    class Empty:
        def tools(self) -> list[Tool]:
            return [next(iter([]))]

    with pytest.raises(RuntimeError, match="StopIteration"):
        run(AsyncScriptedClient([turn("ok")]), tools=[Empty()])


def test_a_tool_that_ended_in_time_did_so_however_late_the_event_loop_looks():
    ended = threading.Event()

    def quick() -> str:
        ended.set()
        return "done"

    def observer(event: Any) -> None:
        if isinstance(event, ToolStarted) and event.call.name == "other":
            ended.wait(10)
            time.sleep(1.2)  # the event loop stands still until the time of the tool is over

    client = AsyncScriptedClient([turn("", call("quick"), call("other", "c1")), turn("ok")])
    tools = [Tool.from_function(quick, timeout=1.0), Tool("other", "", {"type": "object"}, lambda: None)]
    out = run(client, tools=tools, on_event=observer)
    assert [entry["status"] for entry in out.tool_log] == ["success", "success"]


def test_where_there_is_no_thread_left_the_call_fails(monkeypatch: pytest.MonkeyPatch):
    start = threading.Thread.start

    def crowded(thread: threading.Thread) -> None:
        if thread.name == "loopmux-tool-add":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", crowded)
    script = [turn("", call(a=1, b=2)), turn("ok")]
    for out in (run(AsyncScriptedClient(list(script))), loop.run(ScriptedClient(list(script)), "go", tools=[add])):
        assert [entry["error"] for entry in out.tool_log] == ["RuntimeError: can't start new thread"]


def test_hostile_coroutines():
    async def exits() -> None:
        raise SystemExit(3)

    async def cancels() -> None:
        raise asyncio.CancelledError

    async def nothing_json() -> object:
        return object()

    class Odd(BaseException):
        pass

    async def odd() -> None:
        raise Odd

    calls = [call(name, name) for name in ("exits", "odd", "nothing_json")]
    out = run(AsyncScriptedClient([turn("", *calls), turn("ok")]), tools=[exits, odd, nothing_json])
    assert [entry["error"] for entry in out.tool_log] == [
        "SystemExit: 3",
        "Odd",
        "TypeError: the result is a object, expected text, numbers, lists, dicts or a dataclass",
    ]

    async def cancels_its_task() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    for name, tool in {"cancels": cancels, "cancels_its_task": cancels_its_task}.items():
        out = run(AsyncScriptedClient([turn("", call(name)), turn("ok")]), tools=[tool])
        assert out.tool_log[0]["error"] == "CancelledError"


def test_cancelling_the_task_cancels_the_turns_tools():
    started, ended = asyncio.Event(), []

    async def hang() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    client = AsyncScriptedClient([turn("", call("hang"))])

    async def main() -> None:
        task = asyncio.create_task(loop.arun(client, "go", tools=[hang]))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]  # here already: not left to the end of the event loop

    wait(main())
    assert client.hints[-1][1] == "done"


@pytest.mark.parametrize("limit", ["timeout", "tool_timeout"])
def test_a_coroutine_tool_that_took_too_long_may_clean_up_before_the_loop_has_ended(limit: str):
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)
            cleaned.append(True)

    async def main() -> None:
        client = AsyncScriptedClient([turn("", call("work")), turn("ok")])
        with contextlib.suppress(DeadlineExceededError):
            await loop.arun(client, "go", tools=[work], **{limit: 1.0})  # in which it begins
        assert cleaned == [True]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    wait(main())


def test_the_session_ends_with_the_loop_however_often_it_is_cancelled():
    client = AsyncScriptedClient([turn("", call("work"))])

    async def main() -> None:
        started, cleaning = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            try:
                started.set()
                await asyncio.Event().wait()
            finally:
                cleaning.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(loop.arun(client, "go", tools=[work]))
        for moment in (started, cleaning):
            await moment.wait()
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    wait(main())
    assert client.hints[-1][1] == "done"


class Block:
    """Blocks whatever takes part in a loop, and says when it has come to that."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    async def coroutine(self, *_: Any) -> None:
        self.reached.set()
        await asyncio.Event().wait()

    def thread(self) -> None:
        self.reached.set()
        self.released.wait(20)

    async def until_reached(self) -> None:
        while not self.reached.is_set():
            await asyncio.sleep(0.001)


class OneTurn(AsyncScriptedClient):
    """The second turn never comes."""

    def __init__(self, first: Result, block: Block) -> None:
        super().__init__([first])
        self.block = block

    def stream(self, **request: Any) -> Any:
        return super().stream(**request) if self.script else contextlib.nullcontext(self.nothing())

    async def nothing(self) -> AsyncIterator[Any]:
        await self.block.coroutine()
        yield


STOPPED = "Error: the loop was stopped while this ran; whether it did its work is not known"


@pytest.mark.parametrize(
    ("state", "content"),
    [
        ("coroutine", STOPPED),
        ("thread", STOPPED),
        ("approval", "Not run: the loop was stopped."),
        ("model", "null"),
    ],
)
def test_a_loop_that_is_cancelled_in_any_state_leaves_a_transcript_to_go_on_from(state: str, content: str):
    block = Block()
    act = {"coroutine": block.coroutine, "thread": block.thread}.get(state, lambda: None)
    tool = Tool("act", "", {"type": "object"}, act)
    client = OneTurn(turn("", call("act")), block)
    approve = block.coroutine if state == "approval" else None
    events = loop.aiterate(client, "go", tools=[tool], before_tool=approve)
    assert events.messages == [{"role": "user", "content": "go"}]

    async def main() -> None:
        async def read() -> None:
            async for _ in events:
                pass

        task = asyncio.create_task(read())
        await block.until_reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    wait(main())
    block.released.set()
    assert [m["content"] for m in events.messages if m["role"] == "tool"] == [content]
    assert client.hints[-1][1] == "done"
    assert loop.run(ScriptedClient([turn("ok")]), events.messages, tools=[tool]).text == "ok"


def test_leaving_the_iteration_cancels_the_turn():
    client = AsyncScriptedClient([turn("text")])

    async def main() -> list[Any]:
        seen = []
        async with contextlib.aclosing(loop.aiterate(client, "go", tools=[add])) as events:
            async for event in events:
                seen.append(event)
                if isinstance(event, TextDelta):
                    break
        return seen

    assert wait(main()) == [TurnStarted(1), TextDelta("text")]
    assert client.left == ["cancelled"]


def test_a_loop_that_nobody_iterates_over_any_more_ends_at_once():
    client = AsyncScriptedClient([turn("text")])

    async def main() -> None:
        async for event in loop.aiterate(client, "go", tools=[add]):
            if isinstance(event, TextDelta):
                break
        while not client.hints:
            await asyncio.sleep(0.001)

    gc.disable()
    try:
        wait(main())
    finally:
        gc.enable()
    assert client.left == ["cancelled"]


def test_a_loop_that_the_collector_finds_half_way_is_ended_once():
    async def sleep() -> None:
        await asyncio.sleep(60)

    client = AsyncScriptedClient([turn("", call("sleep"), call("add", "c1", a=1, b=2))])
    failures: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        held: dict[str, Any] = {"events": loop.aiterate(client, "go", tools=[sleep, add])}
        async for event in held["events"]:
            if isinstance(event, ToolResult):
                break
        held["itself"] = held
        del held
        gc.collect()
        while client.hints[-1][1] != "done":
            await asyncio.sleep(0.001)

    wait(main())
    gc.collect()
    assert failures == []


def test_errors_carry_the_transcript():
    client = AsyncScriptedClient([turn("", call(a=1, b=2)), WorkerLostError("gone")])
    with pytest.raises(WorkerLostError) as caught:
        run(client)
    assert [m["role"] for m in caught.value.messages] == ["user", "assistant", "tool"]
    with pytest.raises(MaxTurnsError):
        run(AsyncScriptedClient([turn("", call(a=1, b=2))]), max_turns=1)
    with pytest.raises(DeadlineExceededError):
        run(AsyncScriptedClient([turn("", call("hang"))]), tools=[hanging()], timeout=0.1)
    with pytest.raises(ToolLoopError, match="before_tool answered 3"):
        run(AsyncScriptedClient([turn("", call(a=1, b=2))]), before_tool=lambda _: 3)
    for wrong in ({"tools": [add, add]}, {"before_tool": 3}, {"on_event": 3}):
        with pytest.raises(BadRequestError):
            run(AsyncScriptedClient([]), **wrong)


def hanging() -> Tool:
    async def hang() -> None:
        await asyncio.Event().wait()

    return Tool.from_function(hang)


def test_many_loops_at_once():
    async def main() -> list[loop.ToolLoopResult]:
        clients = [AsyncScriptedClient([turn("", call(a=n, b=1)), turn(f"loop {n}")]) for n in range(50)]
        return await asyncio.gather(*(loop.arun(client, "go", tools=[add]) for client in clients))

    results = wait(main())
    assert [r.text for r in results] == [f"loop {n}" for n in range(50)]
    assert [r.tool_log[0]["result"] for r in results] == [n + 1 for n in range(50)]


def test_tool_results_are_reported():
    seen: list[Any] = []
    run(AsyncScriptedClient([turn("", call("slow_add", a=1, b=2)), turn("3")]), on_event=seen.append)
    assert [e.content for e in seen if isinstance(e, ToolResult)] == ["3"]
