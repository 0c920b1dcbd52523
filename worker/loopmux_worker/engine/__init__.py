"""Engines: what turns a request into tokens. ``base`` is the interface; ``open_engine`` chooses one."""

from __future__ import annotations

from collections.abc import Callable

from loopmux.errors import ConfigError
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
    if not spec.models:
        raise ConfigError(f"worker {spec.name!r}: models is empty, expected at least one")
    doubled = [m.id for i, m in enumerate(spec.models) if m.id in {other.id for other in spec.models[:i]}]
    if doubled:
        raise ConfigError(f"worker {spec.name!r}: the model id {doubled[0]!r} is given twice")
    match spec.engine:
        case "echo":
            from loopmux_worker.engine.echo import EchoEngine

            return EchoEngine(spec)
        case "auto" | "plain" | "slots":
            from loopmux_worker.engine.folders import check_folders

            check_folders(spec)
            from loopmux_worker.engine.opening import open_on_model

            return open_on_model(spec, progress)
