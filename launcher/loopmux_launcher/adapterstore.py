"""The file that remembers adapters loaded at run time, over the ends of workers, launcher and broker."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from loopmux.codec import FieldError, build
from loopmux.errors import ConfigError
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
    """Remember these and no others; whatever happens on the way, the file is the former one or this one.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.new")
    try:
        with fresh.open("w") as stream:
            json.dump([asdict(one) for one in added], stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
