"""The sync client.

Safe to share between threads: every call is a request of its own on one connection, which one background thread owns.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack

from loopmux import wire
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
from loopmux.errors import ConnectionLostError
from loopmux.events import Asked, CancelAsked, Fail, Finish, Hinted, Request
from loopmux.messages import (
    AdapterStatus,
    Done,
    ModelStatus,
    Status,
)
from loopmux.options import Options, PromptOptions
from loopmux.pump import Channel, Pump
from loopmux.results import Result, StreamEvent

if TYPE_CHECKING:
    from typing import Self

    from loopmux.loop import Events
    from loopmux.loopevents import ToolLoopResult


class _Inbox:
    """What came for one request. The outcome stays: what has just been taken out is lost where Ctrl-C comes then."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ForCaller] = queue.SimpleQueue()
        self._outcome: Finish | Fail | None = None

    def put(self, item: ForCaller) -> None:
        if isinstance(item, (Finish, Fail)):
            self._outcome = item
        self._queue.put(item)

    def get(self) -> ForCaller:
        """The next item, which is waited for; behind the last one the outcome, again."""
        return self._outcome if self._outcome and self._queue.empty() else self._queue.get()


class Stream(BaseStream[Pump]):
    """A generation that is being received: iterate over its events, once, in one thread.

    As a context manager it cancels the request in the engine when the block is left before the end. Iterating raises
    the request's error where it failed.
    """

    def __init__(self, channel: Channel, request: Request) -> None:
        self._channel = channel  # which stays open for as long as anybody reads
        self._inbox = _Inbox()
        super().__init__(channel.pump(), request, self._inbox.put)

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        if self._outcome is None:
            event = self._take()
            if event is not None:
                return event
        raise self._over(StopIteration)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def __del__(self) -> None:
        # __init__ may have failed before the request began
        if getattr(self, "_outcome", self) is None:
            self.leave()

    @property
    def result(self) -> Result:
        """The whole result; reads the rest of the stream if that was not done.

        Raises:
            LoopmuxError: the request failed or was cancelled.
        """
        while self._outcome is None:
            self._take()
        return self._result()

    def _take(self) -> StreamEvent | None:
        """Wait for the next event; None when the outcome came instead."""
        if self._driver.pid != os.getpid():
            raise ConnectionLostError(f"this stream belongs to process {self._driver.pid}: make a request in this one")
        return self._taken(self._inbox.get())


class Client(BaseClient[Channel]):
    """A client of the broker at ``endpoint`` (``$LOOPMUX_ENDPOINT``, else this user's ipc socket).

    Nothing is opened before the first call. ``timeout`` is the total deadline of a call that names none,
    ``connect_timeout`` how long to wait for a broker that never answered, both in seconds. Other options become the
    default of every call.

    To a tcp endpoint that another host has, ``key`` is the file of this client's key (``$LOOPMUX_KEY``) and
    ``server_key`` the broker's public key or a file with it (``$LOOPMUX_SERVER_KEY``). A broker that will not have the
    key ends every request with AuthError.

    Raises:
        ConfigError: the endpoint is not one, or the keys are not what it needs.
        BadRequestError: an unknown option, or a ``connect_timeout`` that is no time.
    """

    _channel_class = Channel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and close the connection. A copy made by ``with_options`` leaves it to its original."""
        if self._owner:
            self._channel.close()

    def generate(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Result:
        """Generate from a prompt (or ``messages=``, ``prompt_token_ids=``) and wait for the whole result.

        Raises:
            LoopmuxError: one of the family in ``loopmux.errors``, with the text so far.
        """
        with self._begin(options, prompt, collect=True) as answer:
            return answer.result

    def stream(self, prompt: str | None = None, **options: Unpack[PromptOptions]) -> Stream:
        """Begin a generation whose events are read as they come; use it as a context manager."""
        return self._begin(options, prompt, collect=False)

    def chat(self, messages: Messages, *, tools: Iterable[Any] | None = None, **options: Unpack[Options]) -> Result:
        """One turn of a conversation; ``tools`` are functions, Tools or schemas.

        The calls that the model makes are in the result's ``tool_calls``; nothing is run.
        """
        turn = {**options, "messages": messages, "tools": None if tools is None else list(tools)}
        with self._begin(turn, None, collect=True) as answer:
            return answer.result

    def run_tools(
        self,
        prompt_or_messages: str | Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Any],
        max_turns: int = 10,
        **options: Any,
    ) -> ToolLoopResult:
        """Let the model use tools until it answers; see ``loopmux.loop.run``."""
        from loopmux import loop

        settings = self._loop_settings(options)
        return loop.run(self, prompt_or_messages, tools=tools, max_turns=max_turns, **settings)

    def iter_tools(
        self,
        prompt_or_messages: str | Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Any],
        max_turns: int = 10,
        **options: Any,
    ) -> Events:
        """Like ``run_tools``, yielding what happens as it happens; see ``loopmux.loop.iterate``.

        ``messages`` of what comes back is the transcript at any time: after Ctrl-C, too, or what a callback raises.
        """
        from loopmux import loop

        settings = self._loop_settings(options)
        return loop.iterate(self, prompt_or_messages, tools=tools, max_turns=max_turns, **settings)

    def hint(self, session: str, state: Literal["waiting_on_tool", "done"], expected: float | None = None) -> None:
        """Tell the broker whether a session comes back, and after how many seconds if that is known; never waits.

        The worker that ran it may have to give its attention state up for others: for a session that waits it counts
        double when it is expected (without ``expected`` now), half as much for every minute before or after; for one
        that is ``done`` a fiftieth. Without a connection it is dropped: none is opened for it.

        Raises:
            BadRequestError: a field is of the wrong type or too long, or the state unknown.
        """
        self._channel.mention(Hinted(hint_of(session, state, expected)))

    def status(self) -> Status:
        """What the broker knows: models, workers, launchers, counters.

        Raises:
            ConnectionLostError: no answer within ``connect_timeout``.
        """
        return status_of(self._ask(Asked(wire.new_id(), self._give_up_at())))

    def models(self) -> list[ModelStatus]:
        """The models the broker knows, as in ``status``."""
        return list(self.status().models)

    def load_adapter(self, model: str, name: str, folder: str | Path) -> Done:
        """Have all workers of a model load an adapter, which becomes the model id ``name``; requests go on meanwhile.

        It is loaded in all of them or in none, and in workers that are started later until it is unloaded. Loading what
        is loaded already, under this name and with these contents, changes nothing.

        Args:
            model: whose type and system prompt it takes.
            name: for ``model=`` in a request, and for ``adapter=`` beside any model of the same workers.
            folder: where its files lie, on the workers' host; relative to the working directory.

        Returns:
            What came of it: ``content`` (hash of the files), ``workers`` and whether it is ``remembered``. Without a
            worker of a model on demand it is only that: the next one loads it, and finds out whether it can.

        Raises:
            BadRequestError: a field is of the wrong type or too long.
            LoopmuxError: it was loaded nowhere; the message has each worker's reason.
        """
        return outcome_of(self._ask(load_order(model, name, folder, self._give_up_at())))

    def unload_adapter(self, model: str, name: str) -> Done:
        """Take back what ``load_adapter`` did: new requests for it are refused, those that run end by themselves.

        Raises:
            AdapterNotFoundError: the model's workers do not have it.
            LoopmuxError: it could not be unloaded everywhere.
        """
        return outcome_of(self._ask(unload_order(model, name, self._give_up_at())))

    def adapters(self) -> list[AdapterStatus]:
        """The adapters that requests may name, as in ``status``."""
        return list(self.status().adapters)

    def drain(self, worker: str, *, within: float = 60.0) -> Status:
        """Have a worker leave in good order; of a client of the admin endpoint (``endpoints.admin_endpoint``).

        It gets nothing new. What runs there has half of ``within`` seconds to end and then goes on elsewhere, behind
        the tokens that it has. Returns at once; ``status`` shows the worker as draining until it has left. A launcher
        starts it again.

        Raises:
            BadRequestError: no worker has this name, or a field is of the wrong type or out of range.
            ProtocolError: the client is not one of the admin endpoint.
            ConnectionLostError: no answer within ``connect_timeout``.
        """
        return status_of(self._ask(evict_order(worker, within, self._give_up_at())))

    def _give_up_at(self) -> float:
        """When a question that is asked now stops waiting for a broker."""
        return time.monotonic() + self._channel.connect_timeout

    def _ask(self, question: Asked) -> Status | Done:
        inbox: queue.SimpleQueue[ForCaller] = queue.SimpleQueue()
        pump = self._channel.pump()
        try:
            pump.start(question, inbox.put)
            answered = inbox.get()
        except BaseException:  # Ctrl-C
            pump.forget(question.id)
            pump.post(CancelAsked(question.id))
            raise
        return answer_of(answered)

    def _begin(self, options: Mapping[str, Any], prompt: str | None, *, collect: bool) -> Stream:
        return Stream(self._channel, self._request(options, prompt, time.monotonic(), collect=collect))
