"""The launcher's core: what should run against what runs.

Events in, actions out; no clock, no process, no socket. First the broker (if it is ours), then the environments, then
in each environment that is ready the workers of its groups; whatever dies is started again after a delay, and what dies
again and again is parked with its reason while the rest goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from loopmux.codec import shorten
from loopmux.messages import AdapterOrder, Catalogue, ModelPhase
from loopmux_launcher.adapters import Added
from loopmux_launcher.backoff import Backoff
from loopmux_launcher.events import (
    Action,
    AdapterOrdered,
    AdaptersSaved,
    Announce,
    Began,
    BrokerWelcomed,
    BuildEnvironment,
    EnvironmentFailed,
    EnvironmentProgressed,
    EnvironmentReady,
    Event,
    Finish,
    KillProcess,
    ModelLeftOut,
    ProcessExited,
    ProcessReported,
    ReportPhase,
    StartBroker,
    StartWorker,
    StopBuild,
    StopProcess,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.groups import Group
from loopmux_launcher.lifecycle import Process, State
from loopmux_launcher.remembered import Remembered, answer

BROKER = "broker"
_BROKER_START_TIMEOUT = 30.0
"""Seconds; it binds sockets and nothing else, so only a machine in trouble needs more than one."""
_DETAIL_LIMIT = 2_000
"""Bytes of a detail in a CATALOGUE: its ROUTE has room for 4 KiB."""


@dataclass(slots=True)
class _Environment:
    """An environment in use: being built, ready to run workers, or unusable."""

    name: str
    state: Literal["wanted", "building", "ready", "failed"] = "wanted"
    python: str = ""
    detail: str = ""
    since: float = 0.0


class Plan:
    """What should run on this host, and how far that is true."""

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        required: Iterable[str],
        with_broker: bool,
        added: Iterable[Added] = (),
        idle: Collection[Added] = (),
    ) -> None:
        """``added`` are the adapters that were loaded at run time; all but the ``idle`` ones are in ``groups``."""
        self.groups = tuple(groups)
        self._remembered = Remembered(added, idle)
        self.required = tuple(required)
        self.workers = {
            name: (Process(name, group.start_timeout), group) for group in self.groups for name in group.worker_names()
        }
        self.broker = Process(BROKER, _BROKER_START_TIMEOUT, backoff=Backoff(eager=True)) if with_broker else None
        self.environments = {g.environment: _Environment(g.environment) for g in self.groups if g.environment}
        self.exit_code = 0
        self._began = 0.0
        self._started = self._stopping = self._told = self._finished = False
        self._reported: dict[str, tuple[Catalogue, float]] = {}
        self._left_out: dict[str, str] = {}  # by model, as it was announced

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in and say what to do."""
        actions = [*self._on(event, now)]
        actions += self._report_changes(now)
        actions += self._conclude(now)
        return actions

    def next_timer(self) -> float | None:
        """When ``TimerFired`` is due, or None."""
        wakes = [process.wake for process in self._processes() if process.wake is not None]
        return min(wakes, default=None)

    def catalogue(self, now: float) -> list[Catalogue]:
        """What each model is doing, as the broker should know it."""
        return [replace(told, elapsed=now - since) for told, since in self._reported.values()]

    def _processes(self) -> list[Process]:
        return [*([self.broker] if self.broker else []), *(process for process, _ in self.workers.values())]

    def _on(self, event: Event, now: float) -> Iterator[Action]:
        match event:
            case Began():
                self._began = now
                yield from self._start(self.broker, now) if self.broker else self._start_environments(now)
            case EnvironmentProgressed(name, detail):
                self.environments[name].detail = detail
                yield Announce(f"environment {name}", detail, "progress")
            case EnvironmentReady():
                yield from self._environment_ready(event, now)
            case EnvironmentFailed(name, reason):
                yield from self._environment_failed(name, reason)
            case ProcessReported(name, phase, detail):
                yield from self._process_reported(self._process(name), phase, detail, now)
            case ModelLeftOut(name, model, reason):
                yield from self._model_left_out(self._process(name), model, reason)
            case ProcessExited():
                yield from self._process_exited(self._process(event.name), event, now)
            case BrokerWelcomed():
                yield from (ReportPhase(told) for told in self.catalogue(now))
            case AdapterOrdered():
                yield from self._remembered.ordered(event, self.groups)
            case AdaptersSaved():
                yield from self._adapters_saved(event, now)
            case StopRequested(at_once):
                again = "" if at_once or not self._busy() else "; once more to stop at once"
                yield Announce("launcher", f"stopping{again}")
                yield from self._stop(now, at_once=at_once)
            case TimerFired():
                for process in self._processes():
                    if process.wake is not None and process.wake <= now:
                        yield from self._woke(process, now)

    def _process(self, name: str) -> Process:
        return self.broker if self.broker and name == BROKER else self.workers[name][0]

    # --- environments ---

    def _start_environments(self, now: float) -> Iterator[Action]:
        self._started = True
        for environment in self.environments.values():
            environment.state, environment.since = "building", now
            yield BuildEnvironment(environment.name)
        yield from self._start_workers(None, now)

    def _environment_ready(self, event: EnvironmentReady, now: float) -> Iterator[Action]:
        environment = self.environments[event.name]
        environment.state, environment.python, environment.detail = "ready", event.python, ""
        if self._stopping:
            return
        yield Announce(f"environment {event.name}", f"ready in {now - environment.since:.1f} s: {event.summary}")
        yield from self._start_workers(event.name, now)

    def _environment_failed(self, name: str, reason: str) -> Iterator[Action]:
        environment = self.environments[name]
        environment.state, environment.detail = "failed", reason
        if not self._stopping:
            models = ", ".join(m for g in self.groups if g.environment == name for m in g.model_ids)
            yield Announce(f"environment {name}", f"failed, so there is no {models}: {reason}", "error")

    def _start_workers(self, environment: str | None, now: float) -> Iterator[Action]:
        for process, group in self.workers.values():
            if group.environment == environment and process.state is State.WAITING:
                yield from self._start(process, now)

    # --- processes ---

    def _start(self, process: Process, now: float) -> Iterator[Action]:
        process.start(now)
        if process is self.broker:
            yield StartBroker()
            return
        group = self.workers[process.name][1]
        environment = self.environments[group.environment] if group.environment else None
        yield StartWorker(
            process.name,
            group.environment,
            environment.python if environment else None,
            replace(group.spec, name=process.name),
        )

    def _process_reported(self, process: Process, phase: str, detail: str, now: float) -> Iterator[Action]:
        if process.state is not State.STARTING:
            return
        if phase == "ready":
            process.got_ready()
            yield Announce(process.name, f"ready in {now - process.started:.1f} s" + (f": {detail}" if detail else ""))
            if process is self.broker and not self._started:
                yield from self._start_environments(now)
        elif phase == "failed":
            # It leaves by itself: its exit code says whether another try makes sense. If it stays, ``wake`` ends it.
            process.end(detail or "it failed to start", now, explained=bool(detail))
        else:
            process.phase, process.detail = phase, detail
            yield Announce(process.name, f"{phase} {detail}".rstrip(), "progress")

    def _model_left_out(self, process: Process, model: str, reason: str) -> Iterator[Action]:
        """Its worker goes on without it. Said once, however many processes find the same, or how often."""
        if process.state is not State.STARTING:
            return
        process.left_out[model] = reason
        if self._left_out.get(model) != reason:
            self._left_out[model] = reason
            yield Announce(process.name, f"goes on without {model}, which failed: {reason}", "error")

    def _process_exited(self, process: Process, event: ProcessExited, now: float) -> Iterator[Action]:
        delay = process.exited(event.code, event.last_lines, now, event.draw)
        if process.state is State.GONE:
            yield Announce(process.name, "stopped")
            return
        first_broker_failure = process is self.broker and not self._started
        said = "".join(f"\n    {line}" for line in process.last_lines)
        if delay is not None and not first_broker_failure:
            yield Announce(process.name, f"{process.reason}; starts again in {delay:.1f} s{said}", "warning")
            return
        before = next((p.name for p in self._processes() if p is not process and p.failed_like(process)), None)
        text = f"failed for the same reason as {before}" if before else f"{process.why_parked()}{said}"
        yield Announce(process.name, text, "error")
        if process is self.broker:
            process.state, process.wake = State.PARKED, None
            self.exit_code = event.code if event.code > 0 else 1
            yield from self._stop(now, at_once=False)

    def _woke(self, process: Process, now: float) -> Iterator[Action]:
        match process.state:
            case State.PAUSING:
                yield from self._start(process, now)
            case State.STARTING:
                process.end(f"it was not ready after {process.start_timeout:.0f} s (start_timeout)", now)
                yield StopProcess(process.name)
            case _:
                process.wake = None
                yield KillProcess(process.name)

    # --- adapters at run time ---

    def _adapters_saved(self, event: AdaptersSaved, now: float) -> Iterator[Action]:
        """The broker is told what is remembered before it is answered: it holds workers to that."""
        done = self._remembered.saved(event)
        if done is not None:
            yield from self._adapted(*done, now)
        yield from answer(event, done)

    def _adapted(self, order: AdapterOrder, load: bool, now: float) -> Iterator[Action]:
        self.groups = self._remembered.apply(order, self.groups, load=load)
        by_name = {name: group for group in self.groups for name in group.worker_names()}
        self.workers = {name: (process, by_name[name]) for name, (process, _) in self.workers.items()}
        for process, _ in self.workers.values():
            process.left_out.pop(order.name, None)  # what could not be loaded at its start was loaded since
        if not load:
            self._reported.pop(order.name, None)
            yield ReportPhase(Catalogue(order.name, "idle", removed=True))
        yield from self._report_changes(now)

    # --- stopping ---

    def _stop(self, now: float, *, at_once: bool) -> Iterator[Action]:
        self._stopping = True
        for environment in self.environments.values():
            if environment.state == "building":
                yield StopBuild(environment.name)
        for process, _ in self.workers.values():
            if process.state is not State.STOPPING:
                process.stop(now)
                if process.runs:
                    yield StopProcess(process.name)
            if at_once and process.runs:
                process.wake = None
                yield KillProcess(process.name)

    def _conclude(self, now: float) -> Iterator[Action]:
        """What follows from all states together: ready, nothing left to serve, or nothing left to stop."""
        if self._finished:
            return
        if not self._stopping:
            yield from self._tell_ready(now)
            if self._started and all(map(self._failed, self.groups)):
                self.exit_code = 1
                yield Announce("launcher", "no model is left that could be served: stopping", "error")
                yield from self._stop(now, at_once=False)
        if self._stopping and not self._busy():
            if self.broker and self.broker.state not in (State.STOPPING, State.GONE, State.PARKED):
                self.broker.stop(now)
                if self.broker.runs:
                    yield StopProcess(BROKER)
            if not (self.broker and self.broker.runs):
                self._finished = True
                yield Finish(self.exit_code)

    def _busy(self) -> bool:
        building = any(e.state == "building" for e in self.environments.values())
        return building or any(process.runs for process, _ in self.workers.values())

    def _tell_ready(self, now: float) -> Iterator[Action]:
        """Say once that all is ready; or, when some of it has failed for good, what is and what is not."""
        phases = {m: self._phase(g, m)[0] for g in self.groups for m in g.model_ids if m in self.required}
        waited_for = [g for g in self.groups if set(g.model_ids) & set(self.required)]
        if self._told or not self._started or not all(map(self._settled, waited_for)):
            return
        if (self.broker and self.broker.state is not State.READY) or (phases and "ready" not in phases.values()):
            return
        self._told = True
        ready = ", ".join(m for m, phase in phases.items() if phase == "ready")
        failed = ", ".join(m for m, phase in phases.items() if phase == "failed")
        # scripts wait for this line: when some models have failed for good, waiting longer would not bring them
        without = f"; without {failed}, which failed (see above)" if failed else ""
        yield Announce("launcher", f"ready after {now - self._began:.1f} s: {ready}{without}", "ready")

    def _settled(self, group: Group) -> bool:
        """Whether all of a group's processes are ready, or will never be."""
        states = {self.workers[name][0].state for name in group.worker_names()}
        return states <= {State.READY, State.PARKED} or self._failed(group)

    def _failed(self, group: Group) -> bool:
        """Whether none of a group's models will ever be ready."""
        return all(self._phase(group, model)[0] == "failed" for model in group.model_ids)

    # --- the catalogue ---

    def _report_changes(self, now: float) -> Iterator[Action]:
        if self._stopping:
            return
        for group in self.groups:
            for model in group.model_ids:
                phase, detail, ready = self._phase(group, model)
                told = Catalogue(model, phase, 0.0, shorten(detail, _DETAIL_LIMIT), ready)
                if (one := self._remembered.get(model)) is not None:
                    told = replace(told, onto=one.model, folder=one.folder)
                before = self._reported.get(model)
                if before and before[0] == told:
                    continue
                since = before[1] if before and before[0].phase == phase else now
                self._reported[model] = (told, since)
                yield ReportPhase(replace(told, elapsed=now - since))

    def _phase(self, group: Group, model: str) -> tuple[ModelPhase, str, int]:
        """What a group is doing for one of its models: (phase, detail, workers that are ready)."""
        environment = self.environments[group.environment] if group.environment else None
        if environment and environment.state in ("building", "failed"):
            return "building" if environment.state == "building" else "failed", environment.detail, 0
        processes = [self.workers[name][0] for name in group.worker_names()]
        ready = sum(process.serves(model) for process in processes)
        parked = [process for process in processes if process.state is State.PARKED]
        without = [process for process in processes if process.state is State.READY and not process.serves(model)]
        if ready:
            return "ready", parked[0].parked_because() if parked else "", ready
        if len(without) + len(parked) == len(processes):
            reason = without[0].left_out[model] if without else parked[0].last_words()
            return "failed", reason, 0
        starting = [process for process in processes if process.state is State.STARTING]
        warming = [process for process in starting if process.phase == "warming"]
        if starting:
            return "warming" if warming else "loading", (warming or starting)[0].detail, 0
        failed = [p for p in processes if p.reason and p.state in (State.PAUSING, State.ENDING)]
        return ("loading", f"starts again: {failed[0].reason}", 0) if failed else ("queued", "", 0)
