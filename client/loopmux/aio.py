"""The asyncio client: the same connection core, driven by the event loop through the socket's descriptor.

A plain socket and ``loop.add_reader``: the descriptor of a ZeroMQ socket is edge-triggered and stands for sending and
receiving alike, so after every turn the socket's events are looked at again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import warnings
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack

from loopmux import __version__, wire
from loopmux.client import (
    Messages,
    evict_order,
    hint_of,
    load_order,
    loop_settings,
    make_request,
    outcome_of,
    unload_order,
)
from loopmux.connection import Connection
from loopmux.endpoints import default_endpoint, ipc_path
from loopmux.errors import AuthError, CancelledError, ConnectionLostError, LoopmuxError
from loopmux.events import (
    Answer,
    Asked,
    CancelAsked,
    Closed,
    ConnectionEvent,
    Consumed,
    Deliver,
    Fail,
    Finish,
    Hinted,
    Received,
    Request,
    Submitted,
    TimePassed,
)
from loopmux.keys import Credentials, credentials
from loopmux.link import Link
from loopmux.messages import DEFAULT_TIMEOUT, AdapterStatus, Done, ModelStatus, Status
from loopmux.options import Defaults, Options, PromptOptions, merge, seconds
from loopmux.pump import Sink, dispatch
from loopmux.results import Result, StreamEvent, TextDelta

if TYPE_CHECKING:
    from typing import Self

    from loopmux.aioloop import Events
    from loopmux.loopevents import ToolLoopResult

_DRAIN = 64
"""Messages taken per turn of the loop before other tasks get theirs."""


_Inbox = asyncio.Queue[Deliver | Finish | Fail | Answer]
"""What came for one request or question."""


class _Driver:
    """One connection, driven by the event loop it was made in."""

    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self.closed = False
        self._endpoint = endpoint
        self._core = Connection(endpoint, wire.new_id(), connect_timeout, f"loopmux {__version__}")
        self._link = Link(endpoint, credentials)
        self._sinks: dict[bytes, Sink] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._again: asyncio.Handle | None = None
        self._flushing: asyncio.Handle | None = None
        self.loop.add_reader(self._link.descriptor, self._turn)
        self.loop.add_reader(self._link.monitor.FD, self._watch)
        self._watch()  # the descriptor announces nothing before the first time that nothing was found

    def start(self, event: Submitted | Asked, sink: Sink) -> None:
        """Begin a request or a question whose outcome and events go to ``sink``."""
        id_ = event.request.id if isinstance(event, Submitted) else event.id
        if self._link.barred:  # as soon as it was made: nothing comes from it any more
            sink(Fail(id_, AuthError(self._link.barred)))
            return
        self._sinks[id_] = sink
        self.post(event)

    def post(self, event: ConnectionEvent) -> None:
        """Handle an event of a caller now."""
        if not self.closed:
            self._handle(event)
            self._settle()

    def forget(self, request: bytes) -> None:
        """Nobody waits for the outcome of this request any more."""
        self._sinks.pop(request, None)

    def abandon(self, request: bytes) -> None:
        """Cancel a request that nobody reads any more; from any thread, as the collector may run in any."""
        if self.closed or self.pid != os.getpid():
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it everything that runs
            self.loop.call_soon_threadsafe(self._abandon, request)

    def _abandon(self, request: bytes) -> None:
        self.forget(request)
        self.post(CancelAsked(request))

    def close(self) -> None:
        """Cancel what runs, say goodbye, close the socket; if the event loop is gone, only the last."""
        if self.closed:
            return
        self.closed = True
        if not self.loop.is_closed():
            self._handle(Closed())
            self.loop.remove_reader(self._link.descriptor)
            self.loop.remove_reader(self._link.monitor.FD)
            for handle in (self._timer, self._again, self._flushing):
                if handle is not None:
                    handle.cancel()
        self._link.close()

    def drop(self) -> None:
        """Close it as nobody has its client any more; from any thread, as the collector may run in any."""
        if self.closed or self.pid != os.getpid():
            return
        try:
            self.loop.call_soon_threadsafe(self.close)
        except RuntimeError:  # the loop is closed
            self.close()
        warnings.warn(
            f"an AsyncClient of {self._endpoint} was not closed: use `async with`, or `await client.close()`",
            ResourceWarning,
            stacklevel=2,
        )

    def _handle(self, event: ConnectionEvent) -> None:
        dispatch(self._core.handle(event, self.loop.time()), self._link, self._sinks)

    def _turn(self) -> None:
        """Take what is there; the descriptor only says that something may have changed."""
        if self._again is not None:
            self._again.cancel()  # it is the descriptor that called, and who closes must find no other turn
            self._again = None
        for data in self._link.arrived(_DRAIN):
            self._handle(Received(data))
        self._settle()

    def _watch(self) -> None:
        """What happened to the connection, until there is no more: this descriptor announces only changes, too."""
        while (event := self._link.news()) is not None:
            self._handle(event)
        if self._link.barred:
            self.close()  # another one may try
        else:
            self._settle()

    def _tick(self) -> None:
        self._timer = None
        self._handle(TimePassed())
        self._settle()

    def _settle(self) -> None:
        """Send what was said once the tasks that wake up now have said theirs, and come back for the next timer."""
        if self._flushing is None:
            self._flushing = self.loop.call_soon(self._flush)
        due = self._core.next_timer()
        if self._timer is not None and due < self._timer.when():
            self._timer.cancel()
            self._timer = None
        if self._timer is None and not math.isinf(due):
            self._timer = self.loop.call_at(due, self._tick)

    def _flush(self) -> None:
        """Send what was said, and come back for what the descriptor will not announce again."""
        self._flushing = None
        self._link.flush()
        if self._again is None and self._link.ready:
            self._again = self.loop.call_soon(self._turn)


class _Channel:
    """The way to a broker that a client and its ``with_options`` copies share; opened at the first use in a loop.

    After a fork the child opens its own. The loop holds the driver, nobody but clients and streams the channel: an
    unclosed one that is collected closes itself.
    """

    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None:
        self._endpoint, self._credentials = endpoint, credentials
        self.connect_timeout = connect_timeout
        self._driver: _Driver | None = None
        self._finalizer: weakref.finalize[..., _Channel] | None = None
        self._closed = False

    def driver(self) -> _Driver:
        """The driver of the running loop.

        Raises:
            ConnectionLostError: the client was closed.
            RuntimeError: the client is in use by another loop.
        """
        self._check_open()
        if self._driver is not None and self._driver.pid != os.getpid():
            self._driver = self._finalizer = None  # a forked child: the parent's stays in the registry of finalizers
        if self._driver is not None and self._driver.loop is not asyncio.get_running_loop():
            if not self._driver.loop.is_closed():
                raise RuntimeError("this AsyncClient is used by another event loop: make one client per loop")
            self._driver.close()
            self._driver = None
        if self._driver is None or self._driver.closed:
            if self._finalizer is not None:
                self._finalizer.detach()
            self._driver = _Driver(self._endpoint, self.connect_timeout, self._credentials)
            self._finalizer = weakref.finalize(self, self._driver.drop)
            self._finalizer.atexit = False  # what is left at exit is no leak
        return self._driver

    def mention(self, event: ConnectionEvent) -> None:
        """Post what is of use only over a connection that is there: none is opened for it.

        Raises:
            ConnectionLostError, RuntimeError: as ``driver``.
        """
        self._check_open()
        if self._driver is not None and not self._driver.closed:
            self.driver().post(event)

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionLostError("the client is closed: make another one", retryable=False)

    def close(self) -> None:
        """Close for good; a second time does nothing. A driver whose loop runs elsewhere is closed there, soon."""
        self._closed = True
        driver = self._driver
        if driver is None or driver.pid != os.getpid():
            return
        if driver.loop.is_running() and driver.loop is not asyncio.get_running_loop():
            with contextlib.suppress(RuntimeError):  # that loop was closed by now, and with it everything that runs
                driver.loop.call_soon_threadsafe(driver.close)
        else:
            driver.close()


class AsyncStream:
    """A generation that is being received: ``async for`` over its events, once, in one task.

    As an async context manager it cancels the request in the engine when the block is left before the end.
    """

    def __init__(self, channel: _Channel, driver: _Driver, request: Request) -> None:
        self.request_id = request.id.hex()
        self._channel = channel  # which stays open for as long as anybody reads
        self._driver = driver
        self._id = request.id
        self._inbox = _Inbox()
        self._texts: list[str] = []
        self._outcome: Result | LoopmuxError | None = None
        self._raised = False
        driver.start(Submitted(request), self._inbox.put_nowait)

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._outcome is None:
            event = await self._take()
            if event is not None:
                return event
        if isinstance(self._outcome, LoopmuxError) and not self._raised:
            self._raised = True
            raise self._outcome
        raise StopAsyncIteration

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
    def text(self) -> str:
        """The text of the events read so far."""
        return "".join(self._texts)

    @property
    def result(self) -> Result:
        """The whole result of a stream that was read to its end; ``await wait()`` reads the rest first.

        Raises:
            LoopmuxError: the request failed or was cancelled, or has not ended yet.
        """
        if self._outcome is None:
            raise LoopmuxError("the stream has not ended: read it to its end, or use `await stream.wait()`")
        if isinstance(self._outcome, LoopmuxError):
            raise self._outcome
        return self._outcome

    async def wait(self) -> Result:
        """Read the rest of the stream and return the whole result.

        Raises:
            LoopmuxError: the request failed or was cancelled.
        """
        while self._outcome is None:
            await self._take()
        return self.result

    def cancel(self) -> None:
        """Ask for the end of the request; the reader then gets CancelledError, or the end if that was first."""
        if self._outcome is None:
            self._driver.post(CancelAsked(self._id))

    def leave(self) -> None:
        """Stop reading: an unfinished request is cancelled in the engine, and the reader's side ends at once."""
        if self._outcome is None:
            self._driver.forget(self._id)
            self._driver.post(CancelAsked(self._id))
            left = "the stream was left before its end"
            self._outcome = CancelledError(left, request_id=self.request_id, partial_text=self.text)
            self._inbox.put_nowait(Fail(self._id, self._outcome))  # for a task that waits for the next event

    async def _take(self) -> StreamEvent | None:
        """Wait for the next event; None when the outcome came instead."""
        if asyncio.get_running_loop() is not self._driver.loop:
            raise RuntimeError("this stream belongs to another event loop: read it in the one that it was begun in")
        item = await self._inbox.get()
        match item:
            case Deliver(_, event, report):
                if isinstance(event, TextDelta):
                    self._texts.append(event.text)
                if report:
                    self._driver.post(Consumed(self._id, report))
                return event
            case Finish(_, result):
                self._outcome = result
            case Fail(_, error):
                self._outcome = error
        self._inbox.put_nowait(item)  # another task that waits here as well must not wait for ever
        return None


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited but for ``stream``, ``iter_tools`` and ``with_options``.

    It belongs to the event loop it is first used in.

    Cancelling a task that awaits a call cancels the request in the engine. One that is dropped unclosed is closed, with
    a ResourceWarning.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        connect_timeout: float = 5.0,
        key: str | Path | None = None,
        server_key: str | None = None,
        **options: Unpack[Defaults],
    ) -> None:
        self.endpoint = endpoint or default_endpoint()
        ipc_path(self.endpoint)
        self._options = merge(options, {"timeout": timeout})
        patience = seconds("connect_timeout", connect_timeout, forever=True)
        self._channel = _Channel(self.endpoint, patience, credentials(self.endpoint, key, server_key))
        self._owner = True

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

    def with_options(self, **options: Unpack[Options]) -> AsyncClient:
        """A client with other defaults that shares this one's connection."""
        copy = object.__new__(type(self))
        copy.endpoint = self.endpoint
        copy._options = merge(self._options, options)
        copy._channel = self._channel
        copy._owner = False
        return copy

    async def generate(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Result:
        """Generate from a prompt (or ``messages=``, ``prompt_token_ids=``) and wait for the whole result.

        Raises:
            LoopmuxError: one of the family in ``loopmux.errors``, with the text so far.
        """
        async with self._begin(options, prompt, collect=True) as answer:
            return await answer.wait()

    def stream(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> AsyncStream:
        """Begin a generation whose events are read as they come: ``async with client.stream(…) as s``."""
        return self._begin(options, prompt, collect=False)

    async def chat(
        self, messages: Messages, *, tools: Iterable[Any] | None = None, **options: Unpack[Options]
    ) -> Result:
        """One turn of a conversation; ``tools`` are functions, Tools or schemas.

        The calls that the model makes are in the result's ``tool_calls``; nothing is run.
        """
        turn = {**options, "messages": messages, "tools": None if tools is None else list(tools)}
        async with self._begin(turn, None, collect=True) as answer:
            return await answer.wait()

    async def run_tools(
        self,
        prompt_or_messages: str | Iterable[dict[str, Any]],
        *,
        tools: Iterable[Any],
        max_turns: int = 10,
        **options: Any,
    ) -> ToolLoopResult:
        """Let the model use tools until it answers; see ``loopmux.loop.arun``."""
        from loopmux import loop

        settings = loop_settings(self._options, options)
        return await loop.arun(self, prompt_or_messages, tools=tools, max_turns=max_turns, **settings)

    def iter_tools(
        self,
        prompt_or_messages: str | Iterable[dict[str, Any]],
        *,
        tools: Iterable[Any],
        max_turns: int = 10,
        **options: Any,
    ) -> Events:
        """Like ``run_tools``, yielding what happens as it happens; see ``loopmux.loop.aiterate``.

        ``messages`` of what comes back is the transcript so far, at any time: also when its task was cancelled.
        """
        from loopmux import loop

        settings = loop_settings(self._options, options)
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
        status = await self._ask(Asked(wire.new_id(), self._give_up_at()))
        assert isinstance(status, Status), "STATUS is answered with REPORT"
        return status

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
        status = await self._ask(evict_order(worker, within, self._give_up_at()))
        assert isinstance(status, Status), "EVICT is answered with REPORT"
        return status

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
        match answered:
            case Answer(_, answer):
                return answer
            case Fail(_, error):
                raise error
            case other:
                raise AssertionError(f"a question was answered with {other}")

    def _begin(self, options: Mapping[str, Any], prompt: str | None, *, collect: bool) -> AsyncStream:
        driver = self._channel.driver()
        request = make_request(merge(self._options, options, {"prompt": prompt}), driver.loop.time(), collect=collect)
        return AsyncStream(self._channel, driver, request)
