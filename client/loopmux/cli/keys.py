"""``loopmux keys new`` and ``show``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from loopmux import keys


def add_commands(commands: Any) -> None:
    """Add ``keys`` to the parser's subcommands."""
    text = "keys for tcp beyond this host: who may connect to a broker, and to which one"
    actions = commands.add_parser("keys", help=text, description=text).add_subparsers(metavar="ACTION", required=True)
    new = _action(actions, "new", "make a key, and print its public part as the broker's settings take it")
    new.add_argument("name", metavar="NAME", help="who will have it")
    folder = keys.default_folder()
    new.add_argument("--folder", type=Path, default=folder, metavar="D", help="where NAME.key is put (%(default)s)")
    new.set_defaults(run=_new)
    show = _action(actions, "show", "print the public part of a key, which everybody may know")
    show.add_argument("file", type=Path, metavar="FILE", help="the key's file, as `keys new` wrote it")
    show.set_defaults(run=_show)


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    action: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    action.add_argument("--debug", action="store_true", help="show tracebacks")
    return action


def _new(options: argparse.Namespace) -> int:
    path, key = keys.new(options.name, options.folder)
    print(f"wrote {path}: whoever can read it is {key.name}", file=sys.stderr)
    print(f"{key.name}: '{key.public}'")  # quoted for YAML: Z85 has signs that mean something there
    return 0


def _show(options: argparse.Namespace) -> int:
    print(keys.read(options.file).public)
    return 0
