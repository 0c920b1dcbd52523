"""Whether an adapter was made for the base model that it is put on, as far as names can tell."""

from __future__ import annotations

import os
import re
from pathlib import Path


def other_base(named: object, base: str, folder: Path) -> str | None:
    """A note for people if an adapter names another base than the one it is put on; None if it names none or this one.

    The name may be a hub id, a folder of the machine it was trained on, or a path relative to who knows where. So it
    counts as the same base where the last parts of both agree, or both lead to the same folder here.

    Args:
        named: ``base_model_name_or_path`` of its adapter_config.json, whatever stands there.
        base: directory or hub id of the base that it is put on.
        folder: the adapter's own.
    """
    if not isinstance(named, str) or not named:
        return None
    if _last_part(named) in (_last_part(base), _last_part(_real(base))):
        return None
    if _real(base) in (_real(named), _real(folder / named)):
        return None
    return (
        f"{folder / 'adapter_config.json'} names the base {named!r}, and the adapter is put on {base}: if these are "
        "different models its answers are wrong, and base_model should be its own; if not, correct the name there"
    )


def _real(path: str | Path) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # no path at all, such as a text with a NUL
        return str(path)


def _last_part(name: str) -> str:
    """``org/Name``, ``/srv/name/`` and the hub cache's ``models--org--Name/snapshots/1f3a…`` are all ``name``."""
    parts = [part for part in re.split(r"[/\\]", name) if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2].casefold()
    return parts[-1].casefold() if parts else ""
