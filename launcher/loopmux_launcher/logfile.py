"""One rotating log file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

LIMIT = 8 * 1024 * 1024
"""Bytes of one file; with the older ones kept, a worker's log stays below 32 MiB."""
KEPT = 3


class RotatingLog:
    """Appends bytes to ``path``; when it is full it becomes ``path.1``, which becomes ``path.2`` …

    A log that cannot be written (a full disk, a folder that went away) does not end what it tells about: what cannot be
    written is dropped, and ``trouble`` says why until writing works again.
    """

    def __init__(self, path: Path, *, limit: int = LIMIT, kept: int = KEPT) -> None:
        self.path, self._limit, self._kept = path, limit, kept
        self.trouble = ""
        self._stream: IO[bytes] | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append; a write is never split over two files."""
        try:
            if self._stream is not None and not self._there():
                self.close()
            stream = self._stream or self._open()
            if self._size and self._size + len(data) > self._limit:
                self._rotate()
                stream = self._open()
            stream.write(data)
        except OSError as error:
            self.trouble = error.strerror or str(error)
        else:
            self._size += len(data)
            self.trouble = ""

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("ab", buffering=0)
        self._size = self.path.stat().st_size
        return self._stream

    def _there(self) -> bool:
        """Whether who looks for the log finds what is written: nobody has moved or removed it (another rotation)."""
        assert self._stream is not None
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._stream.fileno()))
        except OSError:
            return False

    def _rotate(self) -> None:
        self.close()
        for n in range(self._kept, 0, -1):
            older = self._numbered(n - 1)
            if older.exists():
                older.replace(self._numbered(n))

    def _numbered(self, n: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{n}") if n else self.path

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> RotatingLog:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
