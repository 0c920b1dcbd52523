"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack

from loopmux import wire
from loopmux.aiodriver import AsyncChannel, AsyncDriver
from loopmux.baseclient import (
    BaseClient,
    Messages,
    answer_of,
    evict_order,
    hint_of,
    load_order,
    outcome_of,
    status_of,
    unload_order,
)
from loopmux.basestream import BaseStream
from loopmux.driver import ForCaller
from loopmux.errors import LoopmuxError
from loopmux.events import (
    Asked,
    CancelAsked,
    Hinted,
    Request,
)
from loopmux.messages import AdapterStatus, Done, ModelStatus, Status
from loopmux.options import Options, PromptOptions
from loopmux.results import Result, StreamEvent

if TYPE_CHECKING:
    from typing import Self

    from loopmux.aioloop import Events
    from loopmux.loopevents import ToolLoopResult

_Inbox = asyncio.Queue[ForCaller]
"""What came for one request or question."""


class AsyncStream(BaseStream[AsyncDriver]):
    """A generation that is being received: ``async for`` over its events, once, in one task.

    As an async context manager it cancels the request in the engine when the block is left before the end.
    """

    def __init__(self, channel: AsyncChannel, driver: AsyncDriver, request: Request) -> None:
        self._channel = channel  # which stays open for as long as anybody reads
        self._inbox = _Inbox()
        super().__init__(driver, request, self._inbox.put_nowait)

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._outcome is None:
            event = await self._take()
            if event is not None:
                return event
        raise self._over(StopAsyncIteration)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def __del__(self) -> None:
        # __init__ may have failed before the request began
        if getattr(self, "_outcome", self) is None:
            self._driver.abandon(self._id)

    @property
    def result(self) -> Result:
        """The whole result of a stream that was read to its end; ``await wait()`` reads the rest first.

        Raises:
            LoopmuxError: the request failed or was cancelled, or has not ended yet.
        """
        if self._outcome is None:
            raise LoopmuxError("the stream has not ended: read it to its end, or use `await stream.wait()`")
        return self._result()

    async def wait(self) -> Result:
        """Read the rest of the stream and return the whole result.

        Raises:
            LoopmuxError: the request failed or was cancelled.
        """
        while self._outcome is None:
            await self._take()
        return self._result()

    async def _take(self) -> StreamEvent | None:
        """Wait for the next event; None when the outcome came instead."""
        if asyncio.get_running_loop() is not self._driver.loop:
            raise RuntimeError("this stream belongs to another event loop: read it in the one that it was begun in")
        return self._taken(await self._inbox.get())


class AsyncClient(BaseClient[AsyncChannel]):
    """``Client`` for asyncio: the same methods, awaited but for ``stream``, ``iter_tools`` and ``with_options``.

    It belongs to the event loop it is first used in.

    Cancelling a task that awaits a call cancels the request in the engine. One that is dropped unclosed is closed, with
    a ResourceWarning.
    """

    _channel_class = AsyncChannel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what runs and close the connection. A copy made by ``with_options`` leaves it to its original."""
        if self._owner:
            self._channel.close()

    async def generate(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Result:
        """Generate from a prompt (or ``messages=``, ``prompt_token_ids=``) and wait for the whole result.

        Raises:
            LoopmuxError: one of the family in ``loopmux.errors``, with the text so far.
        """
        async with self._begin(await _listed(options), prompt, collect=True) as answer:
            return await answer.wait()

    def stream(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> AsyncStream:
        """Begin a generation whose events are read as they come: ``async with client.stream(…) as s``.

        A source among ``tools`` is asked for them before this returns, and the event loop waits: rather hand over
        ``await asyncio.to_thread(source.tools)``.
        """
        return self._begin(options, prompt, collect=False)

    async def chat(
        self, messages: Messages, *, tools: Iterable[Any] | None = None, **options: Unpack[Options]
    ) -> Result:
        """One turn of a conversation; ``tools`` are functions, Tools or schemas.

        The calls that the model makes are in the result's ``tool_calls``; nothing is run.
        """
        turn = {**options, "messages": messages, "tools": None if tools is None else list(tools)}
        async with self._begin(await _listed(turn), None, collect=True) as answer:
            return await answer.wait()

    async def run_tools(
        self,
        prompt_or_messages: str | Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Any],
        max_turns: int = 10,
        **options: Any,
    ) -> ToolLoopResult:
        """Let the model use tools until it answers; see ``loopmux.loop.arun``."""
        from loopmux import loop

        settings = self._loop_settings(options)
        return await loop.arun(self, prompt_or_messages, tools=tools, max_turns=max_turns, **settings)

    def iter_tools(
        self,
        prompt_or_messages: str | Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Any],
        max_turns: int = 10,
        **options: Any,
    ) -> Events:
        """Like ``run_tools``, yielding what happens as it happens; see ``loopmux.loop.aiterate``.

        ``messages`` of what comes back is the transcript so far, at any time: also when its task was cancelled.
        """
        from loopmux import loop

        settings = self._loop_settings(options)
        return loop.aiterate(self, prompt_or_messages, tools=tools, max_turns=max_turns, **settings)

    async def hint(
        self, session: str, state: Literal["waiting_on_tool", "done"], expected: float | None = None
    ) -> None:
        """Tell the broker whether a session comes back, and after how many seconds if that is known; never waits.

        The worker that ran it may have to give its attention state up for others: for a session that waits it counts
        double when it is expected (without ``expected`` now), half as much for every minute before or after; for one
        that is ``done`` a fiftieth. Without a connection it is dropped: none is opened for it.

        Raises:
            BadRequestError: a field is of the wrong type or too long, or the state unknown.
        """
        self._channel.mention(Hinted(hint_of(session, state, expected)))

    async def status(self) -> Status:
        """What the broker knows: models, workers, launchers, counters.

        Raises:
            ConnectionLostError: no answer within ``connect_timeout``.
        """
        return status_of(await self._ask(Asked(wire.new_id(), self._give_up_at())))

    async def models(self) -> list[ModelStatus]:
        """The models the broker knows, as in ``status``."""
        return list((await self.status()).models)

    async def load_adapter(self, model: str, name: str, folder: str | Path) -> Done:
        """Have all workers of a model load an adapter; see ``Client.load_adapter``."""
        return outcome_of(await self._ask(load_order(model, name, folder, self._give_up_at())))

    async def unload_adapter(self, model: str, name: str) -> Done:
        """Take back what ``load_adapter`` did; see ``Client.unload_adapter``."""
        return outcome_of(await self._ask(unload_order(model, name, self._give_up_at())))

    async def adapters(self) -> list[AdapterStatus]:
        """The adapters that requests may name, as in ``status``."""
        return list((await self.status()).adapters)

    async def drain(self, worker: str, *, within: float = 60.0) -> Status:
        """Have a worker leave in good order; see ``Client.drain``."""
        return status_of(await self._ask(evict_order(worker, within, self._give_up_at())))

    def _give_up_at(self) -> float:
        """When a question that is asked now stops waiting for a broker."""
        return self._channel.driver().loop.time() + self._channel.connect_timeout

    async def _ask(self, question: Asked) -> Status | Done:
        inbox = _Inbox()
        driver = self._channel.driver()
        driver.start(question, inbox.put_nowait)
        try:
            answered = await inbox.get()
        except asyncio.CancelledError:
            driver.forget(question.id)
            driver.post(CancelAsked(question.id))
            raise
        return answer_of(answered)

    def _begin(self, options: Mapping[str, Any], prompt: str | None, *, collect: bool) -> AsyncStream:
        driver = self._channel.driver()
        request = self._request(options, prompt, driver.loop.time(), collect=collect)
        return AsyncStream(self._channel, driver, request)


async def _listed(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options with the schemas of their tools where a source is among these: it may ask its server, so in a thread."""
    tools = options.get("tools")
    if not isinstance(tools, (list, tuple)):
        return options
    from loopmux.tools import ToolSource, schemas

    if not any(isinstance(entry, ToolSource) for entry in tools):
        return options
    from loopmux.aioloop import in_thread

    return {**options, "tools": await in_thread("loopmux-tools", lambda: schemas(tools))}
