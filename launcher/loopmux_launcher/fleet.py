"""Worker processes and their environments: what should run, what has room, and what another configuration changes.

Nothing here knows of the broker's own process, or of stopping for good; that is ``plan``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from loopmux.cadence import HEARTBEAT, SILENT_HEARTBEATS
from loopmux.messages import Demand
from loopmux_launcher import watchdog
from loopmux_launcher.crew import Crew, Premises
from loopmux_launcher.events import (
    Action,
    Announce,
    BuildEnvironment,
    ConfigurationChanged,
    KillProcess,
    StartWorker,
    StopBuild,
    StopProcess,
)
from loopmux_launcher.groups import Group, succeed
from loopmux_launcher.lifecycle import Process, State
from loopmux_launcher.memory import fits, most, victims

_FRESH = SILENT_HEARTBEATS * HEARTBEAT
"""Seconds for which a report says whom nobody needs; after that the broker is away, and they may be busy."""


class Fleet:
    """The workers of this host.

    Attributes:
        crews: by their groups' names.
        leaving: processes of groups that are no more, with the GiB that they still take.
        premises: the environments in use, by name.
        budget: GiB for all processes together; None is no limit.
        notes: environments that could not be built as they are declared now, with the reason.
    """

    def __init__(self, groups: Iterable[Group], budget: float | None) -> None:
        self.crews = {group.name: Crew(group) for group in groups}
        self.leaving: dict[str, tuple[Process, float]] = {}
        self.premises = {g.environment: Premises(g.environment) for g in self.groups if g.environment}
        self.budget = budget
        self.notes: dict[str, str] = {}
        self._demand, self._told = Demand(), -_FRESH
        self._watchdog = watchdog.Watchdog()
        self._cap()

    @property
    def groups(self) -> list[Group]:
        """What the configuration asks for."""
        return [crew.group for crew in self.crews.values()]

    def crew_of(self, name: str) -> Crew | None:
        """The crew that a process belongs to; None for one that is leaving."""
        return next((crew for crew in self.crews.values() if name in crew.processes), None)

    def processes(self) -> list[Process]:
        """All, with those that are leaving."""
        working = [process for crew in self.crews.values() for process in crew.processes.values()]
        return [*working, *(process for process, _ in self.leaving.values())]

    def process(self, name: str) -> Process:
        """One of them."""
        crew = self.crew_of(name)
        return self.leaving[name][0] if name in self.leaving or crew is None else crew.processes[name]

    def premises_of(self, crew: Crew) -> Premises | None:
        """The environment of a crew; None is the launcher's own Python."""
        return self.premises[crew.group.environment] if crew.group.environment else None

    # --- what should run

    def told(self, demand: Demand, now: float) -> Iterator[Action]:
        """The broker says what there is to do."""
        self._demand, self._told = demand, now
        for crew in self.crews.values():
            if crew.group.scales and (process := crew.told(demand, now)) is not None:
                yield from self._retire(process, now, "there is not enough to do for it")

    def staff(self, now: float) -> Iterator[Action]:
        """Start what is wanted and has room; replace what runs by a former configuration."""
        yield from self._build(now)
        blocked = False
        for crew in self._by_urgency(now):
            crew.waits = ""
            while (process := crew.next_to_start(self.leaving)) is not None:
                premises = self.premises_of(crew)
                if premises and premises.state != "ready":
                    break
                if not crew.group.memory or (not blocked and self._has_room(crew)):
                    yield from self.start(process, now)
                    continue
                if not blocked:
                    yield from self._make_room(crew, now)
                blocked = True  # whoever waits longest has the next room, else a large one never had any
                crew.waits = self._shortage(crew)
                break
        for crew in self.crews.values():
            premises = self.premises_of(crew)
            if not premises or premises.state == "ready":
                while (process := crew.next_to_replace()) is not None:
                    yield from self._retire(process, now, "it starts again by the changed configuration")

    def _build(self, now: float) -> Iterator[Action]:
        needed = {crew.group.environment for crew in self.crews.values() if crew.scaling.wanted}
        for premises in self.premises.values():
            if premises.state == "wanted" and premises.name in needed:
                premises.state, premises.since = "building", now
                yield BuildEnvironment(premises.name)

    def _by_urgency(self, now: float) -> list[Crew]:
        """First those that have less than they always should, then who has none, then who has waited longest."""
        for crew in self.crews.values():
            if crew.next_to_start(self.leaving) is None:
                crew.scaling.asked = None
            elif crew.scaling.asked is None:
                crew.scaling.asked = now

        def rank(crew: Crew) -> tuple[bool, bool, float]:
            asked = crew.scaling.asked
            return not crew.missing, bool(crew.alive), now if asked is None else asked

        return sorted(self.crews.values(), key=rank)

    def start(self, process: Process, now: float) -> Iterator[Action]:
        """Start a process by the configuration in force; where its environment was never ready, when that is."""
        crew = self.crew_of(process.name)
        assert crew is not None
        premises = self.premises_of(crew)
        python = premises.python if premises else None
        if python == "":
            process.put_off()
            return
        process.start(now)
        yield StartWorker(process.name, crew.group.environment, python, replace(crew.group.spec, name=process.name))

    def left(self, process: Process) -> None:
        """A process left as somebody else told it to. Beyond what always runs it is started again for who waits."""
        crew = self.crew_of(process.name)
        assert crew is not None
        crew.scaling.settle(len(crew.alive))

    def _retire(self, process: Process, now: float, why: str) -> Iterator[Action]:
        """Stop a process that is not needed, or not as it is. What it runs ends there or goes on elsewhere."""
        runs = process.runs
        process.stop(now, patiently=process.last_of_its_kind)
        if runs:
            yield Announce(process.name, f"is stopped: {why}")
            yield StopProcess(process.name, process.patient)

    # --- what hangs

    def looked(self, beating: Collection[str], now: float) -> Iterator[Action]:
        """End what hangs. Only what is ready is watched: everything else has its own time to end."""
        ready = [process.name for process in self.processes() if process.state is State.READY]
        for name in self._watchdog.hung(ready, beating, now):
            why = (
                f"it gave no sign of life for {watchdog.SILENCE:g} s (it hangs, or somebody stopped it) and was killed"
            )
            self.process(name).end(why, now)
            yield KillProcess(name)

    # --- memory

    def _cap(self) -> None:
        """See to it that no crew wants more than it could ever have: waiting for it, it would keep others waiting."""
        for crew in self.crews.values():
            group, scaling = crew.group, crew.scaling
            scaling.resize(group.fewest, most(group, self.groups, self.budget), group.idle_timeout)

    def _taken(self) -> float:
        """GiB of all processes."""
        return sum(crew.holding for crew in self.crews.values()) + sum(memory for _, memory in self.leaving.values())

    def _staying(self) -> float:
        """GiB of those that are not about to end."""
        return sum(crew.group.memory * len(crew.alive) for crew in self.crews.values())

    def _has_room(self, crew: Crew) -> bool:
        return fits(self._taken(), crew.group.memory, self.budget)

    def _make_room(self, crew: Crew, now: float) -> Iterator[Action]:
        """Stop the least valuable processes that nobody needs now, if that is enough for the one that is wanted."""
        assert self.budget is not None
        short = self._staying() + crew.group.memory - self.budget
        if short <= 0 or now - self._told > _FRESH:
            return
        idle = [one for other in self.crews.values() if other is not crew for one in other.idle(self._demand, now)]
        for name in victims(idle, short) or []:
            other = self.crew_of(name)
            assert other is not None
            other.scaling.wanted = len(other.alive) - 1
            yield from self._retire(other.processes[name], now, f"it makes room for {crew.group.name}")

    def _shrink(self, now: float) -> Iterator[Action]:
        """Stop what a limit that is lower now has no room for, of what does not always run; who works goes last."""
        busy = {load.name for load in self._demand.workers if load.running}

        def worth(process: Process) -> tuple[bool, bool]:
            return process.state is State.READY, process.name in busy

        spare = [(crew, process) for crew in self.crews.values() if crew.group.memory for process in crew.spare(worth)]
        for crew, process in sorted(spare, key=lambda one: worth(one[1])):
            if fits(self._staying(), 0.0, self.budget):
                break
            yield from self._retire(process, now, "memory_gib has no room for it any more")
            crew.scaling.settle(len(crew.alive))

    def _shortage(self, crew: Crew) -> str:
        holders = [f"{c.group.name} {c.holding:g}" for c in self.crews.values() if c.holding]
        return f"waits for {crew.group.memory:g} GiB of memory_gib: {self.budget:g}, of which others have: " + (
            ", ".join(holders) or "none"
        )

    # --- environments

    def environment_ready(self, name: str, python: str, summary: str, now: float) -> Iterator[Action]:
        """An environment is built, or was there. What runs in an earlier one of that name is outdated."""
        premises = self._verdict(name)
        if premises is None:
            return
        moved = premises.python not in ("", python)  # it was built anew beside, or rolled back
        premises.state, premises.python, premises.detail = "ready", python, ""
        self.notes.pop(f"environment {name}", None)
        for crew in self._inside(name) if premises.changed or moved else ():
            _outdate(crew)
        premises.changed = False
        yield Announce(f"environment {name}", f"ready in {now - premises.since:.1f} s: {summary}")

    def environment_failed(self, name: str, reason: str) -> Iterator[Action]:
        """An environment cannot be used; where an earlier one of that name is in use, that goes on."""
        premises = self._verdict(name)
        if premises is None:
            return
        subject = f"environment {name}"
        if premises.python:
            premises.state = "ready"
            self.notes[subject] = f"cannot be built as it is declared now, the former one stays in use: {reason}"
            yield Announce(subject, self.notes[subject], "error")
            return
        premises.state, premises.detail = "failed", reason
        models = ", ".join(model for crew in self._inside(name) for model in crew.group.model_ids)
        yield Announce(subject, f"failed, so there is no {models}: {reason}", "error")

    def build_again(self) -> None:
        """What could not be built may fail no more: who builds reads the configuration's file, which was wrong."""
        for name, premises in self.premises.items():
            if premises.state == "failed" or (f"environment {name}" in self.notes and not premises.building):
                premises.state = "wanted"

    def _verdict(self, name: str) -> Premises | None:
        """The environment that a build was for; None if that has come to nothing meanwhile."""
        premises = self.premises[name]
        if premises.state != "abandoned":
            return premises
        if self._inside(name):
            premises.state, premises.detail = "wanted", ""
        else:
            del self.premises[name]
        return None

    def _inside(self, environment: str) -> list[Crew]:
        return [crew for crew in self.crews.values() if crew.group.environment == environment]

    # --- another configuration

    def configure(self, event: ConfigurationChanged, now: float) -> Iterator[Action]:
        """Go over to another configuration, leaving alone what it does not change."""
        self.budget, before = event.budget, self.crews
        self.crews, restarted, resized, added = {}, [], set(), []
        for group, former in succeed([crew.group for crew in before.values()], event.groups):
            crew = self.crews[group.name] = Crew(group)
            if former is None:
                added.append(group.name)
            else:
                yield from self._take_over(crew, before.pop(former.name), now)
                if not group.runs_like(former):
                    _outdate(crew, last_of_its_kind=not group.takes_over_from(former))
                    restarted.append(group.name)
                if (group.fewest, group.limit) != (former.fewest, former.limit):
                    resized.add(group.name)
            for process in crew.parked if event.retry else ():
                process.forgive()
        for crew in before.values():
            for process in crew.processes.values():
                process.last_of_its_kind = True
            yield from self._let_go(crew.processes.values(), crew.group, now)
        self._cap()
        alive = {name: len(crew.alive) for name, crew in self.crews.items()}
        yield from self._shrink(now)
        resized |= {name for name, crew in self.crews.items() if len(crew.alive) < alive[name]}
        yield from self._move(event)
        renewed = [name for name in event.environments if name in self.premises]
        said = {"added": added, "changed": restarted, "number of processes": resized, "removed": list(before)}
        said["environments changed"] = renewed
        text = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in said.items() if names)
        yield Announce("launcher", f"configuration read again: {text or 'what runs stays as it is'}")

    def _take_over(self, crew: Crew, former: Crew, now: float) -> Iterator[Action]:
        """The processes of a group go on in its successor, as far as it has as many."""
        for name in crew.processes.keys() & former.processes.keys():
            crew.processes[name] = former.processes.pop(name)
            crew.processes[name].start_timeout = crew.group.start_timeout
        crew.scaling = former.scaling
        yield from self._let_go(former.processes.values(), former.group, now)

    def _let_go(self, processes: Iterable[Process], group: Group, now: float) -> Iterator[Action]:
        for process in processes:
            if process.state is not State.STOPPING:
                yield from self._retire(process, now, "the configuration has it no more")
            if process.runs:
                self.leaving[process.name] = process, group.memory

    def _move(self, event: ConfigurationChanged) -> Iterator[Action]:
        """Environments that are new, changed, failed before, or named by nobody any more."""
        named = {group.environment for group in self.groups if group.environment}
        for name in named - self.premises.keys():
            self.premises[name] = Premises(name)
        for name, premises in list(self.premises.items()):
            if name in named and name not in event.environments:
                if event.retry and not premises.building:
                    premises.state = "wanted"
                continue
            self.notes.pop(f"environment {name}", None)
            premises.changed = bool(premises.python)
            if premises.building:
                premises.state = "abandoned"
                yield StopBuild(name)
            elif name in named:
                premises.state = "wanted"
            else:
                del self.premises[name]


def _outdate(crew: Crew, *, last_of_its_kind: bool = False) -> None:
    """What runs is to be replaced; what was given up may work now."""
    for process in crew.processes.values():
        process.outdated = process.alive
        process.last_of_its_kind |= last_of_its_kind and process.alive
        if process.state is State.PARKED:
            process.forgive()
