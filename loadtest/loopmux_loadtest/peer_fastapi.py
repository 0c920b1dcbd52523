"""FastAPI and uvicorn as a peer of the broker: ``PYTHON peer_fastapi.py PORT``, in an environment that has them.

``POST /echo`` answers with the text it got; ``POST /stream`` answers with as many server-sent events as asked for.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI  # type: ignore[import-not-found]
from fastapi.responses import StreamingResponse  # type: ignore[import-not-found]

app = FastAPI()


@app.post("/echo")  # type: ignore[untyped-decorator]
async def echo(request: dict[str, Any]) -> dict[str, Any]:
    """One answer."""
    return {"text": request["text"]}


@app.post("/stream")  # type: ignore[untyped-decorator]
async def stream(request: dict[str, Any]) -> StreamingResponse:
    """Many pieces of one."""

    async def pieces() -> AsyncIterator[str]:
        for _ in range(request["chunks"]):
            yield f"data: {request['text']}\n\n"
            await asyncio.sleep(0)  # streams take turns, as tokens that come from elsewhere make them

    return StreamingResponse(pieces(), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
