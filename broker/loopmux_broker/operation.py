"""LOAD or UNLOAD under way: who has to do it, who has, and who could not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loopmux.codec import shorten
from loopmux.errors import listed
from loopmux.messages import AdapterOrder, Done, Failure
from loopmux_broker.events import Peer
from loopmux_broker.pool import Worker

_REASON = 300
"""Bytes of one worker's reason in the answer about all of them."""

Role = Literal["worker", "launcher"]


@dataclass(slots=True)
class Operation:
    """LOAD or UNLOAD under way.

    Attributes:
        asker: the connection over which it was asked for last; None where the broker does it by itself.
        stages: who has to do it, by name; the first ones are under way.
        since: when the present stage began.
        done, failures: what was answered, by name.
        had: boots of the workers that served the adapter before, from which a failed LOAD does not take it.
        single: it is about the one worker that it names, and not what all of them should do.
    """

    id: bytes
    load: bool
    order: AdapterOrder
    asker: Peer | None
    stages: list[tuple[Role, set[str]]]
    since: float
    had: frozenset[bytes] = frozenset()
    done: dict[str, Done] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    remembered: set[str] = field(default_factory=set)
    single: bool = False

    @property
    def role(self) -> Role:
        """Whose part the present stage is."""
        return self.stages[0][0]

    @property
    def awaited(self) -> set[str]:
        """Who has not answered in the present stage."""
        return self.stages[0][1]

    def waits_for(self, role: Role, name: str) -> bool:
        """Whether somebody has a part in the present stage and has not answered."""
        return bool(self.stages) and self.role == role and name in self.awaited

    def counts_on(self, worker: Worker, name: str) -> bool:
        """Whether it has a worker load this adapter."""
        return (
            self.load
            and self.order.name == name
            and (worker.name in self.done or self.waits_for("worker", worker.name))
        )

    def takes_in(self, worker: Worker) -> bool:
        """Whether a worker that has just come has to load it, too."""
        loading = self.load and not self.single and self.role == "worker"
        return loading and self.order.model in worker.models and worker.name not in self.done

    def failure(self, what: str, undone: Collection[str] = ()) -> Failure:
        """The failures of all members as one: the first one's code, and who said what; ``undone`` where it was done."""
        first = next(iter(self.failures.values()))
        said = "; ".join(f"{name}: {shorten(f.message, _REASON)}" for name, f in _by_reason(self.failures).items())
        back = f"; taken back from {listed(undone)}" if undone else ""
        retryable = all(failure.retryable for failure in self.failures.values())
        return Failure(first.code, f"adapter {self.order.name!r} {what}: {said}{back}", retryable, self.order.model)


def _by_reason(failures: Mapping[str, Failure]) -> dict[str, Failure]:
    """Those who say the same together, so that it is read once."""
    names: dict[str, list[str]] = {}
    for name in sorted(failures):
        names.setdefault(failures[name].message, []).append(name)
    return {listed(said): failures[said[0]] for said in names.values()}
