"""The broker's log: one line per event on standard error. Never a prompt, never an output.

Nobody who reads it is waited for: everybody else would have to, too.

Without a library for it: while a broker that was killed is started again everybody waits, and one took as long to
import as the broker itself.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Literal

from loopmux.outlet import Outlet
from loopmux_broker.events import Level

_FAREWELL = 1.0
"""Seconds."""
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")


class Logger:
    """Writes lines of a form, those of a level and above."""

    def __init__(self, form: Literal["json", "console"], level: Level) -> None:
        self._form, self._levels = form, LEVELS[LEVELS.index(level) :]
        self._outlet = Outlet(sys.stderr, lambda count: self._line("warning", "log lines lost", {"count": count}))

    def says(self, level: Level) -> bool:
        """Whether lines of a level are written."""
        return level in self._levels

    def say(self, level: Level, event: str, **fields: object) -> None:
        """Write one line."""
        if self.says(level):
            self._outlet.write(self._line(level, event, fields))

    def pass_on(self) -> None:
        """Write what its reader had no room for before."""
        self._outlet.flush()

    def end(self) -> None:
        """The last line was said: give whoever reads them a moment to take them."""
        self._outlet.drain(_FAREWELL)

    def begin_anew(self) -> None:
        """This process was forked, and what its parent has not passed on yet is still its parent's to."""
        self._outlet.forget()

    def _line(self, level: Level, event: str, fields: dict[str, object]) -> str:
        return (self._json if self._form == "json" else self._console)(level, event, fields) + "\n"

    def _json(self, level: Level, event: str, fields: dict[str, object]) -> str:
        about = {"program": "broker", "event": event, "level": level, "timestamp": _timestamp()}
        return json.dumps(fields | about, default=repr)

    def _console(self, level: Level, event: str, fields: dict[str, object]) -> str:
        return "  ".join([f"{_timestamp()} {level:7} {event}", *(f"{name}={value}" for name, value in fields.items())])


def _timestamp() -> str:
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
