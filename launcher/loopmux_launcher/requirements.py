"""What an environment's declaration asks for, line by line: for its hash, and to compare it with a lock file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from loopmux_launcher import workercode
from loopmux_launcher.config import Environment
from loopmux_launcher.interpreters import EnvironmentUnusable

_NESTED = re.compile(r"(?:-r|--requirement|-c|--constraint)[ =]?\s*(\S+)")
_PATH_OPTION = re.compile(r"(-f|--find-links|-e|--editable|-r|--requirement|-c|--constraint)[ =]\s*(\S+)")


def declared(environment: Environment) -> tuple[str, ...]:
    """The requirements, files that they name read in place, and behind them what the workers need.

    Raises:
        EnvironmentUnusable: a file cannot be read.
    """
    top = environment.requirements_file or environment.root / "-"
    lines: Iterator[str] = iter(environment.requirements)
    if environment.requirements_file is not None:
        lines = _lines(environment.requirements_file)
    return (*_expanded(lines, top, (top,)), *workercode.REQUIREMENTS)


def packages(environment: Environment) -> tuple[str, ...]:
    """The same without options: they may hold passwords, and this goes into a lock file.

    Raises:
        EnvironmentUnusable: a file cannot be read.
    """
    return tuple(line for line in declared(environment) if not line.startswith("-"))


def generated(environment: Environment) -> str:
    """A requirements file for the installer."""
    file = environment.requirements_file
    own = environment.requirements if file is None else (f"-r {file}",)
    return index(environment) + "".join(
        f"{_absolute(line, environment.root)}\n" for line in own + workercode.REQUIREMENTS
    )


def index(environment: Environment) -> str:
    """A requirements file that says where packages come from, and nothing else."""
    return "".join(f"{_absolute(line, environment.root)}\n" for line in environment.index_options)


def _absolute(line: str, root: Path) -> str:
    """The line with its path absolute: uv and pip do not agree on what one in a file is relative to."""
    option, path = match.groups() if (match := _PATH_OPTION.fullmatch(line)) else ("", line)
    if "://" in line or not (option or path.startswith(("./", "../"))):
        return line
    return f"{option} {root / path}".strip()


def _expanded(lines: Iterator[str], file: Path, above: tuple[Path, ...]) -> Iterator[str]:
    for line in lines:
        nested = _NESTED.fullmatch(line)
        if nested is None or "://" in line:
            yield line
            continue
        path = file.parent / nested[1]
        if path in above:
            raise EnvironmentUnusable(f"{path} names itself, by way of {file}")
        constraint = line.startswith(("-c", "--constraint"))
        for inner in _expanded(_lines(path), path, (*above, path)):
            yield f"constraint: {inner}" if constraint else inner


def _lines(file: Path) -> Iterator[str]:
    """A file's lines without comments, continued ones joined."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentUnusable(f"{file} cannot be read: {error}") from error
    for line in text.replace("\\\n", " ").splitlines():
        bare = re.sub(r"(^|\s)#.*", "", line).strip()
        if bare:
            yield bare
