"""The processes of one group, and the environment they run in, as the plan sees them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from loopmux.messages import Demand, ModelPhase, WorkerLoad
from loopmux_launcher.groups import Group
from loopmux_launcher.lifecycle import Process, State
from loopmux_launcher.memory import RESTED, Idle, stay
from loopmux_launcher.scaling import Scaling

_ENDING = "the process before it is still ending what it runs"


@dataclass(slots=True)
class Premises:
    """An environment that workers are to run in.

    Attributes:
        state: wanted: to be built when somebody needs it; abandoned: its build is being ended, and is worth nothing: no
            group names it any more, or its declaration has changed.
        python: its interpreter, once it was ready; stays while it is built again by another declaration.
        changed: processes that run were started in what an earlier declaration made.
    """

    name: str
    state: Literal["wanted", "building", "abandoned", "ready", "failed"] = "wanted"
    python: str = ""
    detail: str = ""
    since: float = 0.0
    changed: bool = False

    @property
    def building(self) -> bool:
        """Whether a builder is at it."""
        return self.state in ("building", "abandoned")


class Crew:
    """The processes of one group.

    Attributes:
        waits: why a process that is wanted is not started yet.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.processes = {name: Process(name, group.start_timeout) for name in group.worker_names()}
        self.scaling = Scaling(group.fewest, group.limit, group.idle_timeout)
        self.waits = ""

    @property
    def alive(self) -> list[Process]:
        """Those that serve, or are on the way to it."""
        return [process for process in self.processes.values() if process.alive]

    def spare(self, worth: Callable[[Process], Any]) -> list[Process]:
        """So many of them as are beyond what always runs: those worth least, and among equals the last."""
        alive = self.alive[::-1]
        alive.sort(key=worth)
        return alive[: max(0, len(alive) - self.group.fewest)]

    @property
    def parked(self) -> list[Process]:
        """Those that were given up."""
        return [process for process in self.processes.values() if process.state is State.PARKED]

    @property
    def missing(self) -> bool:
        """Whether fewer run than always should."""
        return len(self.alive) + len(self.parked) < self.group.fewest

    @property
    def holding(self) -> float:
        """GiB taken by what runs or starts again by itself."""
        return self.group.memory * sum(p.runs or p.alive for p in self.processes.values())

    def next_to_start(self, taken: Container[str] = ()) -> Process | None:
        """A process to start, if one more is wanted, none whose name is ``taken``.

        One that was given up is not made up for: it would end the same.
        """
        if len(self.alive) + len(self.parked) >= self.scaling.wanted:
            return None
        return next(
            (process for process in self.processes.values() if process.dormant and process.name not in taken), None
        )

    def next_to_replace(self) -> Process | None:
        """An outdated process to stop now: one after the other, while the present configuration is seen to work."""
        outdated = [process for process in self.processes.values() if process.outdated and process.alive]
        for process in outdated:
            if process.state is State.STARTING:  # it serves nobody yet
                return process
        settled = all(p.state is State.READY or p.dormant for p in self.processes.values())
        if not settled or len(self.alive) < self.scaling.wanted:
            return None
        return outdated[0] if outdated else None

    # --- demand

    def loads(self, demand: Demand) -> list[WorkerLoad]:
        """What the broker says of the processes that are ready."""
        return [load for load in demand.workers if self._is_ready(load.name)]

    def queued(self, demand: Demand) -> int:
        """How many wait for any of the group's models."""
        return sum(demand.queued.get(model, 0) for model in self.group.model_ids)

    def _is_ready(self, name: str) -> bool:
        return name in self.processes and self.processes[name].state is State.READY

    def told(self, demand: Demand, now: float) -> Process | None:
        """Take a report in; returns a process that is to spare."""
        ready = sum(process.state is State.READY for process in self.processes.values())
        alive = len(self.alive)
        name = self.scaling.told(self.queued(demand), self.loads(demand), alive=alive, ready=ready, now=now)
        return None if name is None else self.processes[name]

    def idle(self, demand: Demand, now: float) -> Iterator[Idle]:
        """Processes that may be stopped to make room for another group."""
        spare = len(self.alive) - self.group.fewest
        if self.queued(demand) or spare <= 0:
            return
        resting = [load for load in self.loads(demand) if not load.running and load.idle >= RESTED]
        for load in sorted(resting, key=lambda load: -load.idle)[:spare]:
            process = self.processes[load.name]
            if now - process.became_ready >= stay(process.took):
                yield Idle(process.name, self.group.memory, load.idle, process.took)

    # --- what people are told

    def settled(self) -> bool:
        """Whether what always runs is ready, or will never be."""
        states = [process.state for process in (*self.alive, *self.parked)]
        return len(states) >= self.group.fewest and set(states) <= {State.READY, State.PARKED}

    def phase(self, model: str, premises: Premises | None) -> tuple[ModelPhase, str, int]:
        """What is done for one of the models: (phase, detail, workers that are ready)."""
        processes, parked = [*self.alive, *self.parked], self.parked
        ready = sum(process.serves(model) for process in processes)
        if ready:
            return "ready", parked[0].parked_because() if parked else "", ready
        if premises and premises.state == "failed":
            return "failed", premises.detail, 0
        if premises and premises.building and self.scaling.wanted:
            return "building", premises.detail, 0
        without = [process for process in processes if process.state is State.READY]
        if processes and len(without) + len(parked) == len(processes):
            return "failed", without[0].left_out[model] if without else parked[0].last_words(), 0
        starting = [process for process in processes if process.state is State.STARTING]
        warming = [process for process in starting if process.phase == "warming"]
        if starting:
            return "warming" if warming else "loading", (warming or starting)[0].detail, 0
        failed = [p for p in processes if p.reason and p.state in (State.PAUSING, State.ENDING)]
        if failed:
            return "loading", f"starts again: {failed[0].reason}", 0
        if not self.scaling.wanted:
            return "idle", "", 0
        ending = any(process.state is State.STOPPING for process in self.processes.values())
        return "queued", self.waits or (_ENDING if ending else ""), 0
