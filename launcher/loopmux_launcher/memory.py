"""The memory that worker processes of a host may take together, and who makes room when another model is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loopmux_launcher.groups import Group

RESTED = 1.0
"""Seconds without work before a process may be stopped for another: between two turns of a tool loop it has less."""
_SHORTEST_STAY = 5.0
_LONGEST_STAY = 60.0
_ROUNDING = 1e-9
"""GiB: sums of decimal fractions are not exact."""


@dataclass(frozen=True, slots=True)
class Idle:
    """A process that could be stopped to make room.

    Attributes:
        memory: GiB.
        idle: seconds without work.
        took: seconds from its start until it was ready.
    """

    name: str
    memory: float
    idle: float
    took: float

    @property
    def worth(self) -> float:
        """What would have to be done again, the less likely to be wanted the longer it was not."""
        return self.took / (1.0 + self.idle)


def stay(took: float) -> float:
    """Seconds for which a process that took so long to start is not stopped for another.

    At least as long as its start took: two models that take turns would otherwise do nothing but load.
    """
    return min(max(took, _SHORTEST_STAY), _LONGEST_STAY)


def victims(candidates: Iterable[Idle], short: float) -> list[str] | None:
    """Whom to stop for ``short`` GiB: the least valuable, and none that is not needed. None where it is not enough."""
    chosen: list[Idle] = []
    for one in sorted(candidates, key=lambda idle: (idle.worth, -idle.memory, idle.name)):
        if sum(c.memory for c in chosen) + _ROUNDING >= short:
            break
        if one.memory > 0:
            chosen.append(one)
    freed = sum(c.memory for c in chosen)
    if freed + _ROUNDING < short:
        return None
    for one in reversed(chosen.copy()):
        if freed - one.memory + _ROUNDING >= short:
            chosen.remove(one)
            freed -= one.memory
    return [one.name for one in chosen]


def fits(taken: float, needed: float, budget: float | None) -> bool:
    """Whether ``needed`` GiB more are within the budget; None is no limit."""
    return budget is None or taken + needed <= budget + _ROUNDING


def most(group: Group, groups: Iterable[Group], budget: float | None) -> int:
    """How many processes of a group may run, where the others have what always runs."""
    if budget is None or not group.memory:
        return group.limit
    others = sum(one.fewest * one.memory for one in groups if one is not group)
    return max(group.fewest, min(group.limit, int((budget - others) / group.memory + _ROUNDING)))


@dataclass(frozen=True, slots=True)
class Overdrawn:
    """Processes that can never run within the budget.

    Attributes:
        model: the first model of the group; None: what always runs is too much already.
        needed: GiB.
        always: what the groups take that always run, as text.
    """

    model: str | None
    needed: float
    always: str


def overdrawn(groups: Iterable[Group], budget: float) -> Overdrawn | None:
    """What of a configuration cannot be had within its budget."""
    groups = list(groups)
    floor = {group.name: group.fewest * group.memory for group in groups}
    total = sum(floor.values())
    always = ", ".join(f"{g.model_ids[0]} {g.fewest} × {g.memory:g}" for g in groups if floor[g.name])
    if total > budget + _ROUNDING:
        return Overdrawn(None, total, always)
    for group in groups:
        needed = total - floor[group.name] + max(group.fewest, 1) * group.memory
        if needed > budget + _ROUNDING:
            return Overdrawn(group.model_ids[0], needed, always)
    return None
