"""Running tool loops: ``run`` and ``iterate``, and ``arun`` and ``aiterate`` for asyncio.

All take a client, a prompt or a list of messages, and ``tools=``. Further keywords:

- ``max_turns``, ``max_tool_calls``, ``tool_timeout``, ``max_result_size``, ``max_failures``, ``concurrency``,
  ``timeout`` (of the whole loop), ``stop_when_denied``: see ``loopevents.Limits``;
- ``before_tool(call)``: asked before each call, in call order; answers ``Run()``, ``Deny(reason)``,
  ``Substitute(result)``, or for short True, False, or a text that stands in for the result;
- ``on_event(event)`` (``run`` and ``arun``): sees every ``LoopEvent``, in the caller's thread. What it
  or ``before_tool`` raises ends the loop and comes out as it is; who wants the transcript then uses ``iterate``;
- ``session``: the session id of all turns; if not given the client's own default, else a fresh one, which ends with
  the loop (of another one, whoever named it says with ``client.hint`` when it is done);
- everything else is an option of ``client.stream`` and holds for every turn, but for a ``tool_choice`` that forces a
  call: it holds for the first turn only, since the loop could not end otherwise.

Calls of one turn run at the same time, in threads (coroutine functions: in an event loop of their own for ``run``, in
the caller's for ``arun``). A thread cannot be stopped: a tool that exceeds its time is answered with an error and left
to itself, and what it returns later is dropped.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from loopmux import toolrun
from loopmux.bound import Bound
from loopmux.errors import CancelledError, LoopmuxError, ToolLoopError
from loopmux.loopevents import (
    AbandonTool,
    Action,
    AskApproval,
    AskModel,
    ChatMessage,
    Decided,
    Decision,
    Deny,
    Event,
    Fail,
    Finish,
    HintWaiting,
    Limits,
    LoopEvent,
    LoopFinished,
    Report,
    Run,
    RunTool,
    Substitute,
    TimePassed,
    ToolFinished,
    ToolLoopResult,
    ToolResult,
    ToolStarted,
    TurnFinished,
    TurnStarted,
)
from loopmux.loopplan import BeforeTool, OnEvent, Plan, check_callback, decision, prepare
from loopmux.outcome import described, failed
from loopmux.results import Result, StreamEvent

if TYPE_CHECKING:
    from loopmux import aioloop

__all__ = [
    "BeforeTool",
    "Decision",
    "Deny",
    "Events",
    "Limits",
    "LoopEvent",
    "LoopFinished",
    "OnEvent",
    "Run",
    "Substitute",
    "ToolLoopResult",
    "ToolResult",
    "ToolStarted",
    "TurnFinished",
    "TurnStarted",
    "aiterate",
    "arun",
    "iterate",
    "run",
]


class Stream(Protocol):
    """What the loop needs of a stream."""

    @property
    def result(self) -> Result:
        """The finished turn, after the last event."""
        ...

    def __iter__(self) -> Iterator[StreamEvent]: ...

    def cancel(self) -> None:
        """Ask for the end of the turn, from any thread."""
        ...


class LoopClient(Protocol):
    """What the loop needs of a client."""

    @property
    def stream(self) -> Callable[..., Any]:
        """Begins a turn: a context manager around a ``Stream``; leaving it early cancels the turn."""
        ...

    @property
    def hint(self) -> Callable[..., Any]:
        """Tells the broker whether the session comes back."""
        ...


def run(
    client: LoopClient,
    prompt_or_messages: str | Iterable[Mapping[str, Any]],
    *,
    tools: Iterable[Any] | None,
    max_turns: int = 10,
    before_tool: BeforeTool | None = None,
    on_event: OnEvent | None = None,
    session: str | None = None,
    **settings: Any,
) -> ToolLoopResult:
    """Run a whole tool loop; the keywords are told above.

    Raises:
        BadRequestError: wrong messages, tools, limits or callbacks; before anything is sent.
        MaxTurnsError: turns or calls are used up and the model still asks for tools.
        LoopmuxError: a turn failed. Errors that end a loop carry ``messages``, the transcript to resume from.
    """
    check_callback("on_event", on_event, awaited=False)
    events = iterate(
        client,
        prompt_or_messages,
        tools=tools,
        max_turns=max_turns,
        before_tool=before_tool,
        session=session,
        **settings,
    )
    with contextlib.closing(events):
        for event in events:
            if on_event is not None:
                on_event(event)
            if isinstance(event, LoopFinished):
                return event.result
    raise ToolLoopError("the tool loop ended without a result")  # unreachable: a loop ends in a result or an error


def iterate(
    client: LoopClient,
    prompt_or_messages: str | Iterable[Mapping[str, Any]],
    *,
    tools: Iterable[Any] | None,
    max_turns: int = 10,
    before_tool: BeforeTool | None = None,
    session: str | None = None,
    **settings: Any,
) -> Events:
    """As ``run``, event by event; the last one is ``LoopFinished``."""
    check_callback("before_tool", before_tool, awaited=False)
    plan = prepare(prompt_or_messages, tools, session, before_tool is not None, {"max_turns": max_turns, **settings})
    return Events(_Shell(client, plan, before_tool))


async def arun(
    client: Any,
    prompt_or_messages: str | Iterable[Mapping[str, Any]],
    *,
    tools: Iterable[Any] | None,
    max_turns: int = 10,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> ToolLoopResult:
    """``run`` for an ``AsyncClient``; ``before_tool`` and ``on_event`` may be coroutine functions."""
    from loopmux import aioloop

    check_callback("on_event", on_event, awaited=True)
    return await aioloop.run(client, prompt_or_messages, on_event, tools=tools, max_turns=max_turns, **settings)


def aiterate(
    client: Any,
    prompt_or_messages: str | Iterable[Mapping[str, Any]],
    *,
    tools: Iterable[Any] | None,
    max_turns: int = 10,
    **settings: Any,
) -> aioloop.Events:
    """``iterate`` for an ``AsyncClient``: ``async for event in aiterate(…)``."""
    from loopmux import aioloop

    return aioloop.Events(client, prompt_or_messages, tools=tools, max_turns=max_turns, **settings)


@dataclass(slots=True)
class _Shell:
    """Carries out the core's actions with threads; everything but the tools happens in the caller's thread."""

    client: LoopClient
    plan: Plan
    before_tool: BeforeTool | None
    done: queue.SimpleQueue[Event] = dataclasses.field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    turn: Stream | None = None
    """The stream that is being read."""

    def cancel(self) -> None:
        """Have the loop end where it stands; from any thread."""
        self.cancelled = True
        if turn := self.turn:
            turn.cancel()
        self.done.put(TimePassed())  # for who waits for tools

    def events(self) -> Generator[LoopEvent]:
        """The loop, from start to end."""
        loop = self.plan.loop
        try:
            actions = deque(loop.start(time.monotonic()))
            while True:
                while actions:
                    event = yield from self._perform(actions.popleft())
                    if isinstance(event, LoopFinished):
                        yield event
                        return
                    if event is not None:
                        actions += loop.handle(event, time.monotonic())
                actions += loop.handle(self._next(), time.monotonic())
                self._go_on()
        except LoopmuxError as error:
            error.messages = error.messages or loop.transcript()
            raise
        finally:
            if self.plan.ends_session:
                self._hint("done")

    def _perform(self, action: Action) -> Generator[LoopEvent, None, Event | LoopFinished | None]:
        """Carry out one action; what came of it, if that is known at once."""
        self._go_on()
        match action:
            case AskModel(turn=turn):
                yield TurnStarted(turn)
                return TurnFinished(turn, (yield from self._ask(action)))
            case HintWaiting(expected):
                self._hint("waiting_on_tool", expected)
            case AskApproval(number, call):
                return Decided(number, decision(self.before_tool(call) if self.before_tool else True, call))
            case RunTool(turn=turn, call=call):
                yield ToolStarted(turn, call)
                self.plan.loop.began(action.number, time.monotonic())
                self._start(action)
            case AbandonTool():
                pass  # a thread cannot be stopped; the core ignores what it may still return
            case Report(event):
                yield event
            case Finish(result):
                return LoopFinished(result)
            case Fail(error):
                raise error
        return None

    def _go_on(self) -> None:
        """Raises CancelledError where nothing more is to be done."""
        if self.cancelled:
            raise CancelledError("the loop was cancelled")

    def _ask(self, ask: AskModel) -> Generator[LoopEvent, None, Result]:
        self._go_on()
        opened: AbstractContextManager[Stream] = self.client.stream(**self.plan.turn_options(ask))
        with opened as stream:
            self.turn = stream
            if self.cancelled:
                stream.cancel()
            yield from stream
            self.turn = None
            return stream.result

    def _start(self, action: RunTool) -> None:
        context = contextvars.copy_context()

        def work() -> None:
            self.done.put(ToolFinished(action.number, context.run(toolrun.perform, action.tool, action.call)))

        # a daemon: a tool that never returns must not keep the program from ending
        thread = threading.Thread(target=work, name=f"loopmux-tool-{action.call.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # there may be no more threads
            self.done.put(ToolFinished(action.number, failed(described(error))))

    def _next(self) -> Event:
        """Wait for a tool, or for the time at which the next one is late."""
        wake = self.plan.loop.wake
        try:
            left = None if wake is None else min(max(0.0, wake - time.monotonic()), threading.TIMEOUT_MAX)
            return self.done.get(timeout=left)
        except queue.Empty:
            return TimePassed()

    def _hint(self, state: str, expected: float | None = None) -> None:
        if sys.is_finalizing():  # a loop that was left open: clients are closed by now, and modules torn down
            return
        try:
            self.client.hint(self.plan.loop.session, state, expected)
        except LoopmuxError:
            pass  # a hint saves work and changes no result: a broken connection shows in the next turn


class Events(Bound, Iterator[LoopEvent]):
    """What happens in a loop, to iterate over once; ``close`` ends it where it stands."""

    _instead = "run it here, and pass on its messages"

    def __init__(self, shell: _Shell) -> None:
        self._shell, self._loop = shell, shell.plan.loop
        self._events = shell.events()

    def __next__(self) -> LoopEvent:
        return next(self._events)

    def close(self) -> None:
        """Leave the loop: a turn under way is cancelled, and tools that still run are left to themselves."""
        self._events.close()

    def cancel(self) -> None:
        """Ask for the end of the loop, from any thread: as ``close``, and whoever iterates gets CancelledError."""
        self._shell.cancel()

    @property
    def messages(self) -> list[ChatMessage]:
        """The transcript so far, at any time fit for resuming: calls without a result yet are answered with that."""
        return self._loop.transcript()
