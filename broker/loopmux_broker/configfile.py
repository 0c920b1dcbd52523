"""The file with the broker's settings, ``configs/broker.yaml``: checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from loopmux.codec import FieldError, build
from loopmux.errors import ConfigError
from loopmux.nearest import did_you_mean
from loopmux_broker.config import BrokerConfig


def load(path: Path) -> BrokerConfig:
    """Read a configuration file.

    Raises:
        ConfigError: with file, line, key, what was found and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        config = build(BrokerConfig, values, strict=True)
        _check_numbers(config, "")
    except FieldError as error:
        line = _line(tree, error.path.split("."))
        raise ConfigError(f"{path}:{line}: {error}{_nearest(error)}") from error
    return config


def _check_numbers(config: Any, path: str) -> None:
    for f in fields(config):
        value, where = getattr(config, f.name), f"{path}{f.name}"
        if is_dataclass(value):
            _check_numbers(value, f"{where}.")
        elif isinstance(value, (int, float)):
            low = 0 if f.name in ("grace", "closed_grace", "priority", "continuing", "tokens", "per_size") else None
            fits = math.isfinite(value) and (value > 0 if low is None else value >= low)
            if not fits:
                expected = "a number above 0" if low is None else "a number of at least 0"
                raise FieldError(where, f"{value} ({type(value).__name__})", expected)


def _nearest(error: FieldError) -> str:
    if not error.unknown:
        return ""
    known = error.expected.removeprefix("one of ").split(", ")
    hint = did_you_mean(error.path.rsplit(".", 1)[-1], known)
    return f" ({hint})" if hint else ""


def _line(node: yaml.Node | None, path: list[str]) -> int:
    """The line of the deepest key of ``path`` that the file has, from 1."""
    line = node.start_mark.line + 1 if node is not None else 1
    for name in path:
        if not isinstance(node, yaml.MappingNode):
            break
        pair = next(((k, v) for k, v in node.value if k.value == name.split("[")[0]), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
