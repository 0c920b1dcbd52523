"""What workers say: output in order, as it first was whenever it comes again, nothing new after the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loopmux import wire
from loopmux.wire import Kind, Message
from simulation.broken import hold

if TYPE_CHECKING:
    from simulation.worker import WorkerProcess
    from simulation.world import World

SOONEST, FULL = 0.02, 8
"""A worker sends a TOK per stream every 20 ms, or of 8 tokens, and the first one at once."""

_NEAR = 0.01
"""Seconds under way; where it takes longer, a window of credit holds a stream back."""


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
    stopped: bool = False


class WorkerTalk:
    """Workers: output in order, as it first was whenever it comes again, nothing new after the terminal."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked: dict[WorkerProcess, float] = {}
        self._streams: dict[WorkerProcess, dict[tuple[bytes, int], _Stream]] = {}

    def asked(self, worker: WorkerProcess) -> None:
        """What was kept goes out now, all at once."""
        self._asked[worker] = self._world.clock.now

    def acknowledged(self, worker: WorkerProcess, header: wire.Header) -> None:
        """TOKACK came."""
        stream = self._streams.get(worker, {}).get((header.request, header.attempt))
        if stream is not None:
            stream.acknowledged = max(stream.acknowledged, header.arg)

    def stopped(self, worker: WorkerProcess, header: wire.Header) -> None:
        """STOP came: nobody wants what may still be said."""
        stream = self._streams.get(worker, {}).get((header.request, header.attempt))
        if stream is not None:
            stream.stopped = True

    def _let_go(self, stream: _Stream, header: wire.Header, what: str) -> None:
        """Where nothing stands in the way, a worker keeps little more than a window of output."""
        promise, profile = self._world.promise, self._world.profile
        call = promise.calls.get(header.request)
        far = profile.latency[1] > _NEAR
        if far or call is None or call.slow or promise.hit(call, "") or stream.began < call.submitted:
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
            if self._asked.get(worker) == self._world.clock.now:
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
        in_order = stream.end in (None, header.seq) or stream.stopped
        hold(in_order, "a worker's output has no gap", lambda: f"{what}, said until {stream.end}")
        # Of one that was stopped the end is said without the rest, which follows where the client comes back for it.
        rest = stream.terminal and stream.stopped and header.seq + header.arg <= stream.terminal[1]
        hold(stream.terminal is None or rest, "P2 nothing new follows a terminal", what)
        self._let_go(stream, header, what)
        if stream.end is not None and header.arg < FULL and now - stream.last < SOONEST - 1e-6:
            stream.hasty = now
        stream.toks[header.seq], stream.end, stream.last = said, header.seq + header.arg, now

    def _terminal(self, stream: _Stream, message: Message, what: str) -> None:
        header = message.header
        hold(stream.hasty in (None, self._world.clock.now), "a worker gathers tokens", what)
        stream.hasty = None
        said = (header.kind, header.seq)
        if stream.end is not None and stream.terminal is None and header.kind is not Kind.CANCELLED:
            calm = not self._world.promise.hit(self._world.promise.calls[header.request], "")
            # What is kept for a broker that was away is left out when it wants no more of it.
            hold(header.seq == stream.end or (header.seq > stream.end and not calm), "a terminal has the total", what)
        stream.terminal = said
