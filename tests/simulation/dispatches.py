"""Who is given a slot, and which; who is refused; what a place in the queue means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmux import codec
from loopmux.messages import Failure, Run
from loopmux.wire import Message
from simulation.broken import hold

if TYPE_CHECKING:
    from loopmux_broker.tables import Tables
    from simulation.client import Call
    from simulation.process import Endpoint
    from simulation.world import World

_RECOVERY = 3.0
"""Seconds after its start in which a broker hears again, in any order, of what it had."""
_PASSED = 2.0
"""Seconds of waiting by which a turn may be passed by one of a session of the worker that has the slot."""


class Dispatches:
    """The broker: who is given a slot, and which."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: set[tuple[bytes, int, float]] = set()
        self._home: dict[tuple[str, str, str], tuple[str, float]] = {}
        self._at: dict[bytes, str] = {}  # where requests ran last
        self._awaited: dict[bytes, str] = {}  # requests that waited for their session's worker, while others were free

    def run(self, worker: Endpoint, peer: bytes, message: Message) -> None:
        """RUN goes out."""
        broker, header = self._world.broker, message.header
        key = (header.request, header.attempt, broker.born)
        if key in self._known:
            return
        self._known.add(key)
        call = self._world.promise.calls[header.request]
        call.dealt = self._world.clock.now
        prefix = len(message.tokens) // 4
        self._world.story.tell(broker, f"{call} attempt {header.attempt} → {worker}, prefix {prefix}")
        run = codec.unpack(Run, message.route)
        self._world.promise.engines.given(call, run)
        tables = broker.core.tables
        place = tables.pool.workers.get(peer)
        if place is None:  # it was lost by the same event that gave it work
            return
        hold(len(place.leases) <= place.slots, "no more than the slots", lambda: f"{call} → {worker}")
        self._in_time(call, run)
        if self._at.get(call.id) != worker.name:  # who lost an attempt may have the slot of it again, whoever waits
            self._in_turn(call, worker, tables)
        self._at[call.id] = worker.name
        self._at_home(call, worker, header.attempt, tables)

    def _in_time(self, call: Call, run: Run) -> None:
        """A worker is told what is left of the time, give or take how long SUBMIT was under way."""
        left = call.deadline - self._world.clock.now
        promise, latency = self._world.promise, self._world.profile.latency[1]
        what = lambda: f"{call}: {run.timeout:.3f} s, {left:.3f} are left"  # noqa: E731
        hold(run.timeout >= max(left, 0.0) - 1e-6, "a deadline is not moved", what)
        if not promise.hit(call, "freeze", "hold", "clog", "snap client", "kill broker"):
            hold(run.timeout <= max(left, 0.0) + latency + 0.01, "a deadline is not moved", what)

    def _in_turn(self, call: Call, worker: Endpoint, tables: Tables) -> None:
        """Nobody of the same client waits who came before and has no less right.

        Who waits for its session's worker goes first there for a while: slots of others were left for it; who is to run
        alone has a worker emptied for it. And one whose session is not elsewhere may pass one whose is, if it came
        little later.
        """
        mine, one = call.submit, tables.requests.get(call.id)
        if (
            one is None
            or one.alone
            or self._awaited.get(call.id) == worker.name
            or call.attached
            or self._world.clock.now < self._world.broker.born + _RECOVERY
        ):
            return
        for other in tables.queues.of_model(mine.model):
            theirs = self._world.promise.calls[other.id]
            it = theirs.submit
            if (
                theirs.client is not call.client
                or it.adapter != mine.adapter
                or theirs is call
                or other.attempt
                or other.awaits
                or other.id in self._awaited
                or theirs.attached
            ):
                continue
            behind = other.rank[0] - one.rank[0]
            waited = self._world.clock.now - one.arrived
            elsewhere = other.home not in ("", worker.name) and one.home in ("", worker.name) and behind <= _PASSED
            if elsewhere or (one.home == worker.name and waited <= _PASSED):
                continue
            before = other.arrived < one.arrived
            right = it.priority >= mine.priority and it.continues >= mine.continues
            more = it.priority > mine.priority or it.continues > mine.continues
            same = other.arrived == one.arrived
            hold(
                not (right and (before or (same and more))),
                "nobody overtakes without a right",
                lambda: (
                    f"{call} ({mine.priority}, {mine.continues}) goes before {theirs} ({it.priority}, {it.continues})"
                ),
            )

    def _at_home(self, call: Call, worker: Endpoint, attempt: int, tables: Tables) -> None:
        """A session goes on where it was if there is a free slot."""
        session = call.submit.session
        if session is None:
            return
        key = (call.client.name, session, call.submit.model)
        home, since = self._home.get(key, ("", -1.0))
        if home and home != worker.name and attempt == 1 and since >= self._world.broker.born:
            asked = call.submit.model, call.submit.adapter
            free = [w for w in tables.pool.workers.values() if w.name == home and w.free > 0 and w.serves(*asked)]
            hold(
                not free,
                "a session stays where its state is",
                lambda: f"{call} goes to {worker}, {home} has a free slot",
            )
        self._home[key] = (worker.name, self._world.clock.now)

    def over(self, owner: Endpoint, request: bytes) -> None:
        """A terminal goes out: it takes a moment, and does not count again when it is repeated."""
        call = self._world.promise.calls.get(request)
        key = (request, 0, self._world.broker.born)
        if call is not None and call.client is owner and key not in self._known:
            self._known.add(key)
            call.dealt = self._world.clock.now

    def claimed(self, request: bytes) -> None:
        """A worker goes on with what it has: its session may be there from now on, or where it was given since."""
        call = self._world.promise.calls[request]
        self._home.pop((call.client.name, call.submit.session or "", call.submit.model), None)

    def accepted(self, message: Message) -> None:
        """ACCEPTED goes out, with a place in the queue: behind those of its client, before the last of all."""
        tables, header = self._world.broker.core.tables, message.header
        request = tables.requests[header.request]
        lane = [r for r in tables.queues.of_model(request.submit.model) if r.lane == request.lane]
        own = [r for r in lane if r.client is request.client]
        first, last = (own.index(request) + 1, len(lane)) if request in own else (0, 0)
        if request.awaits:
            self._awaited[request.id] = request.awaits
        in_place = request.alone or request.awaits or first <= header.arg <= last
        hold(in_place, "ACCEPTED has the place in the queue", lambda: f"{header}, expected {first} to {last}")

    def refused(self, owner: Endpoint, peer: bytes, message: Message) -> None:
        """ERROR goes out; one for want of room only where there is none."""
        failure = codec.unpack(Failure, message.body, codec.BODY_LIMITS)
        call = self._world.promise.calls.get(message.header.request)
        if failure.code != "overloaded" or call is None or call.client is not owner or not call.submit.wait:
            return
        tables = self._world.broker.core.tables
        limits, admission, size = tables.config.limits, tables.admission, len(call.body) + 4 * message.header.seq
        account = tables.clients.by_peer[peer].principal
        known = account.known - 4 * limits.client_queued
        many = account.queued >= limits.client_queued or known >= 0 or admission.queued >= limits.queued
        full = known >= limits.queued if call.attached else many
        heavy = admission.held + size > limits.held or account.held + size > limits.client_held
        hold(
            full or heavy or (admission.output > limits.output and not call.attached),
            "refused only where there is no room",
            lambda: f"{call}: {failure}",
        )
        hold(
            failure.retry_after is not None and failure.retryable,
            "a refusal says when to come back",
            lambda: f"{failure}",
        )

    def forget(self, client: str, session: str) -> None:
        """A session is done."""
        for key in [k for k in self._home if k[:2] == (client, session)]:
            del self._home[key]
