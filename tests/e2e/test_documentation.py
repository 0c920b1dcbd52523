"""The Python examples of README and guides run as they stand, against the demo model."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e import stacks
from loopmux import cli
from loopmux_broker import program as broker
from loopmux_launcher import arguments, commands
from loopmux_loadtest import load
from loopmux_worker import __main__ as worker

ROOT = Path(__file__).resolve().parents[2]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in p.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_examples_run(page: Path, demo_stack: stacks.Stack, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text("\n".join(blocks(page, "python")))
    env = {**os.environ, "LOOPMUX_ENDPOINT": demo_stack.endpoint, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr


MIGRATION = ROOT / "docs" / "migration.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def test_what_is_run_when_one_comes_from_the_replaced_system(demo_stack: stacks.Stack, tmp_path: Path) -> None:
    """The file is good as it stands, and the commands work, in a folder that has what they name."""
    [file] = blocks(MIGRATION, "yaml")
    (tmp_path / "llm_backends.yaml").write_text(file)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [line[2:] for block in blocks(MIGRATION, "console") for line in block.splitlines()]
    assert [command.split()[:2] for command in commands] == [
        ["loopmux", words] for words in ("config", "run-adapter", "generate", "status", "models")
    ]
    said = {}
    for command in commands:
        words = shlex.split(command)
        env = {**os.environ, "LOOPMUX_ENDPOINT": demo_stack.endpoint}
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=100, env=env
        )
        assert done.returncode == 0, (command, done.stderr)
        said[words[1]] = done.stdout
    assert "port" in said["config"]
    assert said["run-adapter"] == said["run-adapter"].upper()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


PROGRAMS = [arguments.parser(commands.COMMANDS), *(program._parser() for program in (cli, broker, load, worker))]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.prog)
def test_every_option_says_what_it_is(program: argparse.ArgumentParser) -> None:
    assert [f"{prog} {name}" for prog, name in unexplained(program)] == []


def unexplained(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Options and arguments of a program and its subcommands whose help says nothing."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from unexplained(command)
        elif not action.help:
            yield parser.prog, action.option_strings[0] if action.option_strings else action.dest
