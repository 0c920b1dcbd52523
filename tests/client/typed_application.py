"""What an application may write under ``mypy --strict``. Read by the type checker (``make lint``), never run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NotRequired, TypedDict

import loopmux
from loopmux import loop
from loopmux.mcp import MCPServer
from loopmux.tools import tool
from loopmux.toolserver import ToolServer


class Message(TypedDict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: NotRequired[str]


class Schema(TypedDict):
    type: str
    function: dict[str, object]


class Settings(TypedDict, total=False):
    model: str
    temperature: float


def add(a: int, b: int) -> int:
    return a + b


async def wait(seconds: float) -> None: ...


@tool(danger="dangerous")
def wipe(path: str) -> bool:
    return bool(path)


typed: list[Message] = []
texts: list[dict[str, str]] = []
objects: list[dict[str, object]] = []
maps: tuple[Mapping[str, str], ...] = ()
schema: Schema = {"type": "function", "function": {"name": "add"}}
functions: list[Callable[..., Any]] = [add]
mixed = [add, wait, wipe, functools.partial(add, 1), ToolServer("http://host"), MCPServer("command")]
settings: Settings = {"model": "default"}


def one_by_one() -> Iterator[Message]:
    yield from typed


def decide(call: loopmux.ToolCall) -> loop.Decision:
    return loop.Run() if call.arguments else loop.Deny("no arguments")


async def decide_later(call: loopmux.ToolCall) -> bool:
    return bool(call.arguments)


def see(event: loop.LoopEvent) -> None:
    if isinstance(event, loop.LoopFinished):
        print(event.result.text)


def use(client: loopmux.Client) -> None:
    for messages in (typed, texts, objects, maps):
        client.chat(messages, tools=mixed)
        client.generate(messages=messages, tools=[schema])
        client.run_tools(messages, tools=functions)
    client.chat(typed, tools=[add, schema, wipe], **settings)
    client.run_tools(typed, tools=mixed, before_tool=decide, on_event=see)
    client.run_tools(texts, tools=(add, wipe))
    client.run_tools(maps, tools=[add])
    client.run_tools(one_by_one(), tools=[add])
    result = loop.run(client, typed, tools=mixed)
    loop.run(client, [*result.messages, *typed], tools=mixed)
    for event in (*client.iter_tools(typed, tools=[add]), *loop.iterate(client, objects, tools=[add])):
        see(event)


async def use_later(client: loopmux.AsyncClient) -> None:
    for messages in (typed, texts, objects, maps):
        await client.chat(messages, tools=mixed)
        await client.run_tools(messages, tools=mixed, before_tool=decide_later)
    await loop.arun(client, typed, tools=mixed)
    async for event in client.iter_tools(typed, tools=[add]):
        see(event)
    async for event in loop.aiterate(client, objects, tools=[add]):
        see(event)
