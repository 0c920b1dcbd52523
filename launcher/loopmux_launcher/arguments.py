"""The shape of the launcher's command line; what the commands do is in ``commands``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loopmux

Command = Callable[[argparse.Namespace], int]


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser; ``run`` of its result is the command, looked up by its words (``env build``)."""
    top = argparse.ArgumentParser(
        prog="loopmux-launcher", description="Builds model environments and keeps the workers of this host alive."
    )
    top.add_argument("--version", action="version", version=f"loopmux-launcher {loopmux.__version__}")
    file = _option(
        "--config", type=Path, metavar="FILE", help="default: $LOOPMUX_CONFIG, ./configs/, the user's folder"
    )
    broker = _option(
        "--broker-config", type=Path, metavar="FILE", help="the broker's settings, see configs/broker.yaml"
    )
    endpoint = _option("--endpoint", metavar="E", help="default: $LOOPMUX_ENDPOINT, else the user's ipc socket")
    parent = _option("--parent-pid", type=int, metavar="PID", help="stop when this process ends")
    form = _option("--log-format", choices=("plain", "json", "live"), help="default: live on a terminal, else plain")
    debug = _option("--debug", action="store_true", help="show tracebacks")
    groups = {"": top.add_subparsers(metavar="COMMAND", required=True)}
    for name, text in (
        ("config", "check a configuration"),
        ("env", "build and find model environments"),
        ("systemd", "have this user's systemd run broker and launcher"),
    ):
        group = groups[""].add_parser(name, help=text, description=text)
        groups[name] = group.add_subparsers(metavar="ACTION", required=True)

    def add(words: str, text: str, *options: argparse.ArgumentParser) -> argparse.ArgumentParser:
        group, _, name = words.rpartition(" ")
        command = groups[group].add_parser(name, parents=[debug, *options], help=text, description=text)
        command.set_defaults(run=commands[words])
        return command

    add("up", "broker, environments and workers, in the foreground", file, broker, endpoint, parent, form)
    run = add("run", "environments and workers for a broker that runs already", file, endpoint, parent, form)
    run.add_argument(
        "--worker-endpoint",
        metavar="W",
        help="where the broker takes workers and launchers (default: beside --endpoint)",
    )
    add("down", "stop what `up` started", endpoint)
    add("config check", "say what is wrong with a file", file).add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="the same as --config FILE"
    )
    add("config schema", "print the JSON schema of the file, for editors")
    _add_env(add, file, parent, form)
    _add_systemd(add, broker)
    logs = add("logs", "show the end of a log", endpoint)
    logs.add_argument(
        "name", nargs="?", metavar="NAME", help="a worker, broker, or what else the list has; default: list them all"
    )
    logs.add_argument("-n", "--lines", type=int, default=50, help="how many (%(default)s)")
    logs.add_argument("-f", "--follow", action="store_true", help="print what is added, until Ctrl-C")
    return top


def _add_env(
    add: Callable[..., argparse.ArgumentParser],
    file: argparse.ArgumentParser,
    parent: argparse.ArgumentParser,
    form: argparse.ArgumentParser,
) -> None:
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("name", metavar="NAME", help="of an environment that the configuration declares")
    some = argparse.ArgumentParser(add_help=False)
    some.add_argument("name", nargs="?", metavar="NAME", help="default: all that the configuration declares")
    build = add("env build", "build one environment, or all; undoes a rollback", file, parent, form, some)
    build.add_argument("--anew", action="store_true", help="build again beside one that is damaged")
    add("env lock", "write exact versions and hashes next to the configuration", file, form, some)
    add("env verify", "look at every file of an environment and probe it", file, form, some)
    listing = add("env list", "what is built: size, state, who uses it", file)
    listing.add_argument("--json", action="store_true", help="one JSON document")
    add("env path", "print an environment's interpreter", file, one)
    add("env rollback", "go back to the build that was in use before", file, form, one)
    prune = add("env prune", "remove what no configuration and no process uses", file)
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _add_systemd(add: Callable[..., argparse.ArgumentParser], broker: argparse.ArgumentParser) -> None:
    file = _option(
        "--config",
        type=Path,
        metavar="FILE",
        help="the launcher's; default: $LOOPMUX_CONFIG, else ~/.config/loopmux/llm_backends.yaml",
    )
    folder = _option("--folder", type=Path, metavar="DIR", help="default: where this user's systemd looks for units")
    force = _option("--force", action="store_true", help="also units that somebody has edited or put there")
    add("systemd print", "show the units that `install` writes", file, broker, folder)
    install = add("systemd install", "write units for this installation", file, broker, folder, force)
    install.add_argument("--now", action="store_true", help="enable and start them, too")
    add("systemd uninstall", "stop, disable and remove what `install` wrote", folder, force)


def _option(name: str, **settings: Any) -> argparse.ArgumentParser:
    """One option, to be shared by several commands."""
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument(name, **settings)
    return one
