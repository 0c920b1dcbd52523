"""The broker's log: one line per event on standard error. Never a prompt, never an output."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog


class _Patient:
    """A stream that outlives its reader: the broker's parent may be gone, and the broker must still clean up."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except OSError:
            pass  # nobody reads any more, so there is nobody to tell

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass  # as above


def logger(form: str, level: str) -> structlog.typing.FilteringBoundLogger:
    """A logger to standard error: ``form`` is json or console, ``level`` the least that is written."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    wrapped: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(_Patient(sys.stderr)),  # type: ignore[arg-type]  # it only writes and flushes
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
    )
    return wrapped.bind(program="broker")
