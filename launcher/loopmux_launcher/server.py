"""The launcher's shell: one thread, one poller over the broker's socket, the children's pipes and the signals."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zmq

import loopmux
from loopmux import endpoints
from loopmux.codec import plain
from loopmux.errors import AuthError, ConfigError, LoopmuxError, ProtocolError
from loopmux.keys import credentials
from loopmux.listening import Listening, renew
from loopmux.messages import Register
from loopmux.sockets import Dealer, new_context
from loopmux.wire import VERSIONS, WORKER_BODY_LIMIT, Message, foreign, from_bytes, message_limit, new_id, to_bytes
from loopmux_launcher import adapterstore, livelook, places, watchdog, workercode
from loopmux_launcher.adapters import Added, extended
from loopmux_launcher.asking import Asking
from loopmux_launcher.config import Configuration, Environment
from loopmux_launcher.console import Console
from loopmux_launcher.events import (
    Action,
    AdaptersSaved,
    Announce,
    AnswerOrder,
    Began,
    BuildEnvironment,
    ConfigurationChanged,
    ConfigurationRefused,
    EnvironmentFailed,
    EnvironmentProgressed,
    EnvironmentReady,
    Event,
    Finish,
    KillProcess,
    Looked,
    ModelLeftOut,
    ProcessExited,
    ProcessReported,
    ReportPhase,
    SaveAdapters,
    StartBroker,
    StartWorker,
    StopBuild,
    StopProcess,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.groups import Group, group
from loopmux_launcher.guard import Guard
from loopmux_launcher.lifecycle import STOP_GRACE
from loopmux_launcher.link import Link, Refused
from loopmux_launcher.plan import BROKER, Plan
from loopmux_launcher.probe import worker_command, worker_variables
from loopmux_launcher.processes import Child, Said, broker_line, remedy
from loopmux_launcher.reader import load
from loopmux_launcher.signals import Signals
from loopmux_launcher.watch import FileWatch, declared

_LONGEST_POLL = 1.0
"""Seconds between two looks at things that do not wake the poller (a parent on systems without process descriptors)."""
_PER_TURN = 64
"""Messages taken from the socket in one turn, so that a flood does not keep the children's output waiting."""
_STAY = 2 * STOP_GRACE
"""Seconds that requests for our models wait for who may follow us: what it takes to stop and to be started again."""
_COULD_NOT_START = 127
"""The shell's exit code for a program that cannot be run."""
_BUILDER = "environment "
"""What the names of processes that build begin with."""
_PHASES = ("loading", "warming", "ready", "failed", "replaced")


class Launcher:
    """Runs a configuration until it is stopped: its own broker too if ``with_broker``."""

    def __init__(
        self,
        configuration: Configuration,
        endpoint: str,
        console: Console,
        *,
        with_broker: bool,
        broker_config: Path | None = None,
        worker_endpoint: str | None = None,
    ) -> None:
        """``endpoint`` is where clients connect, ``worker_endpoint`` where workers do: if None, what belongs to it.

        ``broker_config`` is the file with the settings of its own broker.

        Raises:
            ConfigError: something that this needs cannot be had.
        """
        self._configuration, self._console, self._broker_config = configuration, console, broker_config
        self._endpoint = worker_endpoint or endpoints.worker_endpoint(endpoint)
        # Any tcp, not only beyond this host: an ssh tunnel to another host's broker begins at a loopback address.
        self._host = "" if with_broker or endpoints.ipc_path(self._endpoint) is not None else platform.node()
        self._credentials = credentials(self._endpoint)  # its workers have the same, by their environment
        self._logs = places.usable_logs(endpoint)  # first: where that folder is unusable, it says so best
        # By its broker, of which `endpoint` says nothing where it is another host's.
        self._adapters = places.adapters(worker_endpoint or endpoint)
        added = adapterstore.read(self._adapters)
        groups, idle = extended(self._groups(), added)
        for one, why in idle.items():
            text = f"adapter {one.name} of {self._adapters} is not loaded: {why}"
            console.announce(Announce("launcher", text, "warning"))
        self._plan = Plan(groups, with_broker=with_broker, budget=configuration.memory_gib, added=added, idle=idle)
        self._declared = {name: declared(e) for name, e in configuration.environments.items()}
        self._watch = FileWatch(configuration.file, time.monotonic())
        self._link = Link(_register(), stay=0.0 if with_broker else _STAY)  # its own broker ends with it
        self._code = workercode.install(places.usable_data() / "code")
        self._children: dict[str, Child] = {}
        self._looks_at = 0.0
        self._builds: dict[str, EnvironmentReady | EnvironmentFailed | None] = {}
        self._begun: dict[str, Environment] = {}  # by name, as they were declared when their builds began
        self._in_use: dict[str, Environment] = {}  # as they were when they were ready last
        self._log_troubles: dict[str, str] = {}  # by process, as they were announced
        self._stopped = False
        self._asking: Asking | None = None
        self._exit: int | None = None
        self._guard: Guard | None = None
        # They are the launcher's, so that connections wait instead of being refused while a broker is started again.
        self._listening: dict[str, Listening] = {}
        self._listens_at = {"clients": endpoint, "workers": self._endpoint} if with_broker else {}
        # Its own broker is asked where no key is needed.
        self._asked = endpoints.admin_endpoint(endpoint) if with_broker else endpoint

    def _groups(self) -> tuple[Group, ...]:
        return group(self._configuration.models.values(), self._endpoint, len(os.sched_getaffinity(0)), self._host)

    def _listen_anew(self) -> None:
        """Somebody removed the files of our sockets. A broker that is started again has new ones, as who is with it."""
        try:
            renew(self._listening.values())
        except LoopmuxError as error:
            text = (
                f"somebody removed the files of its sockets: nobody new can connect, and others cannot be made: {error}"
            )
            self._console.announce(Announce(BROKER, text, "error"))
        else:
            text = "somebody removed the files of its sockets: it is started again with new ones"
            self._console.announce(Announce(BROKER, text, "warning"))
            self._children[BROKER].terminate()

    def _stop_listening(self) -> None:
        for one in reversed(self._listening.values()):  # the first one made the folder
            one.close()
        self._listening.clear()

    def run(self, parent: int | None = None) -> int:
        """Serve until a signal, the end of ``parent``, or until nothing is left to serve; returns the exit code.

        Raises:
            BusyError, ConfigError: its own broker's endpoints cannot be listened on.
            LoopmuxError: the broker refuses this launcher, or a socket cannot be had.
        """
        with ExitStack() as ending:
            signals = ending.enter_context(Signals(parent))  # first: nothing of what follows is cut short
            ending.callback(self._stop_listening)
            for name, endpoint in self._listens_at.items():
                self._listening[name] = Listening(endpoint)
            context = new_context(self._endpoint)
            ending.callback(context.term)
            self._guard = Guard()
            ending.callback(self._guard.close)
            self._dealer = Dealer(context, message_limit(WORKER_BODY_LIMIT), self._credentials)
            ending.callback(self._dealer.close)
            ending.callback(lambda: self._send(self._link.bye()))
            ending.callback(self._abandon)
            if self._console.form == "live":
                self._asking = ending.enter_context(Asking(self._asked))
            self._dealer.connect(self._endpoint)
            self._handle(Began())
            while self._exit is None:
                self._turn(signals)
            return self._exit

    # --- one turn

    def _turn(self, signals: Signals) -> None:
        self._console.pass_on()
        readable, writable = self._wait(signals)
        asked = signals.take(readable)
        if asked.reload or self._watch.changed(time.monotonic()):
            self._reload(retry=asked.reload)
        for _ in range(asked.stops):
            self._handle(StopRequested(self._stopped, asked.patiently and not self._stopped))
            self._send(self._link.bye())  # so that nobody waits for long for models that will not come back
            self._stopped = True
        for child in list(self._children.values()):
            if child.wants_write in writable:
                child.write()
            for descriptor in [d for d in child.descriptors() if d in readable]:
                self._told(child, child.read(descriptor))
            self._look_at_log(child)
            self._look_whether_ended(child)
        self._receive()
        self._link.note = self._plan.note
        self._send(self._link.due(time.monotonic()))
        due = self._plan.next_timer()
        if due is not None and due <= time.monotonic():
            self._handle(TimerFired())
        if self._looks_at <= time.monotonic():
            self._looks_at = time.monotonic() + watchdog.between()
            self._handle(Looked(frozenset(name for name, child in self._children.items() if child.pulse.taken())))
        if self._asking is not None:
            status, picture = self._asking.status, livelook.leaving if self._stopped else livelook.picture
            self._console.show(picture(status) if status else ())

    def _wait(self, signals: Signals) -> tuple[set[int], set[int]]:
        poller = zmq.Poller()
        poller.register(self._dealer.socket, zmq.POLLIN)
        poller.register(self._dealer.monitor, zmq.POLLIN)
        for descriptor in signals.descriptors():
            poller.register(descriptor, zmq.POLLIN)
        for child in self._children.values():
            for descriptor in child.descriptors():
                poller.register(descriptor, zmq.POLLIN)
            if child.wants_write is not None:
                poller.register(child.wants_write, zmq.POLLOUT)
        now = time.monotonic()
        due = [now + _LONGEST_POLL, self._looks_at, self._link.next_timer(), *filter(None, [self._plan.next_timer()])]
        events = poller.poll(int(max(0.0, min(due) - now) * 1000) + 1)  # milliseconds, rounded up
        ready = [(source, event) for source, event in events if isinstance(source, int)]
        readable = {source for source, event in ready if event & ~zmq.POLLOUT}
        writable = {source for source, event in ready if event & (zmq.POLLOUT | zmq.POLLERR)}
        return readable, writable

    def _handle(self, event: Event) -> None:
        for action in self._plan.handle(event, time.monotonic()):
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case BuildEnvironment(name):
                self._build(name)
            case StopBuild(name):
                self._begun.pop(name, None)
                self._children[_builder(name)].terminate()
            case StartBroker():
                descriptors = tuple(one.fileno() for one in self._listening.values())
                self._start(BROKER, self._broker_command(), dict(os.environ), descriptors=descriptors, said=broker_line)
            case StartWorker():
                self._start_worker(action)
            case StopProcess(name, patiently):
                if name in self._children:
                    self._children[name].terminate(signal.SIGUSR1 if patiently else signal.SIGTERM)
            case KillProcess(name):
                if name in self._children:
                    self._children[name].kill()
            case ReportPhase(catalogue):
                self._send(self._link.report(catalogue))
            case SaveAdapters(id_, added):
                self._save(id_, added)
            case AnswerOrder(id_, trouble):
                self._send(self._link.answer(id_, trouble))
            case Announce():
                self._console.announce(action)
            case Finish(code):
                self._exit = code

    def _save(self, id_: bytes, added: tuple[Added, ...]) -> None:
        trouble = ""
        try:
            adapterstore.write(self._adapters, added)
        except OSError as error:
            trouble = f"{self._adapters} cannot be written: {error.strerror}; what is loaded would not last"
        self._handle(AdaptersSaved(id_, trouble))

    # --- the configuration

    def _reload(self, *, retry: bool) -> None:
        """Read the configuration again and go over to it; one that is bad changes nothing."""
        self._watch.noted()
        try:
            configuration = load(self._configuration.file)
            environments = {name: declared(e) for name, e in configuration.environments.items()}
        except (ConfigError, OSError) as error:
            self._handle(ConfigurationRefused(str(error)))
            return
        for note in configuration.notes:
            if note not in self._configuration.notes:
                self._console.announce(Announce("launcher", note))
        known = self._declared
        changed = frozenset(name for name, what in environments.items() if what != known.get(name, what))
        self._configuration, self._declared = configuration, environments
        self._handle(ConfigurationChanged(self._groups(), changed, configuration.memory_gib, retry))

    # --- children

    def _broker_command(self) -> list[str]:
        command = [sys.executable, "-m", "loopmux_broker", "--parent-pid", str(os.getpid()), "--log-format", "json"]
        for name, one in self._listening.items():
            command += ["--listen-fd", f"{name}={one.fileno()}"]
        if self._broker_config is not None:
            command += ["--config", str(self._broker_config)]
        return command

    def _build(self, name: str) -> None:
        """Environments are built in a process of their own: it may be killed, and this loop never waits for it."""
        self._builds[name], self._begun[name] = None, self._configuration.environments[name]
        command = [sys.executable, "-m", "loopmux_launcher", "env", "build", name, "--log-format", "json"]
        command += ["--config", str(self._configuration.file), "--parent-pid", str(os.getpid())]
        self._start(_builder(name), command, dict(os.environ))

    def _start_worker(self, action: StartWorker) -> None:
        environment = self._in_use[action.environment] if action.environment else None
        command = worker_command(action.python or sys.executable, "--spec", "-", "--parent-pid", str(os.getpid()))
        variables = worker_variables(self._code, environment.variables if environment else {})
        handover = json.dumps(plain(action.spec)).encode() + b"\n"
        # Broker and builders, which nobody guards, die with us by SIGTERM, and put their files away first.
        self._start(action.name, command, variables, handover=handover, pulse="--pulse-fd", guard=self._guard)
        if action.name in self._children:
            serves = ", ".join(model.id for model in action.spec.models)
            text = f"starting, pid {self._children[action.name].pid}, for {serves}, log {self._log(action.name)}"
            self._console.announce(Announce(action.name, text))

    def _start(self, name: str, command: list[str], variables: dict[str, str], **how: Any) -> None:
        """Start a process; ``how`` is what else ``Child`` is told."""
        try:
            self._children[name] = Child(name, command, variables, self._log(name), **how)
        except OSError as error:
            self._never_began(name, f"{command[0]} could not be started: {error.strerror}{remedy(error)}")

    def _never_began(self, name: str, why: str) -> None:
        environment = _built_by(name)
        if environment is None:
            self._handle(ProcessReported(name, "failed", why))
        else:
            self._builds[environment] = EnvironmentFailed(environment, why)
        self._ended(name, _COULD_NOT_START, ())

    def _log(self, name: str) -> Path:
        return self._logs / f"{name.replace(' ', '-')}.log"

    def _told(self, child: Child, told: list[Said]) -> None:
        for said in told:
            if (environment := _built_by(child.name)) is not None:
                self._builder_told(environment, said)
            elif said.phase == "left_out":
                self._handle(ModelLeftOut(child.name, str(said.fields.get("model")), said.detail))
            elif said.phase == "unreachable":
                self._listen_anew()
            elif said.phase in _PHASES:
                self._handle(ProcessReported(child.name, said.phase, said.detail))  # type: ignore[arg-type]

    def _builder_told(self, name: str, said: Said) -> None:
        """Its verdict is held back until it has ended: then its lock is free and nothing of it is left."""
        match said.phase:
            case "ready":
                self._builds[name] = EnvironmentReady(name, str(said.fields.get("python")), said.detail)
            case "failed":
                self._builds[name] = EnvironmentFailed(name, said.detail)
            case _:
                self._handle(EnvironmentProgressed(name, said.detail))

    def _look_at_log(self, child: Child) -> None:
        """Say once that a log cannot be written; what it is about goes on."""
        trouble = child.log_trouble
        if not trouble:
            self._log_troubles.pop(child.name, None)
        elif trouble != self._log_troubles.get(child.name):
            text = f"its log {self._log(child.name)} cannot be written: {trouble}; it goes on, what it says is lost"
            self._console.announce(Announce(child.name, text, "warning"))
            self._log_troubles[child.name] = trouble

    def _look_whether_ended(self, child: Child) -> None:
        ended = child.finished()
        if ended is not None:
            self._told(child, ended.said)
            del self._children[child.name]
            self._ended(child.name, ended.code, child.last_lines)

    def _ended(self, name: str, code: int, last_lines: tuple[str, ...]) -> None:
        environment = _built_by(name)
        if environment is not None:
            verdict, begun = self._builds.pop(environment), self._begun.pop(environment, None)
            if begun is not None and isinstance(verdict, EnvironmentReady):
                self._in_use[environment] = begun
            reason = "\n".join((f"its builder ended with {code}", *last_lines))
            self._handle(verdict or EnvironmentFailed(environment, reason))
        else:
            self._handle(ProcessExited(name, code, last_lines, random.random()))  # noqa: S311 - jitter, no secret

    def _abandon(self) -> None:
        """However the loop ended, nothing that it started goes on. The broker may still remove its socket files."""
        for child in self._children.values():
            child.terminate() if child.name == BROKER else child.kill()
        for child in self._children.values():
            try:
                child.process.wait(STOP_GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.process.wait()
            child.finished()

    # --- the broker's socket

    def _receive(self) -> None:
        while (connected := self._dealer.news()) is not None:
            self._link.introduce() if connected else self._link.disconnected()
        if self._dealer.barred:
            raise AuthError(self._dealer.barred)
        for data in self._dealer.arrived(_PER_TURN):
            self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            news = self._link.received(from_bytes(data), time.monotonic())
        except ProtocolError as error:
            if foreign(data) and not self._link.ready:  # a broker of another release, to which REGISTER says nothing
                raise LoopmuxError(f"the broker at {self._endpoint} is of another release: {error}") from error
            self._console.announce(Announce("launcher", f"the broker sent something malformed: {error}", "warning"))
            return
        if isinstance(news, Refused):
            raise LoopmuxError(f"the broker at {self._endpoint} refused this launcher: {news.reason}")
        if news is not None:
            self._handle(news)

    def _send(self, messages: list[Message]) -> None:
        if self._dealer.send(map(to_bytes, messages)) < len(messages):
            self._link.lost()  # not connected; REGISTER is repeated until somebody answers


def _builder(environment: str) -> str:
    """The process that builds an environment, by name."""
    return f"{_BUILDER}{environment}"


def _built_by(name: str) -> str | None:
    """The environment that a process builds; None where it is no builder."""
    return name.removeprefix(_BUILDER) if name.startswith(_BUILDER) else None


def _register() -> Register:
    host = platform.node()
    name, software = f"launcher@{host}", f"loopmux {loopmux.__version__}"
    return Register("launcher", name, new_id(), VERSIONS, host=host, pid=os.getpid(), software=software)
