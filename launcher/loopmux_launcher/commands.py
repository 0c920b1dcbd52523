"""The launcher's command line. It ends with ``loopmux.exitcodes``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from loopmux import endpoints, exitcodes
from loopmux.errors import ConfigError, LoopmuxError
from loopmux_launcher import config, environments, interpreters, jsonschema, places, showlogs, tether, workercode
from loopmux_launcher.arguments import Command, parser
from loopmux_launcher.config import Configuration, Environment
from loopmux_launcher.console import Console
from loopmux_launcher.events import Announce
from loopmux_launcher.holder import Held, Holder, Watch
from loopmux_launcher.reader import load
from loopmux_launcher.server import Launcher

_DOWN_LIMIT = 30.0
"""Seconds that `down` waits: workers get 5 s to stop, the broker as many, the rest is for a slow machine."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
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
        print(f"loopmux-launcher: {error}", file=sys.stderr)
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
        return _launch(options, configuration, endpoint, with_broker=True)


def _run(options: argparse.Namespace) -> int:
    endpoint = options.endpoint or endpoints.default_endpoint()
    return _launch(options, _configuration(options), endpoint, with_broker=False)


def _launch(options: argparse.Namespace, configuration: Configuration, endpoint: str, *, with_broker: bool) -> int:
    with Console(options.log_format) as console:
        console.announce(Announce("launcher", f"{configuration.file} on {endpoint}"))
        for note in configuration.notes:
            console.announce(Announce("launcher", note))
        return Launcher(configuration, endpoint, console, with_broker=with_broker).run(options.parent_pid)


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


# --- env --------------------------------------------------------------------------------------------------------------


def _env_build(options: argparse.Namespace) -> int:
    if options.parent_pid is not None:
        tether.die_with_parent(options.parent_pid)
    signal.signal(signal.SIGTERM, _interrupted)
    configuration = _configuration(options)
    names = [options.name] if options.name else list(configuration.environments)
    if not names:
        print("nothing to build: the configuration names no environment")
    build = _build_for_launcher if options.log_format == "json" else _build_for_people
    return max((build(configuration, name, options) for name in names), default=0)


def _build_for_people(configuration: Configuration, name: str, options: argparse.Namespace) -> int:
    subject = f"environment {name}"
    with Console(options.log_format) as console:
        built = _prepare(configuration, name, lambda text: console.announce(Announce(subject, text, "progress")))
        console.announce(Announce(subject, f"ready at {built.python.parent.parent}: {built.summary}"))
    return 0


def _build_for_launcher(configuration: Configuration, name: str, options: argparse.Namespace) -> int:  # noqa: ARG001
    try:
        built = _prepare(configuration, name, lambda text: _tell("building", text))
    except (LoopmuxError, OSError) as error:
        _tell("failed", str(error))
        return exitcodes.FAILURE
    _tell("ready", built.summary, python=str(built.python))
    return 0


def _prepare(configuration: Configuration, name: str, report: Callable[[str], None]) -> environments.Built:
    environment = _environment(configuration, name)
    torch = any(m.environment == name and m.entry.engine != "echo" for m in configuration.models.values())
    data, log = places.usable_data(), places.usable_logs() / f"env-{name}.log"
    code = workercode.install(data / "code")
    return environments.prepare(environment, data / "envs", code, log, report, torch=torch)


def _tell(phase: str, detail: str, **more: str) -> None:
    """One line for the launcher that started this build."""
    print(json.dumps({"phase": phase, "detail": detail, **more}), flush=True)


def _interrupted(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # cleaning up is not interrupted
    raise KeyboardInterrupt


def _env_list(options: argparse.Namespace) -> int:
    configuration = _configuration(options)
    for name, environment in configuration.environments.items():
        try:
            python = environments.locate(environment, places.data() / "envs")
        except interpreters.EnvironmentUnusable as error:
            print(f"{name:20} not ready  {error}")
            continue
        built = environments.read_marker(python.parent.parent)
        print(f"{name:20} {'built' if built else 'existing':9}  {python}  {built.summary if built else ''}".rstrip())
    return 0


def _env_path(options: argparse.Namespace) -> int:
    configuration = _configuration(options)
    print(environments.locate(_environment(configuration, options.name), places.data() / "envs"))
    return 0


def _environment(configuration: Configuration, name: str) -> Environment:
    environment = configuration.environments.get(name)
    if environment is None:
        known = ", ".join(configuration.environments) or "none"
        raise ConfigError(f"{configuration.file}: found no environment {name!r}, expected one of: {known}")
    return environment


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
    "env build": _env_build,
    "env list": _env_list,
    "env path": _env_path,
    "logs": _logs,
}
