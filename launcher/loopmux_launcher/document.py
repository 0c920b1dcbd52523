"""A YAML file whose every value knows its line, and the problems found in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loopmux.errors import ConfigError

Where = tuple[str | int, ...]
"""A place in the file: keys and list indices from the top."""
_LARGEST = 4 * 1024 * 1024
"""Bytes; a thousand models take less than one MiB, and what is longer (weights, a device) is no configuration."""
_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in the words of an error message. ``line`` counts from 1; 0 is the file as a whole."""

    file: Path
    line: int
    where: str
    found: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else f"{self.file}"
        key = f" {self.where}:" if self.where else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{place}:{key} found {self.found}, expected {self.expected}{hint}"


class InvalidConfiguration(ConfigError):
    """The file cannot be used. ``problems`` holds everything that is wrong with it, in the file's order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: p.line))
        lines = "\n".join(map(str, self.problems))
        super().__init__(lines if len(self.problems) == 1 else f"{len(self.problems)} problems\n{lines}")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: plain values, and the nodes they came from."""

    file: Path
    value: Any
    root: yaml.Node | None
    key_problems: tuple[Problem, ...] = ()

    def line(self, where: Where) -> int:
        """The line of a key (or list entry); of the nearest enclosing one if it is not written in the file."""
        node, line = self.root, 1
        for step in where:
            below = _step(node, step)
            if below is None:
                break
            line, node = below
        return line

    def problem(self, where: Where, found: str, expected: str, hint: str = "") -> Problem:
        """A problem at a place in this file."""
        return Problem(self.file, self.line(where), spell(where), found, expected, hint)


class _Loader(yaml.SafeLoader):
    """YAML's own, whose errors about values have a line, too."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # the 45th of a month, a number of 5 000 digits, `!!bool maybe`: yaml lets that pass
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
        except (LookupError, AttributeError) as error:
            kind = node.tag.rsplit(":", 1)[-1]
            raise yaml.constructor.ConstructorError(None, None, f"what is no {kind}", node.start_mark) from error


def read(file: Path) -> Document:
    """Read and parse a file.

    Raises:
        InvalidConfiguration: unreadable, or not YAML.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(_LARGEST + 1)
    except OSError as error:
        raise InvalidConfiguration([Problem(file, 0, "", str(error.strerror), "a readable YAML file")]) from error
    if len(data) > _LARGEST:
        raise InvalidConfiguration([Problem(file, 0, "", "more than 4 MiB", "a configuration file")])
    loader: yaml.SafeLoader | None = None
    try:
        loader = _Loader(data)
        root = loader.get_single_node()
        value = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        raise InvalidConfiguration([_syntax_problem(file, data, error)]) from error
    except RecursionError as error:
        deep = Problem(file, 0, "", "lists or mappings in too many others", "a configuration file")
        raise InvalidConfiguration([deep]) from error
    finally:
        if loader is not None:
            loader.dispose()
    return Document(file, value, root, tuple(_key_problems(file, root)))


def spell(where: Where) -> str:
    """A place as people write it: ``models.default.requirements[1]``."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _step(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step].start_mark.line + 1, node.value[step]
    if isinstance(node, yaml.MappingNode):
        for name, below in reversed(node.value):  # of a repeated key the last one is in force
            if isinstance(name, yaml.ScalarNode) and name.value == step:
                return name.start_mark.line + 1, below
    return None


def _syntax_problem(file: Path, data: bytes, error: yaml.YAMLError) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        found = ", ".join(part for part in (error.context, error.problem) if part)
        return Problem(file, mark.line + 1 if mark else 0, "", found, "valid YAML")
    position = getattr(error, "position", 0)
    reason = getattr(error, "reason", str(error))
    return Problem(file, data[:position].count(b"\n") + 1, "", str(reason), "YAML text in UTF-8")


def _key_problems(file: Path, root: yaml.Node | None) -> Iterator[Problem]:
    """What YAML lets pass in silence: keys written twice (the first is lost) and words it reads as no text (``no``)."""
    seen: set[int] = set()
    todo: list[tuple[Where, yaml.Node]] = [((), root)] if root else []
    while todo:
        where, node = todo.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += [((*where, i), entry) for i, entry in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            yield from _keys(file, where, node.value)
            todo += [((*where, str(name.value)), below) for name, below in node.value]


def _keys(file: Path, where: Where, pairs: Sequence[tuple[yaml.Node, yaml.Node]]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for name, _ in pairs:
        if not isinstance(name, yaml.ScalarNode):
            continue
        line, place = name.start_mark.line + 1, spell((*where, name.value))
        if name.value in first:
            yield Problem(
                file, line, place, f"the key a second time (first on line {first[name.value]})", "each key once"
            )
        first.setdefault(name.value, line)
        if name.tag not in _TEXT_TAGS:
            kind = name.tag.rsplit(":", 1)[-1]
            yield Problem(file, line, place, f"{name.value}, which YAML reads as {kind}", "a text", "put it in quotes")
