"""Adapters that are loaded at run time: whoever is killed, workers have in the end what their launcher remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loopmux.errors import LoopmuxError
from loopmux.messages import AdapterOrder, Done
from simulation.broken import hold
from simulation.launcher import FULL
from simulation.profile import ECHO, SPOILED

if TYPE_CHECKING:
    from simulation.client import ClientProcess
    from simulation.launcher import LauncherProcess
    from simulation.promise import Promise
    from simulation.worker import WorkerProcess

_AT_ONCE = "overloaded"
"""Refused: the same name is being loaded or unloaded, or no worker is there."""
_AWAY = ("kill", "freeze", "snap", "hold", "clog", "hang", "stop", "drain", "slow", "close", "bad starts")
"""Faults for which an order may fail, or its answer be lost."""
_LONG = 20.0
"""Seconds for which an order whose answer was lost may still be carried out."""


@dataclass
class _Order:
    """What a client asked, and what it was told: None for nothing yet, or that nobody answered."""

    order: AdapterOrder
    load: bool
    asked: float
    ended: float = math.inf
    answer: Done | None = None

    def __str__(self) -> str:
        return f"{'load' if self.load else 'unload'} {self.order.name}"


class Adapters:
    """Watches orders, and what workers serve."""

    def __init__(self, promise: Promise) -> None:
        self._promise, self._world, self._clock = promise, promise.world, promise.world.clock
        self._orders: dict[bytes, _Order] = {}

    def asked(self, client: ClientProcess, id_: bytes, order: AdapterOrder, load: bool) -> None:
        """A client wants an adapter loaded or unloaded."""
        self._orders[id_] = made = _Order(order, load, self._clock.now)
        self._world.story.tell(client, f"orders: {made}")

    def known(self, id_: bytes) -> bool:
        """Whether this is an order's id."""
        return id_ in self._orders

    def answered(self, client: ClientProcess, id_: bytes, outcome: Done | LoopmuxError) -> None:
        """A client hears what came of its order."""
        one, now = self._orders[id_], self._clock.now
        hold(math.isinf(one.ended), "P2 one answer", lambda: f"{client} got another one to {one}")
        one.ended = now
        failure = outcome.failure if isinstance(outcome, Done) else outcome
        text = "done" if failure is None else f"{failure.code}: {failure.message}"
        self._world.story.tell(client, f"{one}: {text}")
        if isinstance(outcome, Done):
            one.answer = outcome
        spoiled = one.load and one.order.name == SPOILED
        hold(failure is not None or not spoiled, "what cannot be loaded is not", client)
        if failure is None or spoiled:
            return
        excused = (
            failure.code == _AT_ONCE
            or FULL in failure.message
            or (not one.load and failure.code == "adapter_not_found")
            or self._promise.journal.count(_AWAY, one.asked - _LONG, now) > 0
            or client.gone <= now
        )
        hold(excused, "an order is carried out", lambda: f"{one} of {client}: {text}")

    def unloads(self, worker: WorkerProcess, name: str) -> None:
        """An engine unloads an adapter."""
        configured = {model.id for group in self._world.profile.groups for model in group.spec.models}
        hold(name not in configured, "what is configured stays", lambda: f"{worker} unloads {name}")

    def at_rest(self, launcher: LauncherProcess) -> None:
        """In calm all agree, and what a client was told is so."""
        remembered = {one.name for one in launcher.saved}
        pool = self._world.broker.core.tables.pool
        for worker in self._world.workers:
            spec = next(g.spec for g in self._world.profile.groups if worker.name.startswith(g.name))
            configured = {model.id for model in spec.models}
            more = remembered if ECHO in configured else set()
            engine, known = set(worker.engine._models), set(pool.worker_named(worker.name).models)
            hold(
                engine == known == configured | more,
                "workers have what their launcher remembers",
                lambda: f"{worker} has {sorted(engine)}, the broker knows {sorted(known)}, remembered: {remembered}",
            )
        for one in self._orders.values():
            if one.answer is not None and one.answer.failure is None and one.answer.remembered and self._last(one):
                hold(
                    (one.order.name in remembered) == one.load,
                    "what was told is so",
                    lambda: f"{one} was done, {remembered} are remembered",
                )

    def _last(self, one: _Order) -> bool:
        """Whether nobody else had the same adapter in hand meanwhile or later."""
        others = [other for other in self._orders.values() if other.order.name == one.order.name and other is not one]
        return all((other.ended if other.answer else other.ended + _LONG) < one.asked for other in others)
