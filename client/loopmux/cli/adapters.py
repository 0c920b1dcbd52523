"""``loopmux adapter load``, ``unload`` and ``list``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import loopmux
from loopmux.cli.printing import as_json
from loopmux.cli.show import table
from loopmux.messages import AdapterStatus, Done


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``adapter`` to the parser's subcommands."""
    text = "load and unload adapters while everything runs"
    actions = commands.add_parser("adapter", help=text, description=text).add_subparsers(
        metavar="ACTION", required=True
    )
    load = _action(actions, "load", "load an adapter into all workers of a model, until it is unloaded", common)
    load.add_argument("model", metavar="MODEL", help="the model whose workers load it")
    load.add_argument("name", metavar="NAME", help="the model id that it gets")
    load.add_argument("folder", metavar="DIR", help="where its files lie, on the workers' hosts")
    load.set_defaults(run=_load)
    unload = _action(actions, "unload", "unload what `load` brought", common)
    unload.add_argument("model", metavar="MODEL", help="the model that it was loaded for")
    unload.add_argument("name", metavar="NAME", help="the model id that it got")
    unload.set_defaults(run=_unload)
    listing = _action(actions, "list", "list the adapters that a request may name", common)
    listing.add_argument("--json", action="store_true", help="as a JSON list")
    listing.set_defaults(run=_list)


def _action(actions: Any, name: str, text: str, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    action: argparse.ArgumentParser = actions.add_parser(name, parents=[common], help=text, description=text)
    return action


def _load(options: argparse.Namespace) -> int:
    with loopmux.Client(options.endpoint) as client:
        done = client.load_adapter(options.model, options.name, options.folder)
    if done.workers:
        print(f"{options.name}: loaded, content {done.content}, in {', '.join(done.workers)}")
    else:
        print(f"{options.name}: remembered; {options.model} has no worker now, the next one loads it")
    if not done.remembered:
        print("no launcher answers for these workers: it is gone when they end")
    return 0


def _unload(options: argparse.Namespace) -> int:
    with loopmux.Client(options.endpoint) as client:
        done = client.unload_adapter(options.model, options.name)
    print(f"{options.name}: unloaded{_from(done)}; what runs with it ends by itself")
    return 0


def _from(done: Done) -> str:
    return f" from {', '.join(done.workers)}" if done.workers else ""


def _list(options: argparse.Namespace) -> int:
    with loopmux.Client(options.endpoint) as client:
        adapters = client.adapters()
    print(as_json(adapters) if options.json else _render(adapters))
    return 0


def _render(adapters: Sequence[AdapterStatus]) -> str:
    rows = [(one.name, str(one.workers), " ".join(one.contents), one.onto or "-", one.folder) for one in adapters]
    return table(("ADAPTER", "WORKERS", "CONTENT", "LOADED FOR", "FOLDER"), rows) if rows else "no adapters"
