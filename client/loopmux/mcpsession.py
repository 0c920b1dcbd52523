"""The connection to an MCP server: opened, asked, lost, and opened again.

The SDK lives in an event loop of its own, in a thread of its own; whoever asks comes from other threads and loops.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from loopmux import uninterrupted
from loopmux.errors import BadRequestError, ConnectionLostError, DeadlineExceededError, LoopmuxError, ProtocolError
from loopmux.outcome import described

if TYPE_CHECKING:
    import anyio
    import mcp
    from anyio.abc import TaskGroup, TaskStatus
    from anyio.from_thread import BlockingPortal

_AGAIN = 10.0
"""Seconds between two attempts to open a server again: one that dies at once is not to be started by every call."""
_GOODBYE = 2.0
"""Seconds for taking leave of a server behind a URL; for a process the SDK has a patience of its own, then kills it."""
_LAST_WORDS = 300
"""Bytes at the end of a process's standard error, of which errors show the last line."""
_LONGEST_LOG = 1024 * 1024
"""Bytes of it that are kept: servers may write a line for each call, for as long as they run."""

_FORGOTTEN = re.compile(r"session (not found|terminated|expired)", re.IGNORECASE)
"""What is said of a session that a server behind a URL no longer has, as when it was started anew; codes differ."""

T = TypeVar("T")

_inherited: list[contextlib.ExitStack] = []
"""What a forked child has of its parent's connections: kept from being collected, since they are not its to end."""


class Session:
    """One connection at a time to one server.

    Args:
        target: the words of a command, or a URL.
        label: what errors call the server.
        timeout: seconds for opening it and for each answer.
        env: variables for the process.
        headers: HTTP headers for the URL.

    Attributes:
        called: what the server calls itself, once it was opened.
    """

    def __init__(
        self, target: list[str] | str, label: str, timeout: float, env: Mapping[str, str], headers: Mapping[str, str]
    ) -> None:
        self.called = "mcp"
        self.timeout = timeout
        self._target = target
        self._label = label
        self._env, self._headers = dict(env), dict(headers)
        self._end = contextlib.ExitStack()
        self._portal: BlockingPortal | None = None
        self._pid = os.getpid()
        self._log: TextIO
        # What follows belongs to the event loop's thread
        self._client: mcp.Client | None = None
        self._lost: str
        self._not_before: float
        self._opening: anyio.Lock
        self._closing: anyio.Event
        self._connections: TaskGroup
        self._leave: Callable[[], None]

    def open(self) -> None:
        """Connect.

        Raises:
            BadRequestError: it is open already.
            ConnectionLostError, DeadlineExceededError: the server cannot be started or reached, or does not answer.
            LoopmuxError: the SDK is not installed.
        """
        start_portal = _sdk()
        self._ours()
        if self._portal is not None:
            raise BadRequestError(f"{self._label} is open already: make a second object for a second connection")
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile("w"))
            fcntl.fcntl(self._log, fcntl.F_SETFL, fcntl.fcntl(self._log, fcntl.F_GETFL) | os.O_APPEND)
            # A portal that is interrupted while its event loop starts waits for the end of that one, for ever.
            portal = uninterrupted.run(lambda: stack.enter_context(start_portal(name="loopmux-mcp")))
            ended, _ = portal.start_task(self._serve)
            stack.callback(ended.result)
            stack.callback(portal.call, self._closing.set)
            portal.call(self._opened)
            self._portal, self._end = portal, stack.pop_all()

    def close(self) -> None:
        """End the connection; a server that is a process has ended when this returns. A child leaves its parent's."""
        self._ours()
        self._end.close()
        self._portal = None

    @property
    def portal(self) -> BlockingPortal:
        """The way into the event loop, for ``ask``.

        Raises:
            BadRequestError: it is not open.
        """
        self._ours()
        if self._portal is None:
            raise BadRequestError(
                f"{self._label} is not open: use it inside of its `with` block, and in the process that opened it"
            )
        return self._portal

    def _ours(self) -> None:
        """A forked child has no thread of its parent's, for which it would wait for ever."""
        if self._pid != os.getpid():
            _inherited.append(self._end)
            self._pid, self._end = os.getpid(), contextlib.ExitStack()
            self._portal = self._client = None

    async def ask(self, what: str, ask: Callable[[mcp.Client], Awaitable[T]]) -> T:
        """Ask within the time limit, in the connection's event loop; the SDK's errors become ours.

        Raises:
            ConnectionLostError: the connection was lost meanwhile, or is lost and cannot be opened again or not yet.
            DeadlineExceededError: there was no answer in time.
            ProtocolError: the answer was an error, or none of the protocol.
        """
        import anyio
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        self._shorten_log()
        try:
            with anyio.fail_after(self.timeout):
                client = await self._opened()
                return await ask(client)
        except LoopmuxError:
            raise
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{self._label}, asked for {what}, did not answer within {self.timeout:g} s: "
                "see whether it hangs, or give it more time with timeout="
            ) from error
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise self._gone("its connection was closed") from error
            if isinstance(self._target, str) and _FORGOTTEN.search(error.message):
                if self._client is client:
                    self._lost = error.message
                    self._leave()
                raise self._gone(error.message) from error
            raise ProtocolError(f"{self._label}, asked for {what}, answered with an error: {error}") from error
        except Exception as error:
            raise ProtocolError(f"{self._label}, asked for {what}, gave no answer: {described(error)}") from error

    async def _opened(self) -> mcp.Client:
        """The connection; where there is none, the first who comes opens it for all."""
        import anyio

        async with self._opening:
            if self._client is not None:
                return self._client
            if self._closing.is_set():
                raise self._gone("it is being closed")
            if self._lost:
                if anyio.current_time() < self._not_before:
                    raise self._gone(self._lost)
                self._not_before = anyio.current_time() + _AGAIN
            with anyio.CancelScope(shield=True):  # who asked first may be cancelled, the others are not
                client: mcp.Client = await self._connections.start(self._connection)
            return client

    def _gone(self, why: str) -> ConnectionLostError:
        return ConnectionLostError(
            f"{self._label} is gone ({why}{self._last_words()}): find out why it ended; a later call opens it again"
        )

    async def _serve(self, *, task_status: TaskStatus[None]) -> None:
        """Keep connections until ``close``, one after the other."""
        import anyio

        self._lost, self._not_before, self._leave = "", 0.0, lambda: None
        self._opening, self._closing = anyio.Lock(), anyio.Event()
        async with anyio.create_task_group() as self._connections:
            task_status.started()
            await self._closing.wait()
            self._leave()

    async def _connection(self, *, task_status: TaskStatus[mcp.Client]) -> None:
        """Connect, stay connected until told to leave, and take leave; one task, as the SDK's contexts want it."""
        import anyio
        import mcp

        client: mcp.Client | None = None
        over = anyio.Event()
        scope = anyio.CancelScope(deadline=anyio.current_time() + self.timeout)

        def leave() -> None:
            self._client = None
            over.set()
            scope.deadline = anyio.current_time() + (_GOODBYE if client else 0.0)

        def ended() -> None:
            if client is not None:  # else it is the opening that fails
                self._lost = "it ended"
                leave()

        self._leave = leave
        try:
            with scope:
                async with mcp.Client(self._streams(ended)) as client:
                    self.called = client.server_info.name if client.server_info else self.called
                    self._client, scope.deadline = client, math.inf
                    task_status.started(client)
                    await over.wait()
        except Exception as error:
            self._lost = described(_first(error))  # the calls that follow tell it
            if client is None:
                raise ConnectionLostError(
                    f"{self._label} cannot be opened ({self._lost}{self._last_words()}): {self._remedy()}"
                ) from error
        finally:
            if self._client is client:
                self._client = None
        if client is None:
            if over.is_set():
                raise self._gone("it is being closed")
            raise DeadlineExceededError(
                f"{self._label} did not answer within {self.timeout:g} s{self._last_words()}: {self._remedy()}"
            )

    def _remedy(self) -> str:
        if isinstance(self._target, str):
            return "see that a server for streamable HTTP runs there"
        return "see that the command starts a server which speaks MCP over standard input and output"

    @contextlib.asynccontextmanager
    async def _streams(self, ended: Callable[[], None]) -> AsyncIterator[Any]:
        """The SDK's transport; ``ended`` is called when a process stops talking."""
        import mcp

        if not isinstance(self._target, str):
            command, *words = self._target
            server = mcp.StdioServerParameters(command=command, args=words, env=self._env)
            async with mcp.stdio_client(server, errlog=self._log) as (said, heard):
                yield _Watched(said, ended), heard
            return
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        patience = httpx2.Timeout(self.timeout, read=None)  # a stream may be silent for long; each call has its limit
        async with (
            httpx2.AsyncClient(headers=self._headers, timeout=patience) as http,
            streamable_http_client(self._target, http_client=http) as streams,
        ):
            yield streams

    def _shorten_log(self) -> None:
        """Drop what the process wrote where it is too much; it goes on at the beginning, as it appends."""
        if os.fstat(self._log.fileno()).st_size > _LONGEST_LOG:
            os.ftruncate(self._log.fileno(), 0)

    def _last_words(self) -> str:
        """The last line of the process's standard error, for an error."""
        # by position: the process writes through the same file, whose own position is not ours to move
        size = os.fstat(self._log.fileno()).st_size
        end = os.pread(self._log.fileno(), _LAST_WORDS, max(0, size - _LAST_WORDS)).decode("utf-8", "replace")
        return f"; its last words: {end.split(chr(10))[-1]}" if (end := end.strip()) else ""


class _Watched:
    """A stream that tells of its end: the SDK does so only where a request is under way."""

    def __init__(self, stream: Any, ended: Callable[[], None]) -> None:
        self._stream = stream
        self._ended = ended

    async def receive(self) -> Any:
        return await self._stream.receive()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            self._ended()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _sdk() -> Any:
    """What starts an event loop in a thread, when everything that is needed is there.

    Raises:
        LoopmuxError: the SDK is not installed, or is too old.
    """
    try:
        from anyio.from_thread import start_blocking_portal
        from mcp import Client as Client  # 1.x has none
    except ImportError as error:
        raise LoopmuxError(
            f"MCP servers need the package mcp, 2.0 or newer ({error} in {sys.executable}): "
            "install Loopmux with its extra [mcp], in its source folder  pip install '.[mcp]'"
        ) from error
    return start_blocking_portal


def _first(error: BaseException) -> BaseException:
    """What went wrong first, inside of groups of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
