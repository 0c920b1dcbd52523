"""The second clock of a worker: not whether it answers, but whether its engine gets on.

A worker whose own thread answers while its engine hangs looks alive. Its heartbeats carry a counter that moves with the
engine; standing still for longer than the slowest thing it may be doing is a stall.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopmux_broker.pool import Lease, Worker
from loopmux_broker.requests import State


@dataclass(frozen=True, slots=True)
class Stall:
    """For how long an engine may stand still, seconds.

    Attributes:
        decode: between two tokens of a running stream.
        prefill: before a request's first token.
        per_size: the same for each character (or token id) of its prompt, where that is more. A slow machine computes
            some 20 tokens of 4 characters in a second.
        adapter: so much longer while it loads an adapter, which has to be answered within that time, too.
    """

    decode: float = 15.0
    prefill: float = 60.0
    per_size: float = 0.02
    adapter: float = 120.0

    def budget(self, lease: Lease) -> float:
        """For how long the engine may stand still because of one attempt."""
        if lease.produced:  # what its request has may be another attempt's since
            return self.decode
        return max(self.prefill, self.per_size * (lease.request.submit.prompt_size + 4 * lease.prefix))

    @property
    def shortest(self) -> float:
        """The least that any budget can be."""
        return min(self.decode, self.prefill)

    def due(self, worker: Worker) -> float | None:
        """When a worker counts as hung unless its engine moves before; None while it has nothing to do."""
        budgets = [self.budget(lease) for lease in worker.leases.values() if _counts(lease)]
        longer = self.adapter if worker.loading else 0.0
        return worker.moved + max(budgets) + longer if budgets else None


def busy(worker: Worker) -> bool:
    """Whether its engine has something to do."""
    return any(map(_counts, worker.leases.values()))


def _counts(lease: Lease) -> bool:
    """What only the worker knows of (RECOVERING) may have ended there long ago; a STOP for it has to be answered."""
    return lease.stopping is not None or lease.request.state is not State.RECOVERING
