"""Short work that Ctrl-C does not cut short: what a signal's handler raises comes in the main thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run(work: Callable[[], T]) -> T:
    """Do something in a thread of its own, and wait for it.

    What is raised here meanwhile comes out when the work has ended or will never begin; a second time it comes at once.
    """
    done: Future[T] = Future()

    def perform() -> None:
        if done.set_running_or_notify_cancel():
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - who waits gets it
                done.set_exception(error)

    try:
        threading.Thread(target=perform, name="loopmux-uninterrupted", daemon=True).start()
        return done.result()
    except BaseException:
        if not done.cancel():
            done.exception()
        raise
