"""Engines: what turns a request into tokens. ``base`` is the interface; ``open_engine`` chooses one."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future

from loopmux.messages import WorkerSpec
from loopmux_worker.engine.base import Engine


def open_engine(spec: WorkerSpec, progress: Callable[[str, str], None]) -> Engine:
    """The engine for a specification, loaded and warm. torch is imported for the engines that need it only.

    Args:
        spec: what to serve.
        progress: told a phase (loading, warming) and a line for people.

    Raises:
        ConfigError: something in it cannot be served; it says what was found, what was expected and what to do.
    """
    spec.check()
    match spec.engine:
        case "echo":
            from loopmux_worker.engine.echo import EchoEngine

            return EchoEngine(spec)
        case "auto" | "plain" | "slots":
            from loopmux_worker.engine import memory
            from loopmux_worker.engine.specfolders import check_folders

            check_folders(spec)
            with memory.explained("torch and transformers were imported", "these libraries, some hundred MiB"):
                open_on_model = opener()
            return _in_passing(lambda: open_on_model(spec, progress))


@functools.cache
def opener() -> Callable[[WorkerSpec, Callable[[str, str], None]], Engine]:
    """``open_on_model``, with torch and transformers.

    Importing them makes hundreds of thousands of objects, all of which stay. Python's collector looked through them
    again and again, for a quarter of the processor time that importing took, so it is kept away from them.
    """
    gc.disable()
    try:
        from loopmux_worker.engine.opening import open_on_model
    finally:
        gc.freeze()
        gc.enable()
    return open_on_model


def _in_passing(make: Callable[[], Engine]) -> Engine:
    """Call something in a thread that ends with it.

    libgomp keeps a team of threads for every thread that has computed, and once all teams together are more than the
    cores it sends them to sleep between any two operations, so the thread that loads must not stay beside the one that
    steps.
    """
    made: Future[Engine] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            made.set_exception(error)

    thread = threading.Thread(target=run, name="loading", daemon=True)
    thread.start()
    thread.join()
    return made.result()
