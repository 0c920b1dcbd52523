"""Files that are written in one step: whoever reads one meanwhile finds what was there before, or all of the new."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a text in UTF-8, in place of what is there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)
