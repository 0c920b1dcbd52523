"""An MCP server made with the official SDK: ``python mcpshop.py`` speaks over standard input and output, with the
number of a listening socket over HTTP."""

from __future__ import annotations

import os
import socket
import sys
from typing import TypedDict

import anyio
import uvicorn
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("the shop")


class Article(TypedDict):
    name: str
    price: float


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="stock.find")
def find(name: str) -> Article:
    """Find an article."""
    return {"name": name, "price": 2.5}


@server.tool(structured_output=False)
def picture(name: str) -> list[str | Image]:
    """What an article looks like."""
    return [f"the {name}:", Image(data=b"\x89PNG", format="png")]


@server.tool(structured_output=False)
def variable(name: str) -> str:
    """A variable of the server's environment."""
    return os.environ.get(name, "not set")


@server.tool()
def order(count: int) -> str:
    """Order some."""
    raise ToolError("the shop is closed")


@server.tool()
def pid() -> int:
    """The server's process."""
    return os.getpid()


@server.tool()
async def hang() -> None:
    """Never answer."""
    await anyio.sleep_forever()


@server.tool()
def die() -> None:
    """End the server."""
    print("out of paper", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        listening = socket.socket(fileno=int(sys.argv[1]))
        uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_level="warning")).run([listening])
    else:
        server.run()
