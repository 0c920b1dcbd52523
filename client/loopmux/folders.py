"""Folders: where a user keeps settings, and those that programs of ours write to, seen to be usable beforehand."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from loopmux.errors import ConfigError, LoopmuxError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when there is no room."""
_PASSING = (*FULL, errno.EMFILE, errno.ENFILE)
"""The same, or no descriptor: nothing is wrong with the folder, and another try may succeed."""


def of_user(variable: str, below_home: str) -> Path:
    """The folder that ``variable`` names, else the one at this place below the user's home.

    Raises:
        ConfigError: it is not set, and there is no home either, as of a container's user without a name.
    """
    try:
        return Path(os.environ.get(variable) or Path.home() / below_home).absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"${variable}: found neither this nor $HOME, and no user {os.getuid()} who has a home; expected a folder: "
            f"set ${variable}, or $HOME"
        ) from error


def settings() -> Path:
    """``$XDG_CONFIG_HOME``, else ``~/.config``: every program has a folder there."""
    return of_user("XDG_CONFIG_HOME", ".config")


def usable(folder: Path, purpose: str, remedy: str) -> Path:
    """Make a folder if need be, and see that files can be made in it; nothing is left of the trial.

    A full disk is no reason to do without what lies there: who needs room says so.

    Args:
        purpose: what it is for, in plural ("log files").
        remedy: what to do where it cannot be mended.

    Raises:
        ConfigError: it cannot be made or written to; it says why.
    """
    import tempfile  # it brings a dozen modules along

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in FULL and folder.is_dir():
            return folder
        raise unusable(folder, purpose, remedy, error) from error
    return folder


def unusable(folder: Path, purpose: str, remedy: str, error: OSError) -> LoopmuxError:
    """The error for a folder that cannot be used, in words that name what is in the way.

    A ConfigError, of which service managers do not try again, unless it may pass.
    """
    file = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)
    found = f"the file {file} in its place" if file else f"{error.strerror or error}"
    kind = LoopmuxError if error.errno in _PASSING else ConfigError
    return kind(
        f"the folder for {purpose}, {folder}, cannot be used: found {found}, expected a folder that this user can "
        f"write to: mend it, or {remedy}"
    )
