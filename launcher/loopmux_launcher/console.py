"""What people read: plain lines, JSON lines, or lines with a live one below them on a terminal."""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Literal, TextIO

from loopmux_launcher.events import Announce

Format = Literal["plain", "json", "live"]


_PACE = 2.0
"""Seconds between two plain progress lines of the same kind and subject."""


class Console:
    """Prints announcements with the seconds since the start. Warnings and errors go to standard error.

    Progress is a line that is written over on a terminal; elsewhere it is one line when something else begins (its
    first word changes) and now and then in between.

    A reader that goes away (a closed pipe) does not end the launcher: its workers serve others.
    """

    def __init__(self, form: Format | None = None) -> None:
        self.form: Format = form or ("live" if sys.stdout.isatty() else "plain")
        self._began = time.monotonic()
        self._live = False
        self._told: dict[str, tuple[str, float]] = {}

    def announce(self, news: Announce) -> None:
        """Print one piece of news."""
        stream = sys.stderr if news.level in ("warning", "error") else sys.stdout
        elapsed = time.monotonic() - self._began
        if self.form == "json":
            self._write(stream, json.dumps({"elapsed": round(elapsed, 3), "level": news.level,
                                            "subject": news.subject, "text": news.text}) + "\n")  # fmt: skip
        elif news.level == "ready":
            self._line(stream, news.text)
        elif news.level == "progress":
            self._progress(news, elapsed)
        else:
            self._line(stream, f"{elapsed:7.1f} s  {news.subject}: {news.text}")

    def _progress(self, news: Announce, elapsed: float) -> None:
        line = f"{elapsed:7.1f} s  {news.subject}: {news.text}"
        if self.form == "live":
            width = shutil.get_terminal_size().columns - 1
            self._write(sys.stdout, f"\r\x1b[K{line[:width]}")
            self._live = True
            return
        verb = news.text.split(maxsplit=1)[0]
        before, when = self._told.get(news.subject, ("", 0.0))
        if verb != before or elapsed - when >= _PACE:
            self._told[news.subject] = (verb, elapsed)
            self._line(sys.stdout, line)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *failure: object) -> None:
        """Leave the terminal without a live line."""
        if self._live:
            self._write(sys.stdout, "\r\x1b[K")
            self._live = False

    def _line(self, stream: TextIO, text: str) -> None:
        if self._live:
            self._write(sys.stdout, "\r\x1b[K")
            self._live = False
        self._write(stream, text + "\n")

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads any more, so there is nobody to tell
