"""Files that are written in one step: whoever reads one meanwhile finds what was there before, or all of the new."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a text in UTF-8, in place of what is there.

    Raises:
        OSError: it cannot be written; nothing is left of the trial.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.rename(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
