"""What Loopmux replaces, as a peer of the broker: ``PYTHON peer_replaced.py PORT``, in an environment with FastAPI.

A server around one model's ``generate()`` with a lock. As in transformers ``generate()`` blocks, and its streamer hands
over text through a queue, so both are in threads of their own; here it echoes. Same paths as ``peer_fastapi``, whose
echo needs neither.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI  # type: ignore[import-not-found]
from fastapi.responses import StreamingResponse  # type: ignore[import-not-found]

app = FastAPI()
_model = threading.Lock()


def generate(text: str, pieces: int, streamer: queue.SimpleQueue[str | None]) -> None:
    """Hand over all pieces, then the end."""
    with _model:
        for _ in range(pieces):
            streamer.put(text)
        streamer.put(None)


@app.post("/echo")  # type: ignore[untyped-decorator]
def echo(request: dict[str, Any]) -> dict[str, Any]:
    """One answer."""
    streamer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    generate(request["text"], 1, streamer)
    return {"text": "".join(_texts(streamer))}


@app.post("/stream")  # type: ignore[untyped-decorator]
def stream(request: dict[str, Any]) -> StreamingResponse:
    """Many pieces of one."""
    streamer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=generate, args=(request["text"], request["chunks"], streamer)).start()
    return StreamingResponse((f"data: {text}\n\n" for text in _texts(streamer)), media_type="text/event-stream")


def _texts(streamer: queue.SimpleQueue[str | None]) -> Iterator[str]:
    while (text := streamer.get()) is not None:
        yield text


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
