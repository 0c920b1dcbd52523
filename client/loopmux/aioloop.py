"""The tool loop's asyncio shell; ``loop`` tells what its arguments mean."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loopmux import loopplan, toolrun
from loopmux.bound import Bound
from loopmux.errors import LoopmuxError, ToolLoopError
from loopmux.loopevents import (
    AbandonTool,
    Action,
    AskApproval,
    AskModel,
    ChatMessage,
    Decided,
    Event,
    Fail,
    Finish,
    HintWaiting,
    LoopEvent,
    LoopFinished,
    Report,
    RunTool,
    TimePassed,
    ToolFinished,
    ToolLoopResult,
    ToolStarted,
    TurnFinished,
    TurnStarted,
)
from loopmux.outcome import Outcome, described, failed, succeeded
from loopmux.results import ToolCall
from loopmux.tools import Tool
from loopmux.turns import Loop

T = TypeVar("T")

_LAST_WORDS = 1.0
"""Seconds that cancelled coroutine tools get to clean up when a loop ends before them."""


async def run(
    client: Any,
    prompt_or_messages: str | Iterable[Mapping[str, Any]],
    on_event: loopplan.OnEvent | None,
    **settings: Any,
) -> ToolLoopResult:
    """``loop.arun``."""
    async with contextlib.aclosing(Events(client, prompt_or_messages, **settings)) as events:
        async for event in events:
            if on_event is not None:
                await _awaited(on_event(event))
            if isinstance(event, LoopFinished):
                return event.result
    raise ToolLoopError("the tool loop ended without a result")  # unreachable: a loop ends in a result or an error


class Events(Bound, AsyncIterator[LoopEvent]):
    """``loop.Events`` for asyncio; ``aclose`` ends the loop where it stands."""

    _instead = "run it here, and pass on its messages"

    def __init__(
        self,
        client: Any,
        prompt_or_messages: str | Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Any] | None,
        before_tool: loopplan.BeforeTool | None = None,
        session: str | None = None,
        **settings: Any,
    ) -> None:
        loopplan.check_callback("before_tool", before_tool, awaited=True)
        self._given = loopplan.messages_of(prompt_or_messages)
        prepare = functools.partial(loopplan.prepare, self._given, tools, session, before_tool is not None, settings)
        self._shell = _Shell(client, prepare, before_tool)
        # The generator does not refer to this object, so it ends as soon as nobody holds this any more; and it runs no
        # other generator, so it is ended once, whoever does it (the collector and asyncio.run end each one that they
        # find).
        self._events = self._shell.events()

    async def __anext__(self) -> LoopEvent:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Leave the loop: a turn under way and coroutine tools are cancelled, threads are left to themselves."""
        await self._events.aclose()

    @property
    def messages(self) -> list[ChatMessage]:
        """The transcript so far, at any time fit for resuming: calls without a result yet are answered with that."""
        plan = self._shell.plan
        return plan.loop.transcript() if plan else list(self._given)


@dataclass(slots=True)
class _Shell:
    """Carries out the core's actions on the running event loop."""

    client: Any
    prepare: Callable[[], loopplan.Plan]
    before_tool: loopplan.BeforeTool | None
    plan: loopplan.Plan | None = None
    done: asyncio.Queue[ToolFinished] = field(default_factory=asyncio.Queue)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def loop(self) -> Loop:
        """The core, of a loop that has begun."""
        assert self.plan is not None, "nothing is carried out before it is prepared"
        return self.plan.loop

    async def events(self) -> AsyncGenerator[LoopEvent]:
        """The loop, from start to end."""
        # in a thread: a tool source may ask its server what it has
        plan = self.plan = await in_thread("loopmux-tools", self.prepare)
        loop = plan.loop
        try:
            actions = deque(loop.start(time.monotonic()))
            while True:
                while actions:
                    match actions.popleft():
                        case AskModel() as ask:
                            yield TurnStarted(ask.turn)
                            async with self.client.stream(**plan.turn_options(ask)) as stream:
                                async for delta in stream:
                                    yield delta
                                result = stream.result
                            actions += loop.handle(TurnFinished(ask.turn, result), time.monotonic())
                        case RunTool() as job:
                            yield ToolStarted(job.turn, job.call)
                            loop.began(job.number, time.monotonic())
                            self._start(job)
                        case Report(event):
                            yield event
                        case Finish(finished):
                            yield LoopFinished(finished)
                            return
                        case action:
                            actions += await self._perform(action)
                actions += loop.handle(await self._next(), time.monotonic())
        except LoopmuxError as error:
            error.messages = error.messages or loop.transcript()
            raise
        finally:
            try:
                await self._cancel_tools()
            finally:
                if plan.ends_session:
                    await self._hint("done")

    async def _perform(self, action: Action) -> list[Action]:
        """The actions that tell observers nothing; what follows from them."""
        match action:
            case HintWaiting(expected):
                await self._hint("waiting_on_tool", expected)
            case AskApproval(number, call):
                answer = await _awaited(self.before_tool(call)) if self.before_tool else True
                return self.loop.handle(Decided(number, loopplan.decision(answer, call)), time.monotonic())
            case AbandonTool(number):
                if task := self.tasks.get(number):
                    task.cancel()
            case Fail(error):
                raise error
        return []

    def _start(self, job: RunTool) -> None:
        if _is_coroutine_function(job.tool.function):
            self.tasks[job.number] = asyncio.create_task(self._await_tool(job), name=f"loopmux-tool-{job.call.name}")
        else:
            self._start_thread(job)

    async def _await_tool(self, job: RunTool) -> None:
        outcome = failed("CancelledError")  # by itself, or by somebody else: the loop ignores those that it cancelled
        try:
            outcome = await _perform(job.tool, job.call)
        finally:
            self.done.put_nowait(ToolFinished(job.number, outcome))

    def _start_thread(self, job: RunTool) -> None:
        perform = functools.partial(toolrun.perform, job.tool, job.call)
        try:
            running = in_thread(f"loopmux-tool-{job.call.name}", perform)
        except RuntimeError as error:  # there may be no more threads
            self.done.put_nowait(ToolFinished(job.number, failed(described(error))))
        else:
            running.add_done_callback(lambda done: self.done.put_nowait(ToolFinished(job.number, done.result())))

    async def _next(self) -> Event:
        """Wait for a tool, or for the time at which the next one is late."""
        wake = self.loop.wake
        try:
            async with asyncio.timeout(None if wake is None else max(0.0, wake - time.monotonic())):
                finished = await self.done.get()
        except TimeoutError:
            if self.done.empty():
                return TimePassed()
            finished = self.done.get_nowait()  # it came while this event loop stood still
        self.tasks.pop(finished.number, None)
        return finished

    async def _cancel_tools(self) -> None:
        tasks = [task for task in self.tasks.values() if not task.done()]
        for task in tasks:
            if not task.cancelling():  # one that was abandoned cleans up already
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_WORDS)

    async def _hint(self, state: str, expected: float | None = None) -> None:
        try:
            await _awaited(self.client.hint(self.loop.session, state, expected))
        except LoopmuxError:
            pass  # a hint saves work and changes no result: a broken connection shows in the next turn


def in_thread(name: str, function: Callable[[], T]) -> asyncio.Future[T]:
    """What a function comes to that is called in a thread of its own, in the caller's context.

    Not in asyncio's pool: that one may be full of callers who wait for this loop, and it is joined at the end, where a
    tool that never returns would hang the program.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    context = contextvars.copy_context()

    def work() -> None:
        if done.set_running_or_notify_cancel():
            try:
                done.set_result(context.run(function))
            except StopIteration as error:  # which no future takes: whoever waits for it would do so for ever
                done.set_exception(RuntimeError(f"{name} raised {error!r}"))
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                done.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return asyncio.wrap_future(done)


async def _perform(tool: Tool, call: ToolCall) -> Outcome:
    """``toolrun.perform`` for a coroutine function; raises nothing but the cancellation of its task, and Ctrl-C."""
    try:
        return succeeded(await tool.function(**tool.bind(call.arguments)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # a tool may do anything: it is the model's to correct
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
            raise  # from without; else it is the tool's own doing
        return failed(described(error))


def _is_coroutine_function(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004 - not a test of being callable: objects with an async __call__


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
