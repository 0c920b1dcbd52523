"""A real HTTP server with set answers, for what speaks to tool servers."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = tuple[int, Any]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        self.server.seen.append((self.command, self.path, self.headers.get("X-Auth-Token"), body))
        answer = self.server.answers[self.path]
        status, data = answer(body) if callable(answer) else answer
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None: ...


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, answers: dict[str, Answer | Callable[[Any], Answer]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen = answers, []  # type: ignore[var-annotated]
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(answers: dict[str, Answer | Callable[[Any], Answer]]) -> Iterator[Server]:
    with Server(answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
