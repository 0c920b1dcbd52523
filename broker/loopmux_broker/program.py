"""The broker's command line. It ends with ``loopmux.exitcodes``: 1 also where an endpoint is taken."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import loopmux
from loopmux import exitcodes, keys, standard
from loopmux.errors import LoopmuxError
from loopmux.pulse import Pulse
from loopmux_broker import descriptors
from loopmux_broker.config import BrokerConfig
from loopmux_broker.inherited import Listener, inherited, remove_files
from loopmux_broker.keeper import heed, hold, keep
from loopmux_broker.lifeline import Lifeline, Parent
from loopmux_broker.listeners import Listeners
from loopmux_broker.logs import LEVELS, Logger
from loopmux_broker.server import Server

_GARBAGE = 20_000
"""New objects between two collections: a few hundred requests' worth, against Python's default of some ten."""


def main(arguments: list[str] | None = None) -> int:
    """Run the broker until SIGTERM, SIGINT or the death of ``--parent-pid``; returns the exit code."""
    standard.complete()
    options = _parser().parse_args(arguments)
    log = Logger(options.log_format, options.log_level)
    try:
        given = inherited(options.listen_fd, os.environ)
        parents = [] if options.parent_pid is None else [Parent(options.parent_pid)]
        keeper, pulse, serving = Parent(os.getpid()), Pulse(), False
        hold()
        descriptors.allow()
        settings = _Settings(options.config, log)
        listeners = Listeners(options.endpoint, options.worker_endpoint, settings.good, given)
        try:
            code = keep(log, pulse, lambda: settings.renew(listeners))
            if code is None:
                serving = True
                parents.append(keeper)
                code = _serve(settings, listeners.all, pulse, parents, log)
        finally:
            if not serving or keeper.dead():  # else it goes on listening, for the next one
                listeners.close()
        if parents and parents[-1].dead():
            remove_files(given)
        return code
    except LoopmuxError as error:
        if options.debug:
            raise
        print(f"loopmux-broker: {error}", file=sys.stderr)
        return exitcodes.of(error)
    except OSError as error:
        if options.debug:
            raise
        remedy = "make room (on the disk, for descriptors, for processes), then start it again"
        print(f"loopmux-broker: {error}: {remedy}", file=sys.stderr)
        return exitcodes.FAILURE
    finally:
        log.end()


def _serve(settings: _Settings, listeners: list[Listener], pulse: Pulse, parents: list[Parent], log: Logger) -> int:
    with Lifeline(*parents) as lifeline:
        lifeline.catch_signals()
        heed()
        server = Server(settings.good, log, lifeline, listeners, pulse, settings.secret)
        # What is there now stays: the collector need not look at it again, and most garbage needs no collector.
        gc.freeze()
        gc.set_threshold(_GARBAGE)
        try:
            server.run()
        finally:
            server.close()
            hold()  # it ends already
    return 0


class _Settings:
    """The settings, and the secret part of the key that they name, as both were last found good."""

    def __init__(self, file: Path | None, log: Logger) -> None:
        self._file, self._log = file, log
        self.good, self.secret = self._read()

    def renew(self, listeners: Listeners) -> None:
        """Read them again. Whose file has got a mistake since is not to have no broker for it."""
        try:
            settings, secret = self._read()
            listeners.check(settings)
        except LoopmuxError as error:
            self._log.say("error", "settings refused, the former ones stay in force", reason=str(error))
        else:
            self.good, self.secret = settings, secret

    def _read(self) -> tuple[BrokerConfig, str]:
        if self._file is None:
            return BrokerConfig(), ""
        from loopmux_broker.configfile import load  # the parser takes its time, and most brokers have no file

        settings = load(self._file)
        return settings, keys.read(Path(settings.key)).secret if settings.key else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loopmux-broker", description="Route requests of Loopmux clients to model workers."
    )
    parser.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="E",
        help="where clients connect: ipc:///path or tcp://127.0.0.1:port; may be given several times "
        "(default: $LOOPMUX_ENDPOINT, else a socket of this user)",
    )
    parser.add_argument(
        "--worker-endpoint",
        action="append",
        default=[],
        metavar="W",
        help="where workers and launchers connect (default: beside the first --endpoint)",
    )
    parser.add_argument(
        "--listen-fd",
        action="append",
        default=[],
        metavar="WHO=N",
        help="serve an inherited listening socket, clients=N or workers=N; systemd's LISTEN_FDS is taken over too",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, see configs/broker.yaml")
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end, cleaning up, when this process is gone")
    parser.add_argument(
        "--log-format",
        choices=("json", "console"),
        default="console",
        help="of the log on standard error (%(default)s)",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="the least that is logged (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"loopmux-broker {loopmux.__version__}")
    return parser
