"""Where a worker keeps what it can make again. Some of it is code, so nobody else may put anything there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/loopmux/NAME``, made if need be, which nobody but this user can write to.

    Raises:
        OSError: it cannot be made, or is another user's.
        RuntimeError: the user has no home.
    """
    found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopmux" / name
    for each in (found.parent, found):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not trusted(each):
            raise PermissionError(
                f"{each} belongs to user {each.stat().st_uid}, expected {os.getuid()}: "
                "set $XDG_CACHE_HOME to a folder of yours"
            )
        mode = stat.S_IMODE(each.stat().st_mode)
        if mode & _OF_OTHERS:  # made under another umask
            each.chmod(mode & ~_OF_OTHERS)
    return found


def trusted(path: Path) -> bool:
    """Whether what a path leads to belongs to this user, or to root."""
    return path.stat().st_uid in (0, os.getuid())
