"""What happens to the launcher (events) and what it does about it (actions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loopmux.messages import AdapterOrder, Catalogue, Demand, WorkerSpec
from loopmux_launcher.adapters import Added
from loopmux_launcher.groups import Group

# --- events: in the past tense ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Began:
    """The launcher is up and may start things."""


@dataclass(frozen=True, slots=True)
class EnvironmentProgressed:
    """A build or probe says what it is doing."""

    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class EnvironmentReady:
    """An environment was built or found, and probed; ``summary`` names the versions in it."""

    name: str
    python: str
    summary: str


@dataclass(frozen=True, slots=True)
class EnvironmentFailed:
    """An environment cannot be used; its builder has ended."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessReported:
    """A process of ours (broker or worker) told its phase; ``replaced``: a broker died, and its parent has another."""

    name: str
    phase: Literal["loading", "warming", "ready", "failed", "replaced"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ModelLeftOut:
    """A starting worker could not load one of its models, and will serve the others."""

    name: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A process of ours is gone.

    Attributes:
        code: exit code, negative for a signal.
        last_lines: the end of its output.
        draw: a random number in [0, 1) for the restart delay.
    """

    name: str
    code: int
    last_lines: tuple[str, ...] = ()
    draw: float = 0.0


@dataclass(frozen=True, slots=True)
class Looked:
    """Signs of life were looked for, as every ``watchdog.between()`` seconds: ``beating`` gave one since the last."""

    beating: frozenset[str]


@dataclass(frozen=True, slots=True)
class BrokerWelcomed:
    """The broker took our REGISTER and wants to know everything."""


@dataclass(frozen=True, slots=True)
class DemandReported:
    """The broker told who waits for our models that scale, and what their workers do."""

    demand: Demand


@dataclass(frozen=True, slots=True)
class ConfigurationChanged:
    """The configuration was read again and is good.

    Attributes:
        environments: those whose declaration is not the former one.
        budget: GiB that workers may take together; None is no limit.
        retry: somebody asked: what was given up is tried again, changed or not.
    """

    groups: tuple[Group, ...]
    environments: frozenset[str] = frozenset()
    budget: float | None = None
    retry: bool = False


@dataclass(frozen=True, slots=True)
class ConfigurationRefused:
    """The configuration was read again and cannot be used; what it said before stays in force."""

    reason: str


@dataclass(frozen=True, slots=True)
class AdapterOrdered:
    """All workers of a model have loaded an adapter, or are to unload one: it is to be remembered, or forgotten."""

    id: bytes
    order: AdapterOrder
    load: bool


@dataclass(frozen=True, slots=True)
class AdaptersSaved:
    """What ``SaveAdapters`` came to; ``trouble`` is why nothing could be written."""

    id: bytes
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants us to end; ``patiently`` when what runs has ended, ``at_once`` without waiting for anything."""

    at_once: bool = False
    patiently: bool = False


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that ``next_timer`` named has come."""


Event = (
    Began
    | EnvironmentProgressed
    | EnvironmentReady
    | EnvironmentFailed
    | ProcessReported
    | ModelLeftOut
    | ProcessExited
    | Looked
    | BrokerWelcomed
    | DemandReported
    | ConfigurationChanged
    | ConfigurationRefused
    | AdapterOrdered
    | AdaptersSaved
    | StopRequested
    | TimerFired
)

# --- actions: in the imperative ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BuildEnvironment:
    """Build or probe an environment."""

    name: str


@dataclass(frozen=True, slots=True)
class StopBuild:
    """End a build that is under way; answered with EnvironmentFailed."""

    name: str


@dataclass(frozen=True, slots=True)
class StartBroker:
    """Start the broker process."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker; ``python`` None means the launcher's own interpreter."""

    name: str
    environment: str | None
    python: str | None
    spec: WorkerSpec


@dataclass(frozen=True, slots=True)
class StopProcess:
    """Ask a process to end; a worker ``patiently`` where what it runs can end nowhere else."""

    name: str
    patiently: bool = False


@dataclass(frozen=True, slots=True)
class KillProcess:
    """End a process and all it started (SIGKILL of its group)."""

    name: str


@dataclass(frozen=True, slots=True)
class ReportPhase:
    """Tell the broker what a model is doing."""

    catalogue: Catalogue


@dataclass(frozen=True, slots=True)
class SaveAdapters:
    """Write down what is loaded at run time; answered with ``AdaptersSaved``."""

    id: bytes
    added: tuple[Added, ...]


@dataclass(frozen=True, slots=True)
class AnswerOrder:
    """Tell the broker what came of its order; ``trouble`` is why it was not done."""

    id: bytes
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell people. ``progress`` lines may be dropped or overwritten, ``ready`` is the line that scripts wait for."""

    subject: str
    text: str
    level: Literal["info", "progress", "warning", "error", "ready"] = "info"


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing of ours runs any more: leave with this exit code."""

    code: int


Action = (
    BuildEnvironment
    | StopBuild
    | StartBroker
    | StartWorker
    | StopProcess
    | KillProcess
    | ReportPhase
    | SaveAdapters
    | AnswerOrder
    | Announce
    | Finish
)
