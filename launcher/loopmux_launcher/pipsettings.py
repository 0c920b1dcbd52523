"""pip's settings for uv, which does not read them: the same index is asked, whichever of the two installs."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

_AS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "pre": ("UV_PRERELEASE", " "),
}
"""pip's names, uv's variables, and what stands between several values in those."""
_SAME = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
"""Older names that uv still reads."""


def for_uv(variables: Mapping[str, str]) -> dict[str, str]:
    """uv's variables for pip's settings in these variables and in pip's files, without those that are set already."""
    found: dict[str, str] = {}
    for name, value in settings(variables).items():
        if name not in _AS:
            continue
        variable, between = _AS[name]
        if variable in variables or _SAME.get(variable) in variables:
            continue
        words = value.split()
        if name == "pre":
            words = ["allow"] if _true(value) else []
        elif name == "no-index":
            words = ["true"] if _true(value) else []
        if words:
            found[variable] = between.join(words)
    if "UV_INDEX" in found and "UV_INDEX_STRATEGY" not in variables:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's own way: all indexes are equal
    return found


def settings(variables: Mapping[str, str]) -> dict[str, str]:
    """pip's settings by their long names; variables (``PIP_…``) go over files, later files over earlier ones."""
    found: dict[str, str] = {}
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for file in _files(variables):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except configparser.Error:
            continue  # pip says what is wrong with it, to those who use pip
        for section, values in sections.items():
            if parser.has_section(section):
                values.update(parser.items(section))
    for values in sections.values():
        found |= {name.replace("_", "-"): value for name, value in values.items()}
    own = {name: value for name, value in variables.items() if name.startswith("PIP_") and value}
    return found | {name[4:].lower().replace("_", "-"): value for name, value in own.items()}


def _files(variables: Mapping[str, str]) -> list[Path]:
    """In the order in which pip reads them."""
    named = variables.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    home = Path(variables.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - raises nothing where there is none
    folders = (variables.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    user = Path(variables.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path(folder, "pip", "pip.conf") for folder in reversed(folders) if folder]
    files += [Path("/etc/pip.conf"), home / ".pip" / "pip.conf", user / "pip" / "pip.conf"]
    return [*files, Path(named)] if named else files


def _true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on", "y", "t")
