"""Whether the configuration file was changed, seen by looking at it now and then."""

from __future__ import annotations

from pathlib import Path

from loopmux_launcher.config import Environment

_INTERVAL = 1.0
"""Seconds between two looks."""


class FileWatch:
    """Looks at a file's status, and says once for each change that it is there.

    A change counts when two looks in a row see the same: an editor may write a file in several steps.
    """

    def __init__(self, file: Path, now: float) -> None:
        self._file = file
        self._known = self._seen = _status(file)
        self._next = now + _INTERVAL

    def changed(self, now: float) -> bool:
        """Whether the file is another than when this was last true."""
        if now < self._next:
            return False
        self._next = now + _INTERVAL
        before, self._seen = self._seen, _status(self._file)
        if self._seen == self._known or self._seen != before:
            return False
        self._known = self._seen
        return True

    def noted(self) -> None:
        """The file is being read now, for whatever reason."""
        self._known = self._seen = _status(self._file)


def _status(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None  # being replaced, or gone, which reading it will tell
    return status.st_ino, status.st_size, status.st_mtime_ns


def declared(environment: Environment) -> tuple[object, ...]:
    """What an environment is made of: its declaration, and what stands in the files that it names."""
    named = (environment.requirements_file, environment.lock_file)
    return (environment, *(file.read_bytes() if file and file.is_file() else b"" for file in named))
