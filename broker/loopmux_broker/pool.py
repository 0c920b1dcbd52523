"""Workers and launchers: who is there, what they serve, which slots are taken, which models are declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from loopmux.errors import BadRequestError, listed
from loopmux.messages import Catalogue, Heartbeat, LeftOut, ModelPhase, Register, ServedModel
from loopmux.wire import StopReason
from loopmux_broker.events import Peer
from loopmux_broker.requests import Request

T = TypeVar("T")

LeaseKey = tuple[bytes, int]
"""(request id, attempt): no two leases ever share it."""
Registration = tuple[bytes, int]
"""A process (boot id), and which of its REGISTERs (number of the introduction)."""


@dataclass(slots=True, eq=False)
class Lease:
    """One slot of one worker, taken by one attempt of a request, until the worker's own terminal for it.

    It outlives the request's interest in it: a cancelled or superseded attempt is ``stopping`` (the reason as in STOP)
    and holds its slot until the worker says that it has stopped.

    Attributes:
        prefix: tokens that the request had produced before; what is beyond is this attempt's own.
        produced: the attempt has brought tokens of its own.
        cold: nothing of its prompt is known to have been with its worker before, and no output has come yet.
        missing: its worker has registered again and has not named it yet.
        start: first token that the worker can still send. Of an attempt that only the worker knows, ``start`` to
            ``prefix`` is what it has.
    """

    request: Request
    attempt: int
    worker: Worker
    since: float
    prefix: int = 0
    start: int = 0
    acknowledged: bool = False
    missing: bool = False
    produced: bool = False
    cold: bool = False
    stopping: StopReason | None = None

    @property
    def key(self) -> LeaseKey:
        """What identifies it in messages."""
        return self.request.id, self.attempt


@dataclass(slots=True, eq=False)
class Member:
    """A worker or a launcher that has registered.

    Attributes:
        heard: when it last said anything.
        introduction: number of the REGISTER by which it is known, which rises with each of its connections.
        key: the name of the key that it registered with, empty without one.
        away: its connection is closed, which the broker's own absence may have been the reason for: it is waited for.
    """

    peer: Peer
    register: Register
    since: float
    heard: float
    introduction: int
    key: str
    away: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """Unique among the living of its role."""
        return self.register.name

    @property
    def registration(self) -> Registration:
        """Its last one: boot id, and which one of that process."""
        return self.register.boot, self.introduction

    def renew(self, peer: Peer, register: Register, introduction: int, now: float) -> None:
        """The same process registered again, perhaps over another connection."""
        self.peer, self.register, self.heard = peer, register, now
        self.introduction, self.away = introduction, False


@dataclass(slots=True, eq=False)
class Launcher(Member):
    """A host's launcher.

    Attributes:
        note: what it wants people to know.
        declared: it has had the time to declare all of its models since it registered.
    """

    note: str = ""
    declared: bool = False

    def renew(self, peer: Peer, register: Register, introduction: int, now: float) -> None:
        """The same process registered again, and declares its models again."""
        Member.renew(self, peer, register, introduction, now)
        self.declared = False


@dataclass(slots=True, eq=False)
class Worker(Member):
    """A model process with ``slots`` places.

    Attributes:
        report: what it said about itself at REGISTER, for ``status``.
        served, tokens: requests ended and tokens produced here since it registered.
        pace: seconds from RUN to the first output for each character of a prompt, of long ones that it had to compute;
            0 until there was one.
        short: seconds from RUN to the first output of shorter ones; 0 likewise.
        progress: the engine's progress counter as of the last heartbeat.
        moved: when the engine was last seen to get on, or was given its first request.
        models: model ids served here, and the adapter that each has of itself.
        draining: it takes no new work and is about to leave.
        evicted: when it is to be gone at the latest, from an administrator's word until it says DRAIN itself.
        expected: HELD that are still to come; until then nobody knows which of its slots are free.
        held_for: the request that it is being emptied for.
        alone: the lease that nothing may run beside.
        loading: operations that have it load an adapter, which holds up its engine.
    """

    report: dict[str, Any] = field(default_factory=dict)
    leases: dict[LeaseKey, Lease] = field(default_factory=dict)
    served: int = 0
    tokens: int = 0
    pace: float = 0.0
    short: float = 0.0
    progress: int = 0
    moved: float = 0.0
    draining: bool = False
    evicted: float | None = None
    expected: int = 0
    held_for: Request | None = None
    alone: Lease | None = None
    loading: frozenset[bytes] = frozenset()
    load: Heartbeat = field(default_factory=Heartbeat)
    models: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.read_models()

    def read_models(self) -> None:
        """``models`` as the register has them."""
        self.models = {m.id: m.adapter for m in self.register.models}

    def renew(self, peer: Peer, register: Register, introduction: int, now: float) -> None:
        """The same process registered again, perhaps over another connection or with other models."""
        Member.renew(self, peer, register, introduction, now)
        self.read_models()

    @property
    def slots(self) -> int:
        """How many requests it runs at once."""
        return self.register.slots

    @property
    def open(self) -> bool:
        """Whether it may be given work at all."""
        return not (self.draining or self.expected or self.away or self.held_for or self.alone)

    @property
    def free(self) -> int:
        """Slots that a request may take now."""
        return self.register.slots - len(self.leases) if self.open else 0

    def serves(self, model: str, adapter: str | None, fingerprint: str | None = None) -> bool:
        """Whether a request for this model and (unless None) adapter and fingerprint can run here."""
        if model not in self.models:
            return False
        if adapter is not None and adapter != self.models[model] and adapter not in self.register.adapters:
            return False
        return fingerprint is None or fingerprint == self.register.fingerprint(model, adapter)


@dataclass(frozen=True, slots=True)
class Declared:
    """One launcher's word about one model, or that of a worker that left it out."""

    registration: Registration
    entry: Catalogue
    since: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What a model's users have or wait for: its phase, the seconds it has been in it, a line for people."""

    phase: ModelPhase
    elapsed: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.phase}: {self.detail}" if self.detail else self.phase


_WITHDRAWN = 1000
"""Names of models that were taken back, of which so many are kept; beyond that, those that workers still serve."""
_UNANSWERED = "its launcher calls it ready, but the broker has no word from its workers"
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
        self._left_out: dict[str, dict[Peer, Declared]] = {}
        self.withdrawn: set[str] = set()
        """Models that a launcher declared once and that none declares any more; of very many those with a worker."""

    # --- membership

    def member(self, peer: Peer) -> Worker | Launcher | None:
        """Who is behind a connection."""
        return self.workers.get(peer) or self.launchers.get(peer)

    def named(self, register: Register) -> Worker | Launcher | None:
        """Who has the role and the name that someone registers with."""
        members = self.workers if register.role == "worker" else self.launchers
        return next((m for m in members.values() if m.name == register.name), None)

    def worker_named(self, name: str) -> Worker:
        """The worker of a name.

        Raises:
            BadRequestError: there is none; says which there are.
        """
        named = {worker.name: worker for worker in self.workers.values()}
        if name not in named:
            raise BadRequestError(f"worker: found {name!r}, expected one of {listed(named)}")
        return named[name]

    def join(self, member: Worker | Launcher) -> None:
        """Somebody registered."""
        if isinstance(member, Worker):
            self.workers[member.peer] = member
            for model in member.models:
                self._serving.setdefault(model, {})[member.peer] = member
            for one in member.register.left_out:
                word = Declared(member.registration, Catalogue(one.id, "failed", detail=one.reason), member.since)
                self._left_out.setdefault(one.id, {})[member.peer] = word
        else:
            self.launchers[member.peer] = member

    def leave(self, member: Worker | Launcher) -> None:
        """Somebody is gone, or about to join again with other properties. A worker's leases are left alone."""
        if isinstance(member, Worker):
            self.workers.pop(member.peer, None)
            for model in member.models:
                _take_out(self._serving, model, member.peer)
            for one in member.register.left_out:
                _take_out(self._left_out, one.id, member.peer)
        else:
            self.launchers.pop(member.peer, None)

    def adapt(self, worker: Worker, served: ServedModel, content: str) -> None:
        """A worker has loaded an adapter; ``content`` is the hash of its files."""
        register = self._without(worker, served.id)
        names = (*register.adapters, served.id)
        self._become(worker, replace(register, models=(*register.models, served), adapters=names))
        worker.report = {**worker.report, "adapters": {**contents(worker), served.id: content}}

    def strip(self, worker: Worker, name: str) -> None:
        """A worker has unloaded an adapter."""
        self._become(worker, self._without(worker, name))
        kept = {known: content for known, content in contents(worker).items() if known != name}
        worker.report = {**worker.report, "adapters": kept}

    def leave_out(self, worker: Worker, name: str, reason: str) -> None:
        """A worker could not load an adapter that it should have."""
        register = self._without(worker, name)
        self._become(worker, replace(register, left_out=(*register.left_out, LeftOut(name, reason))))

    def _without(self, worker: Worker, name: str) -> Register:
        """What a worker serves beside one adapter."""
        register = worker.register
        return replace(
            register,
            models=tuple(model for model in register.models if model.id != name),
            adapters=tuple(adapter for adapter in register.adapters if adapter != name),
            left_out=tuple(one for one in register.left_out if one.id != name),
        )

    def _become(self, worker: Worker, register: Register) -> None:
        self.leave(worker)
        worker.register = register
        worker.read_models()
        self.join(worker)

    # --- slots

    def lease(self, request: Request, worker: Worker, now: float) -> Lease:
        """Take a slot for the request's present attempt."""
        total = request.output.total
        lease = Lease(request, request.attempt, worker, now, prefix=total, start=total)
        key = lease.key
        self.leases[key] = worker.leases[key] = lease
        if request.alone:
            worker.alone = lease
        return lease

    def release(self, lease: Lease) -> None:
        """Give the slot back."""
        key = lease.key
        self.leases.pop(key, None)
        lease.worker.leases.pop(key, None)
        if lease.worker.alone is lease:
            lease.worker.alone = None

    # --- models

    def serves(self, model: str) -> bool:
        """Whether any worker is ready for a model."""
        return model in self._serving

    def serving(self, model: str) -> list[Worker]:
        """The workers that are ready for a model."""
        return list(self._serving.get(model, {}).values())

    def declare(self, launcher: Launcher, entry: Catalogue, now: float) -> None:
        """A launcher said what it does for a model."""
        if entry.removed:
            self._withdraw(entry.model, launcher.name)
            return
        self.withdrawn.discard(entry.model)
        declared = Declared(launcher.registration, entry, now)
        self._declared.setdefault(entry.model, {})[launcher.name] = declared

    def withdraw(self, name: str, *, keep: Registration | None = None) -> list[str]:
        """Take out what a launcher of this name declared, unless behind the REGISTER ``keep``. Returns the models."""
        gone = [m for m, by in self._declared.items() if name in by and by[name].registration != keep]
        for model in gone:
            self._withdraw(model, name)
        return gone

    def scaling(self, launcher: Launcher) -> list[str]:
        """The models that a launcher starts and stops processes of as they are needed."""
        return [m for m, by in self._declared.items() if launcher.name in by and by[launcher.name].entry.scales]

    def _withdraw(self, model: str, name: str) -> None:
        if model in self._declared:
            _take_out(self._declared, model, name)
            if model not in self._declared:
                if len(self.withdrawn) >= _WITHDRAWN:
                    self.withdrawn.intersection_update(self._serving)
                self.withdrawn.add(model)

    def declared(self, model: str) -> Declared | None:
        """The most hopeful word about a model, of any launcher or of a worker that left it out.

        Among equals a launcher's goes first: its reason is the whole one.
        """
        words = [*self._declared.get(model, {}).values(), *self._left_out.get(model, {}).values()]
        return min(words, key=lambda d: _PHASES.index(d.entry.phase), default=None)

    def standing(self, model: str, now: float) -> Standing:
        """How a model is. Ready is what has a worker here: a launcher does not see that one hangs."""
        declared, served = self.declared(model), model in self._serving
        if declared is None:
            return Standing("ready" if served else "queued")
        entry = declared.entry
        if entry.phase == "ready" and not served:
            return Standing("queued", detail=_UNANSWERED)
        return Standing("ready" if served else entry.phase, entry.elapsed + now - declared.since, entry.detail)

    def known(self) -> list[str]:
        """All model ids that anybody serves, declares or left out, sorted."""
        return sorted(self._declared.keys() | self._serving.keys() | self._left_out.keys())

    def knows(self, model: str) -> bool:
        """Whether anybody serves, declares or left out the model."""
        return model in self._serving or model in self._declared or model in self._left_out

    def leaves(self, model: str) -> bool:
        """Whether all workers of a model leave, and no launcher will start another one: theirs took it back."""
        return model in self.withdrawn and all(worker.draining for worker in self.serving(model))

    def launchers_of(self, model: str) -> Mapping[str, Declared]:
        """The words of all launchers about a model, by launcher."""
        return self._declared.get(model, {})

    def run_time_adapters(self) -> list[Catalogue]:
        """The adapters that launchers remember, for all workers of the model that they were loaded for."""
        words = (word.entry for by in self._declared.values() for word in by.values())
        return [entry for entry in words if entry.onto is not None]

    def left_out_by(self, model: str) -> list[Worker]:
        """The workers that left a model out."""
        return [self.workers[peer] for peer in self._left_out.get(model, {})]

    def adapters(self, model: str) -> list[str]:
        """The adapters that a request for the model may name, sorted."""
        names: set[str] = set()
        for worker in self.serving(model):
            names.update(worker.register.adapters)
            names.update(a for a in (worker.models[model],) if a)
        return sorted(names)


def contents(worker: Worker) -> dict[str, str]:
    """The hashes of a worker's adapters, by name, as far as it names them."""
    told = worker.report.get("adapters")
    if not isinstance(told, dict):
        return {}
    return {name: content for name, content in told.items() if isinstance(content, str)}


def _take_out(table: dict[str, dict[T, Any]], model: str, key: T) -> None:
    """Remove one entry of a model, and the model with its last."""
    entries = table.get(model, {})
    entries.pop(key, None)
    if not entries:
        table.pop(model, None)
