"""The sync client.

Safe to share between threads: every call is a request of its own on one connection, which one background thread owns.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

from loopmux import wire
from loopmux.bound import Bound
from loopmux.codec import FieldError, build, pack, show
from loopmux.endpoints import default_endpoint, ipc_path
from loopmux.errors import BadRequestError, CancelledError, ConnectionLostError, LoopmuxError, from_code
from loopmux.events import Answer, Asked, CancelAsked, Consumed, Deliver, Fail, Finish, Hinted, Request, Submitted
from loopmux.keys import credentials
from loopmux.messages import (
    DEFAULT_TIMEOUT,
    AdapterOrder,
    AdapterStatus,
    Done,
    Evict,
    ModelStatus,
    SessionHint,
    Status,
)
from loopmux.options import Defaults, Options, PromptOptions, check_plain, merge, prepare, seconds
from loopmux.pump import Channel
from loopmux.results import Result, StreamEvent, TextDelta
from loopmux.wire import Kind

if TYPE_CHECKING:
    from typing import Self

    from loopmux.loop import Events
    from loopmux.loopevents import ToolLoopResult

_ADAPTER_PATIENCE = 300.0
"""Seconds for the answer about an adapter: workers and launchers get 120 each from the broker."""

_Order = TypeVar("_Order", SessionHint, AdapterOrder, Evict)

Messages = Sequence[Mapping[str, Any]]
"""A conversation: role/content maps as chat templates take them."""


class _Inbox:
    """What came for one request. The outcome stays: what has just been taken out is lost where Ctrl-C comes then."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Deliver | Finish | Fail | Answer] = queue.SimpleQueue()
        self._outcome: Finish | Fail | None = None

    def put(self, item: Deliver | Finish | Fail | Answer) -> None:
        if isinstance(item, (Finish, Fail)):
            self._outcome = item
        self._queue.put(item)

    def get(self) -> Deliver | Finish | Fail | Answer:
        """The next item, which is waited for; behind the last one the outcome, again."""
        return self._outcome if self._outcome and self._queue.empty() else self._queue.get()


class Stream(Bound):
    """A generation that is being received: iterate over its events, once, in one thread.

    As a context manager it cancels the request in the engine when the block is left before the end. Iterating raises
    the request's error where it failed.
    """

    _instead = "read it here, and pass on its result"

    def __init__(self, channel: Channel, request: Request) -> None:
        self.request_id = request.id.hex()
        self._channel = channel  # which stays open for as long as anybody reads
        self._pump = pump = channel.pump()
        self._id = request.id
        self._inbox = _Inbox()
        self._texts: list[str] = []
        self._outcome: Result | LoopmuxError | None = None
        self._raised = False
        pump.start(Submitted(request), self._inbox.put)

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        if self._outcome is None:
            event = self._take()
            if event is not None:
                return event
        if isinstance(self._outcome, LoopmuxError) and not self._raised:
            self._raised = True
            raise self._outcome
        raise StopIteration

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
    def text(self) -> str:
        """The text of the events read so far."""
        return "".join(self._texts)

    @property
    def result(self) -> Result:
        """The whole result; reads the rest of the stream if that was not done.

        Raises:
            LoopmuxError: the request failed or was cancelled.
        """
        while self._outcome is None:
            self._take()
        if isinstance(self._outcome, LoopmuxError):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        """Ask for the end of the request, from any thread.

        The reader then gets CancelledError, or the end of the stream if that was first.
        """
        if self._outcome is None:
            self._pump.post(CancelAsked(self._id))

    def leave(self) -> None:
        """Stop reading: an unfinished request is cancelled in the engine, and the reader's side ends at once."""
        if self._outcome is None:
            self._pump.forget(self._id)
            self._pump.post(CancelAsked(self._id))
            left = "the stream was left before its end"
            self._outcome = CancelledError(left, request_id=self.request_id, partial_text=self.text)
            self._inbox.put(Fail(self._id, self._outcome))  # for a thread that waits for the next event

    def _take(self) -> StreamEvent | None:
        """Wait for the next event; None when the outcome came instead."""
        if self._pump.pid != os.getpid():
            raise ConnectionLostError(f"this stream belongs to process {self._pump.pid}: make a request in this one")
        item = self._inbox.get()
        match item:
            case Deliver(_, event, report):
                if isinstance(event, TextDelta):
                    self._texts.append(event.text)
                if report:
                    self._pump.post(Consumed(self._id, report))
                return event
            case Finish(_, result):
                self._outcome = result
            case Fail(_, error):
                self._outcome = error
        self._inbox.put(item)  # another thread that waits here as well must not wait for ever
        return None


class Client(Bound):
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

    _instead = "make one in each process; here with_options() makes one that shares its connection"

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
        self._channel = Channel(self.endpoint, patience, credentials(self.endpoint, key, server_key))
        self._owner = True

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

    def with_options(self, **options: Unpack[Options]) -> Client:
        """A client with other defaults that shares this one's connection."""
        copy = object.__new__(type(self))
        copy.endpoint = self.endpoint
        copy._options = merge(self._options, options)
        copy._channel = self._channel
        copy._owner = False
        return copy

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

        settings = loop_settings(self._options, options)
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

        settings = loop_settings(self._options, options)
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
        status = self._ask(Asked(wire.new_id(), self._give_up_at()))
        assert isinstance(status, Status), "STATUS is answered with REPORT"
        return status

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
        status = self._ask(evict_order(worker, within, self._give_up_at()))
        assert isinstance(status, Status), "EVICT is answered with REPORT"
        return status

    def _give_up_at(self) -> float:
        """When a question that is asked now stops waiting for a broker."""
        return time.monotonic() + self._channel.connect_timeout

    def _ask(self, question: Asked) -> Status | Done:
        inbox: queue.SimpleQueue[Deliver | Finish | Fail | Answer] = queue.SimpleQueue()
        pump = self._channel.pump()
        try:
            pump.start(question, inbox.put)
            answered = inbox.get()
        except BaseException:  # Ctrl-C
            pump.forget(question.id)
            pump.post(CancelAsked(question.id))
            raise
        match answered:
            case Answer(_, answer):
                return answer
            case Fail(_, error):
                raise error
            case other:
                raise AssertionError(f"a question was answered with {other}")

    def _begin(self, options: Mapping[str, Any], prompt: str | None, *, collect: bool) -> Stream:
        request = make_request(merge(self._options, options, {"prompt": prompt}), time.monotonic(), collect=collect)
        return Stream(self._channel, request)


def make_request(options: Mapping[str, Any], now: float, *, collect: bool) -> Request:
    """A request from merged options.

    Raises:
        BadRequestError, PayloadTooLargeError: it cannot be asked.
    """
    ready = prepare(options)
    return Request(wire.new_id(), ready.submit, ready.body, now + ready.submit.timeout, ready.idle_timeout, collect)


def loop_settings(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a tool loop is told: what was given, and those of the client's defaults that loops have rules for."""
    return {name: defaults[name] for name in ("session", "tool_choice") if name in defaults} | dict(given)


def hint_of(session: str, state: str, expected: float | None) -> SessionHint:
    """A checked SESSION hint.

    Raises:
        BadRequestError: a field is of the wrong type or too long, or the state unknown.
    """
    return _checked(SessionHint, session=session, state=state, expected=expected)


def load_order(model: str, name: str, folder: str | Path, give_up_at: float) -> Asked:
    """LOAD, as a question; a relative folder is one of this process's.

    Raises:
        BadRequestError: a field is of the wrong type or too long.
    """
    try:
        path = str(Path(folder).expanduser().absolute())
    except (TypeError, RuntimeError) as error:
        raise BadRequestError(f"folder: found {show(folder)}, expected a path: {error}") from error
    order = _checked(AdapterOrder, model=model, name=name, folder=path)
    return Asked(wire.new_id(), give_up_at, Kind.LOAD, pack(order), _ADAPTER_PATIENCE)


def unload_order(model: str, name: str, give_up_at: float) -> Asked:
    """UNLOAD, as a question.

    Raises:
        BadRequestError: a field is of the wrong type or too long.
    """
    order = _checked(AdapterOrder, model=model, name=name)
    return Asked(wire.new_id(), give_up_at, Kind.UNLOAD, pack(order), _ADAPTER_PATIENCE)


def evict_order(worker: str, within: float, give_up_at: float) -> Asked:
    """EVICT, as a question.

    Raises:
        BadRequestError: a field is of the wrong type or too long, or ``within`` out of range.
    """
    order = _checked(Evict, worker=worker, within=within)
    order.check()
    return Asked(wire.new_id(), give_up_at, Kind.EVICT, pack(order))


def _checked(kind: type[_Order], **fields: object) -> _Order:
    """What a caller wants of the broker, refused here where the broker would count it as malformed.

    Raises:
        BadRequestError: naming the field, what was found and what was expected.
    """
    try:
        order = build(kind, fields)
    except FieldError as error:
        raise BadRequestError(str(error)) from error
    for name, value in fields.items():
        check_plain(value, name, 0)
    if (size := len(pack(order))) > wire.SUBMIT_ROUTE_LIMIT:
        texts = {name: len(value) for name, value in fields.items() if isinstance(value, str)}
        longest = max(texts, key=texts.__getitem__)
        raise BadRequestError(
            f"{longest}: found a text of {texts[longest]} characters, expected a shorter one: "
            f"{', '.join(fields)} take {size} bytes, at most {wire.SUBMIT_ROUTE_LIMIT} fit"
        )
    return order


def outcome_of(answer: Status | Done) -> Done:
    """What came of LOAD or UNLOAD.

    Raises:
        LoopmuxError: it was not done.
    """
    assert isinstance(answer, Done), "LOAD and UNLOAD are answered with DONE"
    if (failure := answer.failure) is not None:
        raise from_code(
            failure.code,
            failure.message,
            retryable=failure.retryable,
            model=failure.model,
            retry_after=failure.retry_after,
        )
    return answer
