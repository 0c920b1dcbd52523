"""Workers and launchers: who is there, what they serve, which slots are taken, which models are declared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loopmux.messages import Catalogue, Heartbeat, ModelPhase, Register
from loopmux_broker.events import Peer
from loopmux_broker.requests import Request

LeaseKey = tuple[bytes, int]
"""(request id, attempt): no two leases ever share it."""


@dataclass(slots=True, eq=False)
class Lease:
    """One slot of one worker, taken by one attempt of a request, until the worker's own terminal for it.

    It outlives the request's interest in it: a cancelled or superseded attempt is ``stopping`` (the reason as in STOP)
    and holds its slot until the worker says that it has stopped.
    """

    request: Request
    attempt: int
    worker: Worker
    since: float
    acknowledged: bool = False
    stopping: int = 0

    @property
    def key(self) -> LeaseKey:
        """What identifies it in messages."""
        return self.request.id, self.attempt


@dataclass(slots=True, eq=False)
class Member:
    """A worker or a launcher that has registered. ``heard`` is when it last said anything."""

    peer: Peer
    register: Register
    since: float
    heard: float

    @property
    def name(self) -> str:
        """Unique among the living of its role."""
        return self.register.name

    def renew(self, peer: Peer, register: Register, now: float) -> None:
        """The same process registered again, perhaps over another connection."""
        self.peer, self.register, self.heard = peer, register, now


@dataclass(slots=True, eq=False)
class Launcher(Member):
    """A host's launcher."""


@dataclass(slots=True, eq=False)
class Worker(Member):
    """A model process with ``slots`` places.

    Attributes:
        report: what it said about itself at REGISTER, for ``status``.
        served, tokens: requests ended and tokens produced here since it registered.
        progress: the engine's progress counter as of the last heartbeat.
        models: model ids served here, and the adapter that each has of itself.
    """

    report: dict[str, Any] = field(default_factory=dict)
    leases: dict[LeaseKey, Lease] = field(default_factory=dict)
    served: int = 0
    tokens: int = 0
    progress: int = 0
    load: Heartbeat = field(default_factory=Heartbeat)
    models: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = {m.id: m.adapter for m in self.register.models}

    def renew(self, peer: Peer, register: Register, now: float) -> None:
        """The same process registered again, perhaps over another connection or with other models."""
        Member.renew(self, peer, register, now)
        self.models = {m.id: m.adapter for m in register.models}

    @property
    def slots(self) -> int:
        """How many requests it runs at once."""
        return self.register.slots

    @property
    def free(self) -> int:
        """Slots that are not taken."""
        return self.register.slots - len(self.leases)

    def serves(self, model: str, adapter: str | None) -> bool:
        """Whether a request for this model and (unless None) adapter can run here."""
        if model not in self.models:
            return False
        return adapter is None or adapter == self.models[model] or adapter in self.register.adapters


@dataclass(frozen=True, slots=True)
class Declared:
    """One launcher's word about one model."""

    boot: bytes
    entry: Catalogue
    since: float


_PHASES: tuple[ModelPhase, ...] = ("ready", "warming", "loading", "building", "queued", "idle", "failed")
"""The phase of a model that several launchers declare is the most hopeful one."""


class Pool:
    """All workers and launchers, by connection and by what they serve."""

    def __init__(self) -> None:
        self.workers: dict[Peer, Worker] = {}
        self.launchers: dict[Peer, Launcher] = {}
        self.leases: dict[LeaseKey, Lease] = {}
        self._serving: dict[str, dict[Peer, Worker]] = {}
        self._declared: dict[str, dict[str, Declared]] = {}

    # --- membership

    def member(self, peer: Peer) -> Worker | Launcher | None:
        """Who is behind a connection."""
        return self.workers.get(peer) or self.launchers.get(peer)

    def named(self, register: Register) -> Worker | Launcher | None:
        """Who has the role and the name that someone registers with."""
        members = self.workers if register.role == "worker" else self.launchers
        return next((m for m in members.values() if m.name == register.name), None)

    def join(self, member: Worker | Launcher) -> None:
        """Somebody registered."""
        if isinstance(member, Worker):
            self.workers[member.peer] = member
            for model in member.models:
                self._serving.setdefault(model, {})[member.peer] = member
        else:
            self.launchers[member.peer] = member

    def leave(self, member: Worker | Launcher) -> None:
        """Somebody is gone, or about to join again with other properties. A worker's leases are left alone."""
        if isinstance(member, Worker):
            self.workers.pop(member.peer, None)
            for model in member.models:
                serving = self._serving.get(model, {})
                serving.pop(member.peer, None)
                if not serving:
                    self._serving.pop(model, None)
        else:
            self.launchers.pop(member.peer, None)

    # --- slots

    def lease(self, request: Request, worker: Worker, now: float) -> Lease:
        """Take a slot for the request's present attempt."""
        lease = Lease(request, request.attempt, worker, now)
        self.leases[lease.key] = worker.leases[lease.key] = lease
        return lease

    def release(self, lease: Lease) -> None:
        """Give the slot back."""
        self.leases.pop(lease.key, None)
        lease.worker.leases.pop(lease.key, None)

    # --- models

    def serving(self, model: str) -> list[Worker]:
        """The workers that are ready for a model."""
        return list(self._serving.get(model, {}).values())

    def declare(self, launcher: Launcher, entry: Catalogue, now: float) -> None:
        """A launcher said what it does for a model."""
        if entry.removed:
            self._undeclare(entry.model, launcher.name)
            return
        declared = Declared(launcher.register.boot, entry, now)
        self._declared.setdefault(entry.model, {})[launcher.name] = declared

    def withdraw(self, name: str, *, keep_boot: bytes | None = None) -> list[str]:
        """Take out what a launcher of this name declared, unless by the process ``keep_boot``. Returns the models."""
        gone = [m for m, by in self._declared.items() if name in by and by[name].boot != keep_boot]
        for model in gone:
            self._undeclare(model, name)
        return gone

    def _undeclare(self, model: str, launcher: str) -> None:
        declared = self._declared.get(model, {})
        declared.pop(launcher, None)
        if not declared:
            self._declared.pop(model, None)

    def declared(self, model: str) -> Declared | None:
        """The most hopeful word of any launcher about a model."""
        by = self._declared.get(model)
        return min(by.values(), key=lambda d: _PHASES.index(d.entry.phase)) if by else None

    def phase(self, model: str) -> ModelPhase:
        """What a model's users wait for."""
        if model in self._serving:
            return "ready"
        declared = self.declared(model)
        return declared.entry.phase if declared else "queued"

    def known(self) -> list[str]:
        """All model ids that anybody serves or declares, sorted."""
        return sorted(self._declared.keys() | self._serving.keys())

    def knows(self, model: str) -> bool:
        """Whether anybody serves or declares the model."""
        return model in self._serving or model in self._declared

    def adapters(self, model: str) -> list[str]:
        """The adapters that a request for the model may name, sorted."""
        names: set[str] = set()
        for worker in self.serving(model):
            names.update(worker.register.adapters)
            names.update(a for a in (worker.models[model],) if a)
        return sorted(names)
