"""The launcher's command line. It ends with ``loopmux.exitcodes``."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from pathlib import Path

from loopmux import endpoints, exitcodes, standard
from loopmux.errors import ConfigError, LoopmuxError
from loopmux_launcher import config, envcommands, jsonschema, showlogs, systemdcommands, tether
from loopmux_launcher.arguments import Command, parser
from loopmux_launcher.config import Configuration
from loopmux_launcher.console import Console
from loopmux_launcher.events import Announce
from loopmux_launcher.holder import Held, Holder, Watch
from loopmux_launcher.processes import remedy
from loopmux_launcher.reader import load
from loopmux_launcher.server import Launcher

_DOWN_LIMIT = 30.0
"""Seconds that `down` waits: workers get 5 s to stop, the broker as many, the rest is for a slow machine."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    standard.complete()
    options = parser(COMMANDS).parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except LoopmuxError as error:
        if options.debug:
            traceback.print_exc()
        print(f"loopmux-launcher: {error}", file=sys.stderr)
        return exitcodes.of(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        if options.debug:
            traceback.print_exc()
        print(f"loopmux-launcher: {error}{remedy(error)}", file=sys.stderr)
        return exitcodes.FAILURE
    except KeyboardInterrupt:
        return exitcodes.INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        print(f"loopmux-launcher: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return exitcodes.FAILURE
    return code


# --- up, run, down ----------------------------------------------------------------------------------------------------


def _up(options: argparse.Namespace) -> int:
    configuration, endpoint = _configuration(options), options.endpoint or endpoints.default_endpoint()
    with Holder(endpoint):
        return _launch(options, configuration, endpoint, with_broker=True, broker_config=options.broker_config)


def _run(options: argparse.Namespace) -> int:
    endpoint = options.endpoint or endpoints.default_endpoint()
    if options.worker_endpoint is None and endpoints.beyond_this_host(endpoint):
        raise ConfigError(
            f"{endpoint}: found a broker that may be on another host and no --worker-endpoint, expected where it takes "
            "workers, too, as in --worker-endpoint tcp://HOST:7751"
        )
    return _launch(options, _configuration(options), endpoint, options.worker_endpoint)


def _launch(
    options: argparse.Namespace,
    configuration: Configuration,
    endpoint: str,
    worker_endpoint: str | None = None,
    *,
    with_broker: bool = False,
    broker_config: Path | None = None,
) -> int:
    with Console(options.log_format) as console:
        console.announce(Announce("launcher", f"{configuration.file} on {endpoint}"))
        for note in configuration.notes:
            console.announce(Announce("launcher", note))
        launcher = Launcher(
            configuration,
            endpoint,
            console,
            with_broker=with_broker,
            broker_config=broker_config,
            worker_endpoint=worker_endpoint,
        )
        return launcher.run(options.parent_pid)


def _down(options: argparse.Namespace) -> int:
    endpoint = options.endpoint or endpoints.default_endpoint()
    with Watch(endpoint) as watch:
        if watch.pid is None:
            print(f"nothing to stop: no `loopmux up` runs on {endpoint}")
            return 0
        print(f"stopping process {watch.pid} on {endpoint}")
        tether.send(watch.pid, signal.SIGTERM)
        if not watch.wait(_DOWN_LIMIT):
            raise Held(f"process {watch.pid} still runs after {_DOWN_LIMIT:.0f} s: look at it, or kill it")
    print("stopped")
    return 0


# --- config -----------------------------------------------------------------------------------------------------------


def _config_check(options: argparse.Namespace) -> int:
    configuration = load(options.file or config.find(options.config))
    for note in configuration.notes:
        print(f"note: {note}")
    count = len(configuration.models)
    print(f"{configuration.file}: good, {count} model{'s' if count > 1 else ''}: {', '.join(configuration.models)}")
    return 0


def _config_schema(options: argparse.Namespace) -> int:  # noqa: ARG001 - every command has the same signature
    sys.stdout.write(jsonschema.text())
    return 0


# --- logs -------------------------------------------------------------------------------------------------------------


def _logs(options: argparse.Namespace) -> int:
    return showlogs.show(options.endpoint or endpoints.default_endpoint(), options.name, options.lines, options.follow)


def _configuration(options: argparse.Namespace) -> Configuration:
    """The configuration, checked.

    Raises:
        InvalidConfiguration: with all its problems.
    """
    return load(config.find(options.config))


COMMANDS: dict[str, Command] = {
    "up": _up,
    "run": _run,
    "down": _down,
    "config check": _config_check,
    "config schema": _config_schema,
    "logs": _logs,
    **envcommands.COMMANDS,
    **systemdcommands.COMMANDS,
}
