"""MCP servers as tool sources: processes that are spoken to over standard input and output, and URLs.

::

    with MCPServer("python -m mcp_server_time", name="time") as clock, MCPServer("https://host/mcp") as shop:
        client.run_tools("What time is it in Paris?", tools=[clock, shop, add])

The official SDK speaks the protocol (extra ``mcp``); it is imported when a server is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from loopmux.errors import BadRequestError, ConnectionLostError, DeadlineExceededError, LoopmuxError, ProtocolError
from loopmux.nearest import did_you_mean
from loopmux.outcome import described
from loopmux.tools import Danger, Tool, ToolError

if TYPE_CHECKING:
    import anyio
    import mcp
    from anyio.abc import TaskStatus
    from anyio.from_thread import BlockingPortal
    from mcp import types

_GOODBYE = 2.0
"""Seconds for taking leave of a server behind a URL; for a process the SDK has a patience of its own, then kills it."""
_LATER = 1.0
"""Seconds that a loop waits longer for a call than we do: our error names the server."""
_LAST_WORDS = 300
"""Bytes at the end of a process's standard error, of which errors show the last line."""

T = TypeVar("T")


class MCPServer:
    """The tools of one MCP server: open it (``with`` or ``async with``) and hand it to loops as ``tools=[server]``.

    One connection, in a thread of its own, serves any number of loops, threads and event loops. Its tools read and
    write text: images and sounds are named in the result and left out. What a process writes to its standard error goes
    to a temporary file; errors show the last line.

    Args:
        target: a command (a text as for a shell, or its words), or a URL for streamable HTTP.
        name: goes in front of the names of its tools, as ``name_tool``; by default what the server calls itself, ""
            for nothing.
        include: the only tools to take, by the server's names; all if empty.
        exclude: tools to leave out, likewise.
        timeout: seconds for opening it, for its list of tools and for each call; a loop's deadline holds as well.
        danger: level of its tools, or a function from a name to it; the default is to be asked about
        env: variables for the process beside ``PATH``, ``HOME`` and the like; it gets no others.
        headers: HTTP headers for the URL, such as ``Authorization``.

    Raises:
        BadRequestError: the target is no command and no URL, or was given the other one's settings.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        name: str | None = None,
        include: Collection[str] = (),
        exclude: Collection[str] = (),
        timeout: float = 30.0,
        danger: Danger | Callable[[str], Danger] = "warning",
        env: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._url = target if isinstance(target, str) and re.match("https?://", target) else None
        self._words = [] if self._url else _words(target)
        if (env and self._url) or (headers and not self._url):
            raise BadRequestError(f"MCP server {target!r}: env= is for a command, headers= for a URL")
        shown = self._url.partition("?")[0] if self._url else shlex.join(self._words)
        self._label = f"the MCP server {name!r} ({shown})" if name else f"the MCP server {shown!r}"
        self._prefix = name
        self._include, self._exclude = include, exclude
        self._timeout = timeout
        self._danger = danger if callable(danger) else lambda _: danger
        self._env, self._headers = dict(env or {}), dict(headers or {})
        self._end = contextlib.ExitStack()
        self._portal: BlockingPortal | None = None
        self._client: mcp.Client | None = None
        self._lost = ""
        self._closing: anyio.Event
        self._log: TextIO

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ConnectionLostError, DeadlineExceededError: it cannot be started or reached, or does not answer.
            LoopmuxError: the SDK is not installed.
        """
        start_portal = _sdk()
        if self._portal is not None:
            raise BadRequestError(f"{self._label} is open already: make a second object for a second connection")
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile("w"))
            portal = stack.enter_context(start_portal(name="loopmux-mcp"))
            ended, _ = portal.start_task(self._connection)
            stack.callback(ended.result)
            stack.callback(portal.call, self._closing.set)
            self._portal, self._end = portal, stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        opening = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])  # a thread cannot be stopped, and what it opens must not stay open
            await asyncio.to_thread(self.close)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the connection; a server that is a process has ended when this returns."""
        self._end.close()
        self._portal = None

    def tools(self) -> list[Tool]:
        """Its tools, as it lists them now.

        Raises:
            BadRequestError: ``include`` or ``exclude`` names a tool that is not there, or a tool has a name which no
                model can write.
            ConnectionLostError, DeadlineExceededError, ProtocolError: it is gone, does not answer, or answers nonsense.
        """
        listed = self._connected().call(self._ask, "what tools it has", _listed)
        names = [tool.name for tool in listed]
        if missing := next((name for name in (*self._include, *self._exclude) if name not in names), None):
            hint = did_you_mean(missing, names) or f"it has {', '.join(names)}"
            raise BadRequestError(f"{self._label} has no tool {missing!r} to include or exclude: {hint}")
        chosen = [tool for tool in listed if not self._include or tool.name in self._include]
        return [self._tool(tool) for tool in chosen if tool.name not in self._exclude]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Run one tool, by the server's name, and return its result: text or JSON values.

        Raises:
            ToolError: the tool failed; its text is the server's.
            ConnectionLostError, DeadlineExceededError, ProtocolError: as ``tools``.
        """
        return await asyncio.wrap_future(self._connected().start_task_soon(self._call, name, dict(arguments)))

    async def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        return _value(await self._ask(f"a call of {name!r}", lambda client: client.call_tool(name, arguments)))

    def _tool(self, listed: types.Tool) -> Tool:
        async def function(**arguments: Any) -> Any:
            return await self.call(listed.name, arguments)

        own = listed.name.replace(".", "_")  # dots are good there, and no model's template takes them
        try:
            return Tool(
                f"{self._prefix}_{own}" if self._prefix else own,
                listed.description or listed.title or "",
                {"type": "object", "properties": {}} | listed.input_schema,
                function,
                self._danger(listed.name),
                self._timeout + _LATER,
            )
        except BadRequestError as error:
            raise BadRequestError(
                f"{self._label}: {error.message}; or leave it out with exclude=[{listed.name!r}]"
            ) from error

    def _connected(self) -> BlockingPortal:
        if self._portal is None:
            raise BadRequestError(f"{self._label} is not open: use it inside of its `with` block")
        return self._portal

    async def _ask(self, what: str, ask: Callable[[mcp.Client], Awaitable[T]]) -> T:
        """Ask within the time limit, in the connection's event loop; the SDK's errors become ours."""
        import anyio
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        client = self._client
        if client is None:
            raise self._gone(self._lost)
        try:
            with anyio.fail_after(self._timeout):
                return await ask(client)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"{self._label}, asked for {what}, did not answer within {self._timeout:g} s: "
                "see whether it hangs, or give it more time with timeout="
            ) from error
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise self._gone("its connection was closed") from error
            raise ProtocolError(f"{self._label}, asked for {what}, answered with an error: {error}") from error
        except Exception as error:
            raise ProtocolError(f"{self._label}, asked for {what}, gave no answer: {described(error)}") from error

    def _gone(self, why: str) -> ConnectionLostError:
        return ConnectionLostError(
            f"{self._label} is gone ({why}{self._last_words()}): find out why it ended, and open it again"
        )

    async def _connection(self, *, task_status: TaskStatus[None]) -> None:
        """Connect, stay connected until ``close``, and take leave; one task, as the SDK's contexts want it."""
        import anyio
        import mcp

        self._closing = anyio.Event()
        opened = False
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + self._timeout) as scope:
                async with mcp.Client(self._streams()) as client:
                    if self._prefix is None:
                        called = client.server_info.name if client.server_info else "mcp"
                        self._prefix = re.sub(r"[^A-Za-z0-9_-]+", "_", called)
                    self._client, opened, scope.deadline = client, True, math.inf
                    task_status.started()
                    await self._closing.wait()
                    scope.deadline = anyio.current_time() + _GOODBYE
        except Exception as error:
            self._lost = described(_first(error))  # the calls that follow tell it
            if not opened:
                raise ConnectionLostError(
                    f"{self._label} cannot be opened ({self._lost}{self._last_words()}): {self._remedy()}"
                ) from error
        finally:
            self._client = None
        if not opened:
            raise DeadlineExceededError(
                f"{self._label} did not answer within {self._timeout:g} s{self._last_words()}: {self._remedy()}"
            )

    def _remedy(self) -> str:
        if self._url:
            return "see that a server for streamable HTTP runs there"
        return "see that the command starts a server which speaks MCP over standard input and output"

    @contextlib.asynccontextmanager
    async def _streams(self) -> AsyncIterator[Any]:
        """The SDK's transport."""
        import mcp

        if self._url is None:
            server = mcp.StdioServerParameters(command=self._words[0], args=self._words[1:], env=self._env)
            async with mcp.stdio_client(server, errlog=self._log) as streams:
                yield streams
            return
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        patience = httpx2.Timeout(self._timeout, read=None)  # a stream may be silent for long; each call has its limit
        async with (
            httpx2.AsyncClient(headers=self._headers, timeout=patience) as http,
            streamable_http_client(self._url, http_client=http) as streams,
        ):
            yield streams

    def _last_words(self) -> str:
        """The last line of the process's standard error, for an error."""
        # by position: the process writes through the same file, whose own position is not ours to move
        size = os.fstat(self._log.fileno()).st_size
        end = os.pread(self._log.fileno(), _LAST_WORDS, max(0, size - _LAST_WORDS)).decode("utf-8", "replace")
        return f"; its last words: {end.split(chr(10))[-1]}" if (end := end.strip()) else ""


def _words(target: str | Sequence[str]) -> list[str]:
    try:
        words = shlex.split(target) if isinstance(target, str) else list(target)
    except ValueError as error:  # a quotation mark without its other half
        raise BadRequestError(f"MCP server {target!r}: {error}") from error
    if not words:
        raise BadRequestError("MCP server: found no words, expected a command such as 'uvx mcp-server-time', or a URL")
    return words


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


async def _listed(client: mcp.Client) -> list[types.Tool]:
    """All pages of a server's list of tools."""
    tools: list[types.Tool] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tools


def _value(result: types.CallToolResult) -> Any:
    """A call's result: structured content where there is any, else text.

    Raises:
        ToolError: the tool says that it failed.
    """
    text = "\n".join(_text(block) for block in result.content)
    if result.is_error:
        raise ToolError(text or "the tool failed without saying why")
    if result.structured_content is None or any(block.type != "text" for block in result.content):
        return text
    match result.structured_content:
        case {"result": value, **others} if not others:  # how servers wrap what is no object
            return value
    return result.structured_content


def _text(block: types.ContentBlock) -> str:
    """A part of a result as text; a model is told of what it cannot see."""
    from mcp import types

    match block:
        case types.TextContent(text=text):
            return text
        case types.EmbeddedResource(resource=types.TextResourceContents(text=text)):
            return text
        case types.EmbeddedResource(resource=resource):
            return f"[left out: the resource {resource.uri}, which is no text]"
        case types.ResourceLink(name=name, uri=uri):
            return f"[a resource: {name}, {uri}]"
        case types.ImageContent(mime_type=kind) | types.AudioContent(mime_type=kind):
            return f"[left out: {block.type} of the type {kind}, which is no text]"
