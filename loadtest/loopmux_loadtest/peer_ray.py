"""Ray Serve as a peer of the broker: ``PYTHON peer_ray.py PORT``; the same two paths as ``peer_fastapi``."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import ray  # type: ignore[import-not-found]
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

AT_ONCE = 2000
"""Requests that a replica takes at once: nothing is to queue."""


class Echo:
    """One answer."""

    async def __call__(self, request: Request) -> dict[str, Any]:
        """What came."""
        return {"text": (await request.json())["text"]}


class Stream:
    """Many pieces of one."""

    async def __call__(self, request: Request) -> StreamingResponse:
        """What came, as often as asked for."""
        wish = await request.json()

        async def pieces() -> AsyncIterator[str]:
            for _ in range(wish["chunks"]):
                yield f"data: {wish['text']}\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")


if __name__ == "__main__":
    deployed = serve.deployment(max_ongoing_requests=AT_ONCE)
    apps = [
        serve.RunTarget(deployed(Echo).bind(), "echo", "/echo"),
        serve.RunTarget(deployed(Stream).bind(), "stream", "/stream"),
    ]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
            serve.run_many(apps)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # instead of Ray's own, which leaves all of it there
            signal.pause()
        finally:
            ray.shutdown()
