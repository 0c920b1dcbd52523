"""What a docstring says about a function and its parameters: Google, NumPy and reST styles.

Pure text work, lenient on purpose: what it does not understand stays part of the description.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_GOOGLE_PARAMETERS = {"args", "arguments", "parameters", "params", "attributes", "keyword args", "keyword arguments"}
_GOOGLE_OTHERS = {
    "returns", "return", "yields", "yield", "raises", "example", "examples", "note", "notes", "warning", "warnings",
    "see also", "references", "todo",
}  # fmt: skip
_NUMPY_PARAMETERS = {"parameters", "other parameters", "attributes"}
_REST_PARAMETER = re.compile(r":(?:param|parameter|arg|argument|key|keyword)\s+(?:[^:]*?\s)?\**(\w+)\s*:\s*(.*)")
_REST_FIELD = re.compile(r":\w+(?:\s[^:]*)?:")
_GOOGLE_ENTRY = re.compile(r"\**(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"\**(\w+(?:\s*,\s*\**\w+)*)\s*(?::.*)?$")


@dataclass(frozen=True, slots=True)
class Docstring:
    """A docstring taken apart: the description, and one line of text per documented parameter."""

    description: str = ""
    parameters: dict[str, str] = field(default_factory=dict)


def parse(text: str | None) -> Docstring:
    """Take a docstring apart; None and empty texts give an empty ``Docstring``."""
    lines = inspect.cleandoc(text or "").splitlines()
    description: list[str] = []
    parameters: dict[str, str] = {}
    at = 0
    while at < len(lines):
        if name := _numpy_section(lines, at):
            end = _numpy_end(lines, at + 2)
            if name in _NUMPY_PARAMETERS:
                parameters |= _entries(lines[at + 2 : end], _NUMPY_ENTRY)
        elif name := _google_section(lines, at):
            end = _indented_end(lines, at + 1)
            if name in _GOOGLE_PARAMETERS:
                parameters |= _entries(
                    inspect.cleandoc("\n" + "\n".join(lines[at + 1 : end])).split("\n"), _GOOGLE_ENTRY
                )
        elif _REST_FIELD.match(lines[at]):
            end = _indented_end(lines, at + 1)
            parameters |= _entries(lines[at:end], _REST_PARAMETER)
        else:
            description.append(lines[at])
            end = at + 1
        at = end
    return Docstring("\n".join(description).strip(), parameters)


def _google_section(lines: list[str], at: int) -> str | None:
    """The section that begins on this line: a known word, a colon, and an indented line below."""
    name = lines[at].removesuffix(":").lower()
    known = lines[at].endswith(":") and name in _GOOGLE_PARAMETERS | _GOOGLE_OTHERS
    return name if known and at + 1 < len(lines) and lines[at + 1].startswith((" ", "\t")) else None


def _numpy_section(lines: list[str], at: int) -> str | None:
    """The section that begins on this line: a title underlined with at least three dashes."""
    underlined = at + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[at + 1].strip())
    return lines[at].strip().lower() if underlined else None


def _numpy_end(lines: list[str], at: int) -> int:
    while at < len(lines) and not _numpy_section(lines, at):
        at += 1
    return at


def _indented_end(lines: list[str], at: int) -> int:
    while at < len(lines) and (not lines[at].strip() or lines[at].startswith((" ", "\t"))):
        at += 1
    return at


def _entries(lines: list[str], pattern: re.Pattern[str]) -> dict[str, str]:
    """Parameters and their texts; a line indented deeper continues the entry above it."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines:
        match = None if line.startswith((" ", "\t")) else pattern.match(line.strip())
        if match:
            current = [match[2]] if pattern.groups > 1 and match[2] else []
            found |= dict.fromkeys((name.strip("* ") for name in match[1].split(",")), current)
        elif line.strip():
            current.append(line.strip())
    return {name: " ".join(texts) for name, texts in found.items()}
