"""Whether the files of an environment are those that were installed, by what each package recorded of its own."""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path


def damage(target: Path) -> list[str]:
    """What is missing or changed in a virtual environment, one sentence for each file."""
    return [
        text for record in sorted(target.glob("lib/python*/site-packages/*.dist-info")) for text in _look_at(record)
    ]


def _look_at(info: Path) -> Iterator[str]:
    package = info.name.removesuffix(".dist-info")
    try:
        with (info / "RECORD").open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error):
        yield f"{package}: its list of files (RECORD) is missing or cannot be read"
        return
    for name, digest, _ in ((*row, "", "")[:3] for row in rows):
        path = info.parent / name
        if name.endswith(".pyc"):
            continue  # Python makes it anew
        try:
            content = path.read_bytes() if digest else b""
            if not digest:
                path.stat()
        except OSError as error:
            yield f"{package}: {name}: {error.strerror}"
            continue
        if digest and digest != _digest(digest.partition("=")[0], content):
            yield f"{package}: {name} was changed"


def _digest(algorithm: str, content: bytes) -> str:
    value = base64.urlsafe_b64encode(hashlib.new(algorithm, content).digest()).rstrip(b"=")
    return f"{algorithm}={value.decode()}"
