"""Which models share worker processes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_launcher.config import Model

MODELS_PER_WORKER = 24
"""A worker announces its models in one ROUTE of 4 KiB; id, fingerprint and adapter name take about 150 bytes."""
IDLE_TIMEOUT = 600.0
"""Seconds, where no model of a group names its own: a large model takes minutes to load, and users pause for some."""


@dataclass(frozen=True, slots=True)
class Group:
    """Models that are served by the same processes, and what such a process is told (all but its name).

    Attributes:
        fewest: processes that always run.
        most: processes that may run when they are needed, where these are more than ``fewest``; see ``limit``.
        idle_timeout: seconds without requests after which one beyond ``fewest`` stops.
        memory: GiB that each takes.
        shares_cores: its number of threads was not asked for: it follows from how many processes the host has.
        host: where its processes run, if the broker may have launchers of other hosts, with groups of the same names.
    """

    name: str
    environment: str | None
    spec: WorkerSpec
    fewest: int
    start_timeout: float
    most: int = 0
    idle_timeout: float = IDLE_TIMEOUT
    memory: float = 0.0
    shares_cores: bool = False
    host: str = ""

    @property
    def model_ids(self) -> tuple[str, ...]:
        """The ids that each process of the group serves."""
        return tuple(model.id for model in self.spec.models)

    @property
    def limit(self) -> int:
        """The most processes that may run."""
        return max(self.fewest, self.most)

    @property
    def scales(self) -> bool:
        """Whether its processes come and go."""
        return self.limit > self.fewest

    def worker_names(self) -> tuple[str, ...]:
        """One name per process that may run."""
        where = f"@{self.host}" if self.host else ""
        return tuple(f"{self.name}-{n}{where}" for n in range(1, self.limit + 1))

    def runs_like(self, other: Group) -> bool:
        """Whether a process of the other one may go on as one of this."""
        return self.environment == other.environment and _told(self) == _told(other)

    def takes_over_from(self, other: Group) -> bool:
        """Whether what runs in a process of the other one can go on here: by name, the weights are the same."""
        ours = {model.id: model.adapter_dir for model in self.spec.models}
        weights = ("base_model", "dtype", "device", "use_4bit", "use_8bit")
        return all(getattr(self.spec, key) == getattr(other.spec, key) for key in weights) and all(
            model.id in ours and ours[model.id] == model.adapter_dir for model in other.spec.models
        )


def _told(group: Group) -> WorkerSpec:
    """What a process is told, without what may differ between two that are alike."""
    threads = None if group.shares_cores else group.spec.torch_threads
    models = tuple(
        sorted(group.spec.models, key=lambda model: model.id)
    )  # in which order the file has them is no matter
    return replace(group.spec, name="", models=models, torch_threads=threads)


def succeed(before: Sequence[Group], after: Iterable[Group]) -> list[tuple[Group, Group | None]]:
    """Each group of a new configuration with the one of the old that it goes on from, if any.

    Processes are told apart by their group's name, so one that goes on keeps its name, and no other one gets it.
    """
    after = list(after)
    found: dict[int, Group] = {}
    left = list(before)
    for like in (Group.runs_like, _same_name, _same_model):
        for i, new in enumerate(after):
            old = next((one for one in left if like(new, one)), None) if i not in found else None
            if old is not None:
                found[i] = old
                left.remove(old)
    taken = {old.name for old in found.values()}
    result: list[tuple[Group, Group | None]] = []
    for i, new in enumerate(after):
        name = found[i].name if i in found else _name(new.name, taken)
        result.append((replace(new, name=name), found.get(i)))
    return result


def _same_name(new: Group, old: Group) -> bool:
    return new.name == old.name


def _same_model(new: Group, old: Group) -> bool:
    """Whether they have one in common: a group is named after its first model, which may be another one now."""
    return not set(new.model_ids).isdisjoint(old.model_ids)


def group(models: Iterable[Model], endpoint: str, cores: int, host: str = "") -> tuple[Group, ...]:
    """Put models with the same base, environment, quantisation and engine settings together.

    A group has as many processes as the most demanding of its models that say how many. Where no thread count is given,
    the cores are shared out between all processes that compute, so that they do not fight for them.
    """
    shared: dict[str, list[list[Model]]] = {}  # by a text: there is a mapping among the settings
    for model in models:
        packs = shared.setdefault(repr((model.environment, _settings(model))), [[]])
        if len(packs[-1]) == MODELS_PER_WORKER:
            packs.append([])
        packs[-1].append(model)
    packs = [pack for packs in shared.values() for pack in packs]
    # one that runs now and then counts as one: it gets the cores of an ordinary process when it does
    computing = sum(max(_fewest(pack), 1) for pack in packs if pack[0].entry.engine != "echo")
    threads = max(1, cores // computing) if computing else None
    names: set[str] = set()
    return tuple(_group(pack, _name(pack[0].id, names), endpoint, threads, host) for pack in packs)


def _fewest(pack: list[Model]) -> int:
    return max((model.fewest for model in pack if model.fewest is not None), default=1)


def _settings(model: Model) -> WorkerSpec:
    """What a process is told for the sake of one model, as far as all models of the process have to agree."""
    entry = model.entry
    echo = dataclasses.asdict(entry.echo) if entry.echo else {}
    return WorkerSpec(
        name="",
        endpoint="",
        models=(),
        base_model=model.base_model,
        engine=entry.engine,
        dtype=entry.dtype,
        device=entry.device,
        slots=_number(entry.slots),
        context=_number(entry.context),
        kv_cache_gib=_number(entry.kv_cache_gib),
        torch_threads=_number(entry.torch_threads),
        kernels=entry.kernels,
        use_4bit=entry.use_4bit,
        use_8bit=entry.use_8bit,
        trust_remote_code=entry.trust_remote_code,
        allow_pickle_weights=entry.allow_pickle_weights,
        echo={setting: value for setting, value in echo.items() if value is not None},
    )


def _group(pack: list[Model], name: str, endpoint: str, threads: int | None, host: str) -> Group:
    settings = _settings(pack[0])
    own_threads = settings.torch_threads
    threads = own_threads or (threads if settings.engine != "echo" else None)
    return Group(
        name,
        pack[0].environment,
        replace(settings, name=name, endpoint=endpoint, models=tuple(map(_spec, pack)), torch_threads=threads),
        _fewest(pack),
        max(m.entry.start_timeout for m in pack),
        most=max(m.most for m in pack),
        idle_timeout=max((m.entry.idle_timeout for m in pack if m.entry.idle_timeout), default=IDLE_TIMEOUT),
        memory=max(m.entry.memory_gib or 0.0 for m in pack),
        shares_cores=own_threads is None,
        host=host,
    )


def _spec(model: Model) -> ModelSpec:
    entry = model.entry
    return ModelSpec(model.id, model.adapter_dir, entry.model_type, entry.system_prompt or None, entry.tool_format)


def _number(value: Any) -> Any:
    """``auto`` and nothing both leave the choice to the worker."""
    return None if value == "auto" else value


def _name(model_id: str, taken: set[str]) -> str:
    """A short name for people, log files and process lists, made from a model id and unlike all others."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", model_id).strip("-.")[:40] or "model"
    name, n = base, 1
    while name in taken:
        n += 1
        name = f"{base}.{n}"
    taken.add(name)
    return name
