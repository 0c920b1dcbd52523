"""What people read: plain lines, JSON lines, or lines with a live view below them on a terminal."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from loopmux.outlet import Outlet
from loopmux_launcher.events import Announce

Format = Literal["plain", "json", "live"]


_PACE = 2.0
"""Seconds between two plain progress lines of the same kind and subject."""
_FAREWELL = 2.0
"""Seconds for which the end of a program that serves others waits for a reader that is slow."""


class Console:
    """Prints announcements with the seconds since the start. Warnings and errors go to standard error.

    On a terminal, what is under way stands below all lines, one for each subject, and below that what ``show`` was
    given last; it is written over. Elsewhere progress is one line when something else begins (its first word changes)
    and now and then in between.

    A reader that goes away (a closed pipe), or does not read, neither ends nor stops the launcher: its workers serve
    others.
    """

    def __init__(self, form: Format | None = None, *, farewell: float = _FAREWELL) -> None:
        """``farewell``: seconds for which its end waits for a reader that is slow; a command may take all the time."""
        self._farewell = farewell
        self.form: Format = form or ("live" if sys.stdout and sys.stdout.isatty() else "plain")
        self._out, self._err = (Outlet(stream, self._lost) for stream in (sys.stdout, sys.stderr))
        self._began = time.monotonic()
        self._doing: dict[str, str] = {}
        self._picture: Sequence[str] = ()
        self._drawn = 0
        """Lines of the live view that are on the screen, the cursor below them."""
        self._stale = False  # the live view is another one by now
        self._told: dict[str, tuple[str, float]] = {}

    def announce(self, news: Announce) -> None:
        """Print one piece of news."""
        outlet = self._err if news.level in ("warning", "error") else self._out
        elapsed = time.monotonic() - self._began
        if self.form == "json":
            outlet.write(_json(elapsed, news) + "\n")
        elif news.level == "progress":
            self._progress(news, elapsed)
        else:
            self._doing.pop(news.subject, None)
            self._told.pop(news.subject, None)
            self._line(outlet, news.text if news.level == "ready" else _plain(elapsed, news))

    def pass_on(self) -> None:
        """Print what its reader had no room for before."""
        self._out.flush()
        self._err.flush()
        if self._stale:
            self._redraw()

    def show(self, picture: Sequence[str]) -> None:
        """What stands below everything in the live view."""
        if self.form == "live" and picture != self._picture:
            self._picture = picture
            self._redraw()

    def _progress(self, news: Announce, elapsed: float) -> None:
        line = _plain(elapsed, news)
        if self.form == "live":
            self._doing[news.subject] = line
            self._redraw()
            return
        verb = news.text.split(maxsplit=1)[0]
        before, when = self._told.get(news.subject, ("", 0.0))
        if verb != before or elapsed - when >= _PACE:
            self._told[news.subject] = (verb, elapsed)
            self._line(self._out, line)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *failure: object) -> None:
        """Leave the terminal without a live view."""
        self._doing, self._picture = {}, ()
        self._out.write(self._erase())
        self._out.drain(self._farewell)
        self._err.drain(self._farewell)

    def _line(self, outlet: Outlet, text: str) -> None:
        self._out.write(self._erase())
        outlet.write(text + "\n")
        self._redraw()

    def _redraw(self) -> None:
        """The live view anew, as much of its end as the terminal has room for: a view that scrolls stays for good.

        For a reader who is behind it waits: all the views meanwhile would take the room of lines.
        """
        self._stale = self._out.behind
        if self._stale:
            return
        columns, rows = shutil.get_terminal_size()
        lines = [*self._doing.values(), *self._picture] if self.form == "live" else []
        shown = [line[: columns - 1] for line in lines[-max(1, rows - 1) :]]
        erase, self._drawn = self._erase(), len(shown)
        self._out.write(erase + "".join(f"{line}\n" for line in shown))

    def _erase(self) -> str:
        """Back to where the live view begins, and nothing below."""
        drawn, self._drawn = self._drawn, 0
        return f"\x1b[{drawn}A\r\x1b[J" if drawn else ""

    def _lost(self, count: int) -> str:
        elapsed, news = time.monotonic() - self._began, Announce("launcher", f"{count} lines were lost here", "warning")
        return (_json if self.form == "json" else _plain)(elapsed, news) + "\n"


def _plain(elapsed: float, news: Announce) -> str:
    return f"{elapsed:7.1f} s  {news.subject}: {news.text}"


def _json(elapsed: float, news: Announce) -> str:
    told = {"elapsed": round(elapsed, 3), "level": news.level, "subject": news.subject, "text": news.text}
    return json.dumps(told | {"timestamp": datetime.now(UTC).isoformat(timespec="milliseconds")})
