"""The preparing thread: prompts are rendered and tokenised there, beside the engine's steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from loopmux_worker.engine.base import Job


class Preparer:
    """Prepares jobs one after the other, in the order in which they come.

    An executor of the standard library would keep the interpreter from ending while a long prompt is prepared.

    Args:
        prepare: ``Engine.prepare``, called in a thread of its own.
    """

    def __init__(self, prepare: Callable[[Job], Any]) -> None:
        self._prepare = prepare
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Any]] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preparing", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, job: Job) -> Future[Any]:
        """What will come of a job; one that is cancelled before its turn is left out. Never blocks."""
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        return future

    def stop(self) -> None:
        """End behind the job at hand; does not wait for that, which may take seconds."""
        self._stopping.set()
        self._jobs.put(None)

    def _run(self) -> None:
        while (taken := self._jobs.get()) is not None and not self._stopping.is_set():
            job, future = taken
            if not future.set_running_or_notify_cancel():
                continue
            try:
                prepared = self._prepare(job)
            except BaseException as error:  # noqa: BLE001 - handed to the engine's thread, which tells whose it is
                future.set_exception(error)
            else:
                future.set_result(prepared)
