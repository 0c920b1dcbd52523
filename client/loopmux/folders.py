"""Folders that programs of ours write to: made, and seen to be usable before anything relies on them."""

from __future__ import annotations

from pathlib import Path

from loopmux.errors import ConfigError

_SOME_BYTES = bytes(4096)
"""A block: on a full disk an empty file can still be made, and the first block of it not be written."""


def usable(folder: Path, purpose: str, remedy: str) -> Path:
    """Make a folder if need be, and see that files can be written in it; nothing is left of the trial.

    Args:
        purpose: what it is for, in plural ("log files").
        remedy: what to do where it cannot be mended.

    Raises:
        ConfigError: it cannot be made or written to; it says why.
    """
    import tempfile  # it brings a dozen modules along

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(_SOME_BYTES)
    except OSError as error:
        raise unusable(folder, purpose, remedy, error) from error
    return folder


def unusable(folder: Path, purpose: str, remedy: str, error: OSError) -> ConfigError:
    """The error for a folder that cannot be used, in words that name what is in the way."""
    file = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)
    found = f"the file {file} in its place" if file else f"{error.strerror or error}"
    return ConfigError(
        f"the folder for {purpose}, {folder}, cannot be used: found {found}, expected a folder that this user can "
        f"write to: mend it, or {remedy}"
    )
