"""Where a worker keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/loopmux/NAME``, made if need be.

    Raises:
        OSError: it cannot be made.
        RuntimeError: the user has no home.
    """
    found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopmux" / name
    found.mkdir(parents=True, exist_ok=True)
    return found
