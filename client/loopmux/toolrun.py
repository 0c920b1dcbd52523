"""One tool call, run: whatever the tool does, there is an outcome."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import Any

from loopmux.outcome import Outcome, described, failed, succeeded
from loopmux.results import ToolCall
from loopmux.tools import Tool


def perform(tool: Tool, call: ToolCall) -> Outcome:
    """Run a call in this thread; a coroutine function gets an event loop of its own. Never raises."""
    try:
        value = tool.function(**tool.bind(call.arguments))
        if inspect.isawaitable(value):
            import asyncio  # here: a program without coroutine tools does not pay for the import

            value = asyncio.run(_awaited(value))
        return succeeded(value)
    except BaseException as error:  # noqa: BLE001 - a tool may do anything (sys.exit too): it is the model's to correct
        return failed(described(error))


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value
