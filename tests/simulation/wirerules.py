"""The rules of docs/protocol.md that show on the wire, whatever becomes of the requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from loopmux import codec, wire
from loopmux.messages import Failure, Run
from loopmux.wire import Kind, Message
from simulation.broken import hold

if TYPE_CHECKING:
    from simulation.process import Endpoint
    from simulation.worker import WorkerProcess
    from simulation.world import World

SOONEST, FULL = 0.02, 8
"""A worker sends a TOK per stream every 20 ms, or of 8 tokens, and the first one at once."""


@dataclass
class _Stream:
    """What a worker has said of one attempt."""

    began: float
    toks: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    end: int | None = None
    last: float = -1.0
    hasty: float | None = None
    terminal: tuple[Kind, int] | None = None
    acknowledged: int = 0


class WorkerTalk:
    """Workers: output in order, as it first was whenever it comes again, nothing new after the terminal."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._welcomed: dict[WorkerProcess, float] = {}
        self._streams: WeakKeyDictionary[WorkerProcess, dict[tuple[bytes, int], _Stream]] = WeakKeyDictionary()

    def welcomed(self, worker: WorkerProcess) -> None:
        """What was kept while the broker was away goes out now, all at once."""
        self._welcomed[worker] = self._world.clock.now

    def acknowledged(self, worker: WorkerProcess, header: wire.Header) -> None:
        """TOKACK came."""
        stream = self._streams.get(worker, {}).get((header.request, header.attempt))
        if stream is not None:
            stream.acknowledged = max(stream.acknowledged, header.arg)

    def _let_go(self, stream: _Stream, header: wire.Header, what: str) -> None:
        """Where nothing stands in the way, a worker keeps little more than a window of output."""
        promise, profile = self._world.promise, self._world.profile
        call = promise.calls.get(header.request)
        if call is None or call.slow or promise.hit(call, "") or stream.began < call.submitted:
            return
        most = 2 * profile.config.window + FULL + 10 * profile.rate * (profile.latency[1] + 0.01)
        kept = header.seq - max(stream.acknowledged, 0)
        hold(kept <= most, "acknowledgements are passed on", lambda: f"{what}, {stream.acknowledged} acknowledged")

    def begins(self, worker: WorkerProcess, key: tuple[bytes, int]) -> None:
        """An attempt starts; after a restart of the broker its number may have been used before."""
        self._streams.setdefault(worker, {})[key] = _Stream(self._world.clock.now)

    def said(self, worker: WorkerProcess, message: Message) -> None:
        header = message.header
        if header.kind is not Kind.TOK and header.kind not in wire.TERMINALS:
            return
        streams = self._streams.setdefault(worker, {})
        stream = streams.setdefault((header.request, header.attempt), _Stream(-1.0))
        name = self._world.story.names.get(header.request, "?")
        if header.kind is Kind.TOK:
            self._tok(stream, message, f"{worker}, {name}: {header}")
            if self._welcomed.get(worker) == self._world.clock.now:
                stream.hasty, stream.last = None, -1.0
        else:
            self._terminal(stream, message, f"{worker}, {name}: {header}")

    def _tok(self, stream: _Stream, message: Message, what: str) -> None:
        header, now = message.header, self._world.clock.now
        hold(stream.hasty is None, "a worker gathers tokens", what)
        said = (header.arg, message.body + message.tokens)
        if header.seq in stream.toks:
            hold(stream.toks[header.seq] == said, "a TOK is resent as it first was", what)
            return
        hold(stream.end in (None, header.seq), "a worker's output has no gap", what)
        hold(stream.terminal is None, "P2 nothing new follows a terminal", what)
        self._let_go(stream, header, what)
        if stream.end is not None and header.arg < FULL and now - stream.last < SOONEST - 1e-6:
            stream.hasty = now
        stream.toks[header.seq], stream.end, stream.last = said, header.seq + header.arg, now

    def _terminal(self, stream: _Stream, message: Message, what: str) -> None:
        header = message.header
        hold(stream.hasty in (None, self._world.clock.now), "a worker gathers tokens", what)
        stream.hasty = None
        said = (header.kind, header.seq)
        if stream.end is not None and stream.terminal is None:
            hold(header.seq == stream.end or header.kind is Kind.CANCELLED, "a terminal has the total", what)
        stream.terminal = said


class Dispatches:
    """The broker: who is given a slot, and which."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: set[tuple[bytes, int, float]] = set()
        self._home: dict[tuple[str, str, str], tuple[str, float]] = {}

    def run(self, worker: Endpoint, message: Message) -> None:
        """RUN goes out."""
        broker, header = self._world.broker, message.header
        key = (header.request, header.attempt, broker.born)
        if key in self._known:
            return
        self._known.add(key)
        call = self._world.promise.calls[header.request]
        self._world.story.tell(broker, f"{call} attempt {header.attempt} → {worker}, prefix {len(message.tokens) // 4}")
        tables = broker.core.tables
        self._in_time(call, codec.unpack(Run, message.route))
        self._in_turn(call, tables)
        self._at_home(call, worker, header.attempt, tables)

    def _in_time(self, call, run: Run) -> None:
        """A worker is told what is left of the time, give or take how long SUBMIT was under way."""
        left = call.deadline - self._world.clock.now
        promise, latency = self._world.promise, self._world.profile.latency[1]
        what = lambda: f"{call}: {run.timeout:.3f} s, {left:.3f} are left"  # noqa: E731
        hold(run.timeout >= max(left, 0.0) - 1e-6, "a deadline is not moved", what)
        if not promise.hit(call, "freeze", "hold", "clog", "snap client", "kill broker"):
            hold(run.timeout <= max(left, 0.0) + latency + 0.01, "a deadline is not moved", what)

    def _in_turn(self, call, tables) -> None:
        """Nobody of the same client waits who came before and has no less right."""
        mine = call.submit
        for other in tables.queues.of_model(mine.model):
            theirs = self._world.promise.calls[other.id]
            it = theirs.submit
            if theirs.client is not call.client or it.adapter != mine.adapter or theirs is call or other.attempt:
                continue
            before = other.arrived < tables.requests[call.id].arrived
            right = it.priority >= mine.priority and it.continues >= mine.continues
            more = it.priority > mine.priority or it.continues > mine.continues
            same = other.arrived == tables.requests[call.id].arrived
            hold(
                not (right and (before or (same and more))),
                "nobody overtakes without a right",
                lambda: f"{call} ({mine.priority}, {mine.continues}) goes before {theirs} ({it.priority}, {it.continues})",
            )

    def _at_home(self, call, worker: Endpoint, attempt: int, tables) -> None:
        """A session goes on where it was if there is a free slot."""
        session = call.submit.session
        if session is None:
            return
        key = (call.client.name, session, call.submit.model)
        home, since = self._home.get(key, ("", -1.0))
        if home and home != worker.name and attempt == 1 and since >= self._world.broker.born:
            free = [w for w in tables.pool.workers.values() if w.name == home and w.free > 0]
            hold(not free, "a session stays where its state is", lambda: f"{call} goes to {worker}, {home} has a free slot")
        self._home[key] = (worker.name, self._world.clock.now)

    def accepted(self, message: Message) -> None:
        """ACCEPTED goes out, with a place in the queue."""
        tables, header = self._world.broker.core.tables, message.header
        queue = [r for r in tables.queues.of_model(tables.requests[header.request].submit.model)]
        lane = [r.id for r in queue if r.lane == tables.requests[header.request].lane]
        place = lane.index(header.request) + 1 if header.request in lane else 0
        hold(header.arg == place, "ACCEPTED has the place in the queue", lambda: f"{header}, expected {place}")

    def refused(self, owner: Endpoint, message: Message) -> None:
        """ERROR goes out; one for want of room only where there is none."""
        failure = codec.unpack(Failure, message.body, codec.BODY_LIMITS)
        call = self._world.promise.calls.get(message.header.request)
        if failure.code != "overloaded" or call is None or call.client is not owner or not call.submit.wait:
            return
        tables = self._world.broker.core.tables
        limits, admission, size = tables.config.limits, tables.admission, len(call.body)
        client = tables.clients.by_peer[owner.line.peer]
        full = admission.queued >= limits.queued or client.queued >= limits.client_queued
        heavy = admission.held + size > limits.held or client.held + size > limits.client_held
        hold(full or heavy or admission.output > limits.output, "refused only where there is no room", lambda: f"{call}: {failure}")
        hold(failure.retry_after is not None and failure.retryable, "a refusal says when to come back", lambda: f"{failure}")

    def forget(self, client: str, session: str) -> None:
        """A session is done."""
        for key in [k for k in self._home if k[:2] == (client, session)]:
            del self._home[key]
