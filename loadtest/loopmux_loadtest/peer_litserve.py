"""LitServe as a peer of the broker: ``PYTHON peer_litserve.py PORT``; the same two paths as ``peer_fastapi``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import litserve  # type: ignore[import-not-found]


class Echo(litserve.LitAPI):  # type: ignore[misc]
    """One answer."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def predict(self, request: dict[str, Any]) -> dict[str, Any]:
        """What came."""
        return {"text": request["text"]}


class Stream(litserve.LitAPI):  # type: ignore[misc]
    """Many pieces of one."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def predict(self, request: dict[str, Any]) -> Iterator[str]:
        """What came, as often as asked for."""
        for _ in range(request["chunks"]):
            yield f"data: {request['text']}\n\n"

    def encode_response(self, pieces: Iterator[str]) -> Iterator[str]:
        """As they are."""
        yield from pieces


if __name__ == "__main__":
    apis = [Echo(api_path="/echo"), Stream(api_path="/stream", stream=True)]
    server = litserve.LitServer(apis, accelerator="cpu", devices=1, fast_queue=True, timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
