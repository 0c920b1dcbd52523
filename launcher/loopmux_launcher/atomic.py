"""Files that are written in one step: whoever reads one meanwhile finds what was there before, or all of the new."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a text in UTF-8, in place of what is there; it lasts when this returns.

    Raises:
        OSError: it cannot be written. Whatever is raised, Ctrl-C too, nothing is left of the trial.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.rename(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
