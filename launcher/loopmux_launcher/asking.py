"""Asking the broker how things are, once a second, for the live view: in a thread, since an answer may take time."""

from __future__ import annotations

import threading

from loopmux.client import Client
from loopmux.errors import LoopmuxError
from loopmux.messages import Status

_EVERY = 1.0
"""Seconds between two questions: workers report at that pace."""


class Asking:
    """Keeps ``status`` up to date until it is left; None while no broker answers."""

    def __init__(self, endpoint: str) -> None:
        self._client = Client(endpoint, connect_timeout=_EVERY)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="asking", daemon=True)
        self.status: Status | None = None

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._left.set()
        self._client.close()  # which answers a question that waits
        self._thread.join()

    def _run(self) -> None:
        while not self._left.wait(_EVERY):
            try:
                self.status = self._client.status()
            except LoopmuxError:
                self.status = None  # the broker is being started, or has ended
