"""The file with the broker's settings, ``configs/broker.yaml``: checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from loopmux import keys
from loopmux.codec import FieldError, build, show
from loopmux.errors import ConfigError
from loopmux.nearest import did_you_mean
from loopmux_broker.config import BrokerConfig


def load(path: Path) -> BrokerConfig:
    """Read a configuration file; that of the key is relative to it, and looked at too.

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
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # the 45th of a month, `!!bool maybe`, thousands of lists in each other: yaml lets that pass
        raise ConfigError(f"{path}: {error}, expected values that can be") from error
    try:
        config = build(BrokerConfig, values, strict=True)
        _check_numbers(config, "")
        config = _with_key(config, path.parent)
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


def _with_key(config: BrokerConfig, folder: Path) -> BrokerConfig:
    """The settings with the whole path of the broker's key, and all keys checked."""
    for side, named in (("client_keys", config.listed_clients), ("worker_keys", config.worker_keys)):
        if named and not config.key:
            raise FieldError(side, f"{len(named)} keys", "none without a `key` of the broker (`loopmux keys new NAME`)")
        _check_keys(side, named)
    for name, weight in config.weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise FieldError(f"client_keys.{name}.weight", show(weight), "a number above 0")
    if not config.key:
        return config
    try:
        file = folder.absolute() / keys.file_named(config.key)
        keys.read(file)
    except ValueError as error:
        raise _wrong("key", error) from error
    except ConfigError as error:
        raise FieldError("key", f"{config.key!r} ({error.message})", "the broker's key file") from error
    return replace(config, key=str(file))


def _check_keys(side: str, named: Mapping[str, str]) -> None:
    """Refuse what is no name, no key, or the key of two names."""
    owners: dict[str, str] = {}
    for name, public in named.items():
        try:
            keys.check_name(name)
            keys.to_bytes(public)
        except ValueError as error:
            raise _wrong(f"{side}.{name}", error) from error
        if (other := owners.setdefault(public, name)) != name:
            raise FieldError(f"{side}.{name}", f"the key of {other}", "one of its own")


def _wrong(path: str, error: ValueError) -> FieldError:
    """A field that is wrong by the word of ``keys``, which says what was found and what was expected."""
    return FieldError(path, *str(error).removeprefix("found ").split(", expected ", 1))


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
