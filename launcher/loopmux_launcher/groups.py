"""Which models share worker processes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_launcher.config import Model

MODELS_PER_WORKER = 24
"""A worker announces its models in one ROUTE of 4 KiB; id, fingerprint and adapter name take about 150 bytes."""


@dataclass(frozen=True, slots=True)
class Group:
    """Models that are served by the same processes, and what such a process is told (all but its name)."""

    name: str
    environment: str | None
    spec: WorkerSpec
    processes: int
    start_timeout: float

    @property
    def model_ids(self) -> tuple[str, ...]:
        """The ids that each process of the group serves."""
        return tuple(model.id for model in self.spec.models)

    def worker_names(self) -> tuple[str, ...]:
        """One name per process."""
        return tuple(f"{self.name}-{n}" for n in range(1, self.processes + 1))


def group(models: Iterable[Model], endpoint: str, cores: int) -> tuple[Group, ...]:
    """Put models with the same base, environment, quantisation and engine settings together.

    A group has as many processes as the most demanding of its models. Where no thread count is given, the cores are
    shared out between all processes that compute, so that they do not fight for them.
    """
    shared: dict[tuple[Any, ...], list[list[Model]]] = {}
    for model in models:
        packs = shared.setdefault(_key(model), [[]])
        if len(packs[-1]) == MODELS_PER_WORKER:
            packs.append([])
        packs[-1].append(model)
    packs = [pack for packs in shared.values() for pack in packs]
    computing = sum(_processes(pack) for pack in packs if pack[0].entry.engine != "echo")
    threads = max(1, cores // computing) if computing else None
    names: set[str] = set()
    return tuple(_group(pack, _name(pack[0].id, names), endpoint, threads) for pack in packs)


def _processes(pack: list[Model]) -> int:
    return max(model.processes for model in pack)


def _key(model: Model) -> tuple[Any, ...]:
    entry = model.entry
    echo = dataclasses.astuple(entry.echo) if entry.echo else None
    return (
        model.base_model,
        model.environment,
        entry.engine,
        entry.use_4bit,
        entry.use_8bit,
        entry.dtype,
        entry.device,
        _number(entry.slots),
        _number(entry.context),
        _number(entry.kv_cache_gib),
        _number(entry.torch_threads),
        entry.trust_remote_code,
        entry.allow_pickle_weights,
        echo,
    )


def _group(pack: list[Model], name: str, endpoint: str, threads: int | None) -> Group:
    model = pack[0]
    entry = model.entry
    echo = dataclasses.asdict(entry.echo) if entry.echo else {}
    spec = WorkerSpec(
        name=name,
        endpoint=endpoint,
        models=tuple(ModelSpec(m.id, m.adapter_dir, m.entry.model_type, m.entry.system_prompt or None) for m in pack),
        base_model=model.base_model,
        engine=entry.engine,
        dtype=entry.dtype,
        device=entry.device,
        slots=_number(entry.slots),
        context=_number(entry.context),
        kv_cache_gib=_number(entry.kv_cache_gib),
        torch_threads=_number(entry.torch_threads) or (threads if entry.engine != "echo" else None),
        use_4bit=entry.use_4bit,
        use_8bit=entry.use_8bit,
        trust_remote_code=entry.trust_remote_code,
        allow_pickle_weights=entry.allow_pickle_weights,
        echo={setting: value for setting, value in echo.items() if value is not None},
    )
    timeout = max(m.entry.start_timeout for m in pack)
    return Group(name, model.environment, spec, _processes(pack), timeout)


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
