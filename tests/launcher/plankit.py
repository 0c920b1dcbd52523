"""Telling the launcher's core stories: groups, and what to look for in its actions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from loopmux.messages import Catalogue, Demand, ModelSpec, WorkerLoad, WorkerSpec
from loopmux_launcher.events import Action, Announce, DemandReported, ProcessReported, ReportPhase
from loopmux_launcher.groups import Group
from loopmux_launcher.plan import Plan

A = TypeVar("A")


def make(name: str = "m", *, environment: str | None = None, processes: int = 1, timeout: float = 100.0,
         models: Iterable[str] = (), slots: int | None = None, **rest: Any) -> Group:  # fmt: skip
    specs = tuple(ModelSpec(m) for m in models or (name,))
    spec = WorkerSpec(name, "ipc:///x", specs, engine="echo", slots=slots)
    return Group(name, environment, spec, processes, timeout, **rest)


def plan(*groups: Group, with_broker: bool = False, budget: float | None = None) -> Plan:
    return Plan(groups, with_broker=with_broker, budget=budget)


def of(kind: type[A], actions: list[Action]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def told(actions: list[Action]) -> dict[str, Catalogue]:
    return {a.catalogue.model: a.catalogue for a in of(ReportPhase, actions)}


def lines(actions: list[Action], level: str) -> list[str]:
    return [a.text for a in of(Announce, actions) if a.level == level]


def ready(core: Plan, *names: str, now: float = 1.0) -> list[Action]:
    return [action for name in names for action in core.handle(ProcessReported(name, "ready"), now)]


def load(name: str, *, running: int = 0, idle: float = 0.0, slots: int = 4) -> WorkerLoad:
    return WorkerLoad(name, slots, running, idle)


def demand(core: Plan, *loads: WorkerLoad, now: float, **queued: int) -> list[Action]:
    return core.handle(DemandReported(Demand(queued, loads)), now)
