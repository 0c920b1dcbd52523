"""Everything that must hold in a world: each part watches its own, here they are put together.

``callers`` what goes to callers · ``talk`` what processes say, ``answers`` what they owe each other · ``engines`` what
runs · ``adapters`` what is loaded at run time · ``launches`` what is started · ``books`` whether the broker's tables
agree.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from simulation import books
from simulation.adapters import Adapters
from simulation.answers import Answers
from simulation.broken import hold
from simulation.callers import Callers
from simulation.census import census
from simulation.engines import Engines
from simulation.journal import Journal
from simulation.launches import Launches
from simulation.talk import Talk

if TYPE_CHECKING:
    from simulation.client import Call
    from simulation.world import World


class Promise:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.journal = Journal()
        self.calls: dict[bytes, Call] = {}
        self.resting = False
        """Nobody has anything to say any more."""
        self.callers = Callers(self)
        self.talk = Talk(self)
        self.answers = Answers(self)
        self.engines = Engines(self)
        self.launches = Launches(self)
        self.adapters = Adapters(self)

    def hit(self, call: Call, *kinds: str, before: float = 0.0) -> int:
        """How many faults of these kinds were at work during a call, or shortly ``before`` it."""
        return self.journal.count(kinds, call.submitted - before, self.world.clock.now)

    def audit(self) -> None:
        """Look at everything, between any two events."""
        for call in self.calls.values():
            if call.open:
                self.callers.unended(call)
        if self.world.broker.alive:
            books.audit(self.world)
            self.engines.audit(self.world.clock.now - self.journal.calm_since())

    def census(self) -> Counter[str]:
        """How much every core remembers."""
        world = self.world
        cores = [world.broker.core.tables, world.launcher.plan, world.launcher.link]
        return census(*cores, *(w.core for w in world.workers), *(c.core for c in world.living))

    def at_rest(self) -> None:
        """After the last request: nothing is left anywhere."""
        for call in self.calls.values():
            hold(not call.open, "P2 every request ends", lambda: f"{call} ({call.about})")
        for client in self.world.living:
            hold(not client.questions, "P2 every question is answered", client)
        books.at_rest(self.world)
        self.launches.at_rest()
        self.adapters.at_rest(self.world.launcher)
        for worker in self.world.workers:
            hold(worker.core.welcomed, "everybody is with the broker", worker)
            hold(worker.core.requests == 0, "nothing is left in a worker", worker)
            hold(not worker.engine._running, "nothing is left in an engine", worker)
