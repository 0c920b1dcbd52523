"""The worker's log: one JSON line per event on standard error. Prompts and outputs are never logged.

Nobody who reads it is waited for: what he has no room for goes later.

structlog is imported with the first line: most workers write none, and where no torch is loaded its import would be a
good part of a worker's start, at the cost of those that stream beside it.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from loopmux.outlet import Outlet

_FAREWELL = 1.0
"""Seconds."""
_outlet: list[Outlet] = []
"""Where lines go, once there was one."""
_chosen: list[str] = []
"""The level of ``set_up``, once that was called."""


def set_up(level: str) -> None:
    """Write events of ``level`` and above as JSON lines to standard error. Called once."""
    _chosen.append(level)


def prepare() -> None:
    """Have everything here that a line needs: it may be about memory that ran out."""
    _logger()


def warning(event: str, **fields: object) -> None:
    """Something is not as it should be, and goes on."""
    _logger().warning(event, **fields)


def error(event: str, **fields: object) -> None:
    """Something does not go on."""
    _logger().error(event, **fields)


def exception(event: str, **fields: object) -> None:
    """The same, with the exception that is being handled."""
    _logger().exception(event, **fields)


def pass_on() -> None:
    """Write what its reader had no room for before."""
    for outlet in _outlet:
        outlet.flush()


def end() -> None:
    """The last line was said: give whoever reads them a moment to take them."""
    for outlet in _outlet:
        outlet.drain(_FAREWELL)


def _lost(count: int) -> str:
    return json.dumps({"event": "log lines lost", "level": "warning", "count": count}) + "\n"


def _logger() -> Any:
    import structlog

    if _chosen and not structlog.is_configured():
        _outlet.append(Outlet(sys.stderr, _lost))
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, _chosen[0].upper())),
            logger_factory=structlog.WriteLoggerFactory(_outlet[-1]),  # type: ignore[arg-type]
            cache_logger_on_first_use=False,
        )
    return structlog.get_logger()
