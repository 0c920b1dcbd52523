"""The file that remembers adapters loaded at run time, over the ends of workers, launcher and broker."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from loopmux.codec import FieldError, build
from loopmux.errors import ConfigError
from loopmux_launcher import atomic
from loopmux_launcher.adapters import Added


def read(file: Path) -> tuple[Added, ...]:
    """What was remembered; nothing where there is no file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return build(tuple[Added, ...], json.loads(file.read_text()), "adapters", strict=True)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, FieldError) as error:
        raise ConfigError(
            f"{file}: found what is no list of adapters loaded at run time ({error}): mend it, or remove it and load "
            "them again"
        ) from error


def write(file: Path, added: Iterable[Added]) -> None:
    """Remember these and no others.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, json.dumps([asdict(one) for one in added], indent=2))
