"""MCP servers as tool sources: processes that are spoken to over standard input and output, and URLs.

::

    with MCPServer("python -m mcp_server_time", name="time") as clock, MCPServer("https://host/mcp") as shop:
        client.run_tools("What time is it in Paris?", tools=[clock, shop, add])

The official SDK speaks the protocol (extra ``mcp``); it is imported when a server is opened.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loopmux.errors import BadRequestError, ConnectionLostError
from loopmux.mcpsession import Session
from loopmux.nearest import did_you_mean
from loopmux.tools import LATER, Danger, Tool, ToolError, check_seconds

if TYPE_CHECKING:
    import mcp
    from mcp import types


class MCPServer:
    """The tools of one MCP server: open it (``with`` or ``async with``) and hand it to loops as ``tools=[server]``.

    One connection serves any number of loops, threads and event loops. Where it is lost, the calls under way fail, and
    the next one opens the server again; where that is not for long, further ones fail for 10 s. Tools read and write
    text: images and sounds are named in the result and left out. What a process writes to its standard error goes to a
    temporary file; errors show the last line.

    Args:
        target: a command (a text as for a shell, or its words), or a URL for streamable HTTP.
        name: goes in front of the names of its tools, as ``name_tool``; by default what the server calls itself, ""
            for nothing.
        include: the only tools to take, by the server's names; all if empty.
        exclude: tools to leave out, likewise.
        timeout: seconds for opening it, for its list of tools and for each call; a loop's deadline holds as well.
        danger: level of its tools, or a function from a name to it. It is for ``before_tool`` to look at; ``loopmux
            chat`` asks before it runs what is not ``safe``.
        env: variables for the process beside ``PATH``, ``HOME`` and the like; it gets no others.
        headers: HTTP headers for the URL, such as ``Authorization``.

    Raises:
        BadRequestError: the target is no command and no URL, or was given the other one's settings; the time limit is
            none.
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
        url = target if isinstance(target, str) and re.match("https?://", target) else None
        words = [] if url else _words(target)
        if (env and url) or (headers and not url):
            raise BadRequestError(f"MCP server {target!r}: env= is for a command, headers= for a URL")
        check_seconds(timeout, f"MCP server {target!r}: timeout")
        shown = url.partition("?")[0] if url else shlex.join(words)
        self._label = f"the MCP server {name!r} ({shown})" if name else f"the MCP server {shown!r}"
        self._session = Session(url or words, self._label, timeout, env or {}, headers or {})
        self._prefix = name
        self._include, self._exclude = include, exclude
        self._danger = danger if callable(danger) else lambda _: danger

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ConnectionLostError, DeadlineExceededError: it cannot be started or reached, or does not answer.
            LoopmuxError: the SDK is not installed.
        """
        self._session.open()
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
        self._session.close()

    def tools(self) -> list[Tool]:
        """Its tools, as it lists them now.

        Raises:
            BadRequestError: ``include`` or ``exclude`` names a tool that is not there, or a tool has a name which no
                model can write.
            ConnectionLostError, DeadlineExceededError, ProtocolError: it is gone, does not answer, or answers nonsense.
        """
        listed = self._session.portal.call(self._list)
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
        return await asyncio.wrap_future(self._session.portal.start_task_soon(self._call, name, dict(arguments)))

    async def _list(self) -> list[types.Tool]:
        what = "what tools it has"
        try:
            return await self._session.ask(what, _listed)
        except ConnectionLostError:
            return await self._session.ask(what, _listed)  # nothing happens twice by it, and it may be opened again

    async def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        return _value(await self._session.ask(f"a call of {name!r}", lambda client: client.call_tool(name, arguments)))

    def _tool(self, listed: types.Tool) -> Tool:
        async def function(**arguments: Any) -> Any:
            return await self.call(listed.name, arguments)

        prefix = re.sub(r"[^A-Za-z0-9_-]+", "_", self._session.called) if self._prefix is None else self._prefix
        own = listed.name.replace(".", "_")  # dots are good there, and no model's template takes them
        try:
            return Tool(
                f"{prefix}_{own}" if prefix else own,
                listed.description or listed.title or "",
                {"type": "object", "properties": {}} | listed.input_schema,
                function,
                self._danger(listed.name),
                self._session.timeout + LATER,
            )
        except BadRequestError as error:
            raise BadRequestError(
                f"{self._label}: {error.message}; or leave it out with exclude=[{listed.name!r}]"
            ) from error


def _words(target: str | Sequence[str]) -> list[str]:
    try:
        words = shlex.split(target) if isinstance(target, str) else list(target)
    except ValueError as error:  # a quotation mark without its other half
        raise BadRequestError(f"MCP server {target!r}: {error}") from error
    if not words:
        raise BadRequestError("MCP server: found no words, expected a command such as 'uvx mcp-server-time', or a URL")
    return words


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
