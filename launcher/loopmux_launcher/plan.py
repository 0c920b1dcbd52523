"""The launcher's core: what should run against what runs.

Events in, actions out; no clock, no process, no socket. First the broker (if it is ours), then the environments, then
in each environment that is ready the workers of its groups, as many as are wanted (``fleet``); whatever dies is started
again after a delay, and what dies again and again is parked with its reason while the rest goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Literal

from loopmux.cadence import LEAVE_PATIENTLY
from loopmux.codec import shorten
from loopmux.messages import AdapterOrder, Catalogue, ModelPhase
from loopmux_launcher.adapters import Added
from loopmux_launcher.backoff import Backoff
from loopmux_launcher.crew import Crew
from loopmux_launcher.events import (
    Action,
    AdapterOrdered,
    AdaptersSaved,
    Announce,
    Began,
    BrokerWelcomed,
    ConfigurationChanged,
    ConfigurationRefused,
    DemandReported,
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
    StartBroker,
    StopBuild,
    StopProcess,
    StopRequested,
    TimerFired,
)
from loopmux_launcher.fleet import Fleet
from loopmux_launcher.groups import Group
from loopmux_launcher.lifecycle import Process, State
from loopmux_launcher.remembered import Remembered, answer

BROKER = "broker"
_BROKER_START_TIMEOUT = 30.0
"""Seconds; it binds sockets and nothing else, so only a machine in trouble needs more than one."""
_DETAIL_LIMIT = 1_500
"""Bytes of a detail in a CATALOGUE: its ROUTE has room for 4 KiB, of which an adapter's folder may take 2 000."""


class Plan:
    """What should run on this host, and how far that is true.

    Args:
        groups: what the configuration asks for.
        with_broker: the broker is ours, too.
        budget: GiB that workers may take together; None is no limit.
        added: adapters that were loaded at run time; all but the ``idle`` ones are in ``groups``.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        with_broker: bool,
        budget: float | None = None,
        added: Iterable[Added] = (),
        idle: Collection[Added] = (),
    ) -> None:
        self.fleet = Fleet(groups, budget)
        self._remembered = Remembered(added, idle)
        self.broker = Process(BROKER, _BROKER_START_TIMEOUT, backoff=Backoff(eager=True)) if with_broker else None
        self.exit_code = 0
        self._began = 0.0
        self._stage: Literal["starting", "serving", "stopping"] = "starting"  # it serves once our broker is ready
        self._told = False
        self._reported: dict[str, tuple[Catalogue, float]] = {}
        self._left_out: dict[str, str] = {}  # by model, as it was announced
        self._refused = ""

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in and say what to do."""
        actions = [*self._on(event, now)]
        if self._stage == "serving":
            actions += self.fleet.staff(now)
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

    @property
    def note(self) -> str:
        """What people should know, for ``status``: a configuration or an environment that was refused."""
        refused = [f"configuration: {self._refused}"] if self._refused else []
        return "\n".join((*refused, *(f"{subject}: {text}" for subject, text in self.fleet.notes.items())))

    @property
    def workers(self) -> dict[str, Process]:
        """The processes of all groups, by name."""
        return {process.name: process for crew in self._crews for process in crew.processes.values()}

    @property
    def _crews(self) -> list[Crew]:
        return list(self.fleet.crews.values())

    def _processes(self) -> list[Process]:
        return [*([self.broker] if self.broker else []), *self.fleet.processes()]

    def _on(self, event: Event, now: float) -> Iterator[Action]:
        match event:
            case Began():
                self._began = now
                if self.broker is None:
                    self._stage = "serving"
                else:
                    yield from self._start(self.broker, now)
            case EnvironmentProgressed(name, detail):
                self.fleet.premises[name].detail = detail
                yield Announce(f"environment {name}", detail, "progress")
            case EnvironmentReady(name, python, summary):
                yield from self._unless_stopping(self.fleet.environment_ready(name, python, summary, now))
            case EnvironmentFailed(name, reason):
                yield from self._unless_stopping(self.fleet.environment_failed(name, reason))
            case ProcessReported(name, phase, detail):
                yield from self._process_reported(self._process(name), phase, detail, now)
            case ModelLeftOut(name, model, reason):
                yield from self._model_left_out(self._process(name), model, reason)
            case ProcessExited():
                yield from self._process_exited(self._process(event.name), event, now)
            case Looked(beating):
                yield from self.fleet.looked(beating, now)
            case BrokerWelcomed():
                yield from (ReportPhase(told) for told in self.catalogue(now))
            case AdapterOrdered():
                yield from self._remembered.ordered(event, self.fleet.groups)
            case AdaptersSaved():
                yield from self._adapters_saved(event, now)
            case TimerFired():
                for process in self._processes():
                    if process.wake is not None and process.wake <= now:
                        yield from self._woke(process, now)
            case _:
                yield from self._asked(event, now)

    def _asked(self, event: Event, now: float) -> Iterator[Action]:
        """Somebody wants something else than before."""
        match event:
            case DemandReported(demand) if self._stage == "serving":
                yield from self.fleet.told(demand, now)
            case ConfigurationChanged() if self._stage != "stopping":
                if self._refused:
                    self.fleet.build_again()
                self._refused = ""
                groups, idle = self._remembered.renew(event.groups)
                for one, why in idle.items():
                    yield Announce(
                        f"adapter {one.name}", f"loaded at run time, is not served any more: {why}", "warning"
                    )
                yield from self.fleet.configure(replace(event, groups=groups), now)
                yield from self._withdraw()
            case ConfigurationRefused(reason):
                self._refused = f"refused, the former one stays in force: {reason}"
                yield Announce("launcher", f"configuration {self._refused}", "error")
            case StopRequested():
                yield Announce("launcher", self._farewell(event))
                yield from self._stop(now, event)

    def _unless_stopping(self, actions: Iterator[Action]) -> Iterator[Action]:
        """Note what happened in any case, and speak of it only where it still matters."""
        done = [*actions]
        yield from [] if self._stage == "stopping" else done

    def _process(self, name: str) -> Process:
        return self.broker if self.broker and name == BROKER else self.fleet.process(name)

    # --- processes

    def _start(self, process: Process, now: float) -> Iterator[Action]:
        if process is not self.broker:
            yield from self.fleet.start(process, now)
            return
        process.start(now)
        yield StartBroker()

    def _process_reported(self, process: Process, phase: str, detail: str, now: float) -> Iterator[Action]:
        if phase == "replaced":
            yield Announce(process.name, detail, "warning")
            return
        if process.state is not State.STARTING:
            return
        if phase == "ready":
            process.got_ready(now)
            yield Announce(process.name, f"ready in {process.took:.1f} s" + (f": {detail}" if detail else ""))
            if process is self.broker and self._stage == "starting":
                self._stage = "serving"
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
        left = process.state is State.READY
        delay = process.exited(event.code, event.last_lines, now, event.draw)
        if process.state is State.GONE:
            self.fleet.leaving.pop(process.name, None)
            yield Announce(process.name, "left, as somebody told it to" if left else "stopped")
            if left and process is self.broker:
                yield from self._start(process, now)
            elif left:
                self.fleet.left(process)
            return
        first_broker_failure = process is self.broker and self._stage == "starting"
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
            yield from self._stop(now, StopRequested())

    def _woke(self, process: Process, now: float) -> Iterator[Action]:
        match process.state:
            case State.PAUSING:
                yield from self._start(process, now)
            case State.STARTING:
                process.end(f"it was not ready after {process.start_timeout:g} s (start_timeout)", now)
                yield StopProcess(process.name)
            case _:
                process.wake = None
                yield KillProcess(process.name)

    # --- adapters at run time

    def _adapters_saved(self, event: AdaptersSaved, now: float) -> Iterator[Action]:
        """The broker is told what is remembered before it is answered: it holds workers to that."""
        done = self._remembered.saved(event)
        if done is not None:
            yield from self._adapted(*done, now)
        yield from answer(event, done)

    def _adapted(self, order: AdapterOrder, load: bool, now: float) -> Iterator[Action]:
        groups = self._remembered.apply(order, self.fleet.groups, load=load)
        for crew, group in zip(self._crews, groups, strict=True):
            crew.group = group
        for process in self.fleet.processes():
            process.left_out.pop(order.name, None)  # what could not be loaded at its start was loaded since
        yield from self._withdraw()
        yield from self._report_changes(now)

    # --- stopping

    def _farewell(self, how: StopRequested) -> str:
        if how.at_once or not self._busy():
            return "stopping"
        waits = f", what runs has {LEAVE_PATIENTLY / 2:.0f} s to end" if how.patiently else ""
        return f"stopping{waits}; once more to stop at once"

    def _stop(self, now: float, how: StopRequested) -> Iterator[Action]:
        self._stage = "stopping"
        for premises in self.fleet.premises.values():
            if premises.state == "building":
                yield StopBuild(premises.name)
        for process in self.fleet.processes():
            if process.state is not State.STOPPING or (process.patient and not how.patiently):
                process.stop(now, patiently=how.patiently)
                if process.runs:
                    yield StopProcess(process.name, process.patient)
            if how.at_once and process.runs:
                process.wake = None
                yield KillProcess(process.name)

    def _conclude(self, now: float) -> Iterator[Action]:
        """What follows from all states together: ready, nothing left to serve, or nothing left to stop."""
        if self._stage == "serving":
            yield from self._tell_ready(now)
            if all(crew.group.fewest and self._failed(crew) for crew in self._crews):
                self.exit_code = 1
                yield Announce("launcher", "no model is left that could be served: stopping", "error")
                yield from self._stop(now, StopRequested())
        if self._stage == "stopping" and not self._busy():
            if self.broker and self.broker.state not in (State.STOPPING, State.GONE, State.PARKED):
                self.broker.stop(now)
                if self.broker.runs:
                    yield StopProcess(BROKER)
            if not (self.broker and self.broker.runs):
                yield Finish(self.exit_code)

    def _busy(self) -> bool:
        building = any(premises.building for premises in self.fleet.premises.values())
        return building or any(process.runs for process in self.fleet.processes())

    def _tell_ready(self, now: float) -> Iterator[Action]:
        """Say once that all is ready; or, when some of it has failed for good, what is and what is not."""
        waited_for = [crew for crew in self._crews if crew.group.fewest]
        if self._told or not all(crew.settled() or self._failed(crew) for crew in waited_for):
            return
        phases = {model: self._phase(crew, model)[0] for crew in waited_for for model in crew.group.model_ids}
        if (self.broker and self.broker.state is not State.READY) or (phases and "ready" not in phases.values()):
            return
        self._told = True
        ready = ", ".join(m for m, phase in phases.items() if phase == "ready")
        failed = ", ".join(m for m, phase in phases.items() if phase == "failed")
        later = ", ".join(m for crew in self._crews if not crew.group.fewest for m in crew.group.model_ids)
        # scripts wait for this line: when some models have failed for good, waiting longer would not bring them
        without = f"without {failed}, which failed (see above)" if failed else ""
        on_demand = f"on demand {later}" if later else ""
        what = "; ".join(filter(None, (ready, without, on_demand)))
        yield Announce("launcher", f"ready after {now - self._began:.1f} s: {what}", "ready")

    def _failed(self, crew: Crew) -> bool:
        """Whether none of a group's models will ever be ready."""
        return all(self._phase(crew, model)[0] == "failed" for model in crew.group.model_ids)

    # --- the catalogue

    def _report_changes(self, now: float) -> Iterator[Action]:
        if self._stage == "stopping":
            return
        for crew in self._crews:
            for model in crew.group.model_ids:
                phase, detail, ready = self._phase(crew, model)
                detail = shorten(detail, _DETAIL_LIMIT)
                told = Catalogue(model, phase, 0.0, detail, ready, scales=crew.group.scales)
                if (one := self._remembered.get(model)) is not None:
                    told = replace(told, onto=one.model, folder=one.folder)
                before = self._reported.get(model)
                if before and before[0] == told:
                    continue
                since = before[1] if before and before[0].phase == phase else now
                self._reported[model] = (told, since)
                yield ReportPhase(replace(told, elapsed=now - since))

    def _withdraw(self) -> Iterator[Action]:
        """Take models out of the catalogue that are served no more: unloaded, or not in the configuration."""
        known = {model for crew in self._crews for model in crew.group.model_ids}
        for model in self._reported.keys() - known:
            del self._reported[model]
            self._left_out.pop(model, None)
            yield ReportPhase(Catalogue(model, "idle", removed=True))

    def _phase(self, crew: Crew, model: str) -> tuple[ModelPhase, str, int]:
        return crew.phase(model, self.fleet.premises_of(crew))
