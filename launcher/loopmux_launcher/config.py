"""The configuration as the launcher uses it, and where its file is found. ``reader`` reads and checks it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loopmux import folders
from loopmux.errors import ConfigError
from loopmux_launcher.schema import ModelEntry

Installer = Literal["auto", "uv", "pip"]
CONFIG_VARIABLE = "LOOPMUX_CONFIG"
DEFAULT = "default"
"""The environment of models that name none."""
DEFAULT_REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "llguidance==1.9.1")
"""What the ``default`` environment holds when the file does not say; one set that was tried together."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A checked environment. Either ``path`` is set (use as it is) or the rest says how to build it.

    Attributes:
        python: version or absolute path of the interpreter to build with.
        requirements: lines of a requirements file; ``requirements_file`` stands for them if set.
        root: folder that relative requirements are relative to.
        index_options: lines of a requirements file that say where packages come from.
        file: the configuration that declares it; a lock file stands beside it.
    """

    name: str
    root: Path
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    requirements: tuple[str, ...] = ()
    requirements_file: Path | None = None
    path: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    index_options: tuple[str, ...] = ()
    installer: Installer = "auto"
    file: Path | None = None

    @property
    def lock_file(self) -> Path | None:
        """Where ``env lock`` writes what it resolved, and ``env build`` looks for it."""
        return self.file and self.file.with_name(f"{self.file.stem}.{self.name}.lock")


@dataclass(frozen=True, slots=True)
class Model:
    """A checked model: folders absolute, defaults filled in.

    Attributes:
        environment: None runs in the launcher's own Python, which is enough for the echo engine.
        fewest: processes that always run; None where the file does not say, and others of its group decide.
        most: processes that may run.
    """

    id: str
    entry: ModelEntry
    environment: str | None
    base_model: str | None = None
    adapter_dir: str | None = None
    fewest: int | None = None
    most: int = 0


@dataclass(frozen=True, slots=True)
class Configuration:
    """A file that was found good.

    Attributes:
        notes: what its author may want to know: accepted, but without effect.
        memory_gib: what all worker processes may take together; None is no limit.
    """

    file: Path
    environments: Mapping[str, Environment]
    models: Mapping[str, Model]
    notes: tuple[str, ...] = ()
    memory_gib: float | None = None


def named(explicit: Path | None) -> Path | None:
    """The configuration file that is named: the given one, or ``$LOOPMUX_CONFIG``; None where none is.

    Raises:
        ConfigError: it does not exist.
    """
    file = explicit or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if file and not file.is_file():
        origin = "--config" if explicit else f"${CONFIG_VARIABLE}"
        raise ConfigError(f"{origin}: found no file {file}, expected a configuration file")
    return file


def user_file() -> Path:
    """The configuration file in the user's folder of settings, there or not."""
    return folders.settings() / "loopmux" / "llm_backends.yaml"


def find(explicit: Path | None = None) -> Path:
    """The configuration file: the given one, ``$LOOPMUX_CONFIG``, the working folder's, the user's.

    Raises:
        ConfigError: none of them exists.
    """
    if file := named(explicit):
        return file
    places = (Path("configs/llm_backends.yaml"), user_file())
    for place in places:
        if place.is_file():
            return place
    looked = " nor ".join(map(str, places))
    raise ConfigError(f"found no configuration: neither {looked} exists; name one with --config FILE")
