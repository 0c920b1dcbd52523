"""``logs``: what is there, the end of one of them, and what is added to it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from loopmux.errors import LoopmuxError
from loopmux.nearest import did_you_mean
from loopmux_launcher import places

_LOOK = 0.2
"""Seconds between two looks at a followed file."""
_TAIL = 256 * 1024
"""Bytes read from the end of a file in search of its last lines."""


def show(endpoint: str, name: str | None, lines: int, follow: bool) -> int:
    """Print the end of a log, or the names of all.

    Raises:
        LoopmuxError: there is no such log.
    """
    files = {path.stem: path for folder in (places.logs(), places.logs(endpoint)) for path in folder.glob("*.log")}
    if name is None:
        for stem, path in sorted(files.items()):
            print(f"{stem:24} {path}")
        return 0
    if name not in files:
        hint = did_you_mean(name, files) or f"there are: {', '.join(sorted(files)) or 'none'}"
        raise LoopmuxError(f"found no log of {name!r} for {endpoint}; {hint}")
    path = files[name]
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL))
        for line in stream.read().splitlines()[-lines:]:
            print(line.decode(errors="replace"))
        position = stream.tell()
    if follow:
        try:
            for text in _added(path, position):
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # how following ends
    return 0


def _added(path: Path, position: int) -> Iterator[str]:
    """What is written to a file from a position on, also after it was rotated."""
    stream = path.open("rb")
    stream.seek(position)
    try:
        while True:
            data = stream.read()
            if data:
                yield data.decode(errors="replace")
            elif path.exists() and not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                stream.close()
                stream = path.open("rb")
            else:
                time.sleep(_LOOK)
    finally:
        stream.close()
