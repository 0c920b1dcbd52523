"""MOSEC as a peer of the broker: ``PYTHON peer_mosec.py --port PORT``; the same two paths as ``peer_fastapi``."""

from __future__ import annotations

from typing import Any

from mosec import Server, SSEWorker, Worker  # type: ignore[import-not-found]

BATCH = 64
"""Requests that one call takes at most, so that its batching helps it."""


class Echo(Worker):  # type: ignore[misc]
    """One answer each."""

    def forward(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What came."""
        return [{"text": request["text"]} for request in requests]


class Stream(SSEWorker):  # type: ignore[misc]
    """Many pieces of one, for all requests of a batch in turn."""

    def forward(self, requests: list[dict[str, Any]]) -> list[str]:
        """What came, as often as asked for."""
        for _ in range(max(request["chunks"] for request in requests)):
            for index, request in enumerate(requests):
                self.send_stream_event(request["text"], index=index)
        return [""] * len(requests)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Echo, max_batch_size=BATCH, max_wait_time=1, route="/echo")
    server.append_worker(Stream, max_batch_size=BATCH, max_wait_time=1, route="/stream")
    server.run()
