"""What the broker knows, in one place, for the parts of its core to share."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum

from loopmux.cadence import SILENT_HEARTBEATS
from loopmux_broker.admission import Admission
from loopmux_broker.clients import Clients
from loopmux_broker.config import BrokerConfig
from loopmux_broker.dispatch import Affinity
from loopmux_broker.events import Action, Log, Peer
from loopmux_broker.pool import Pool, Worker
from loopmux_broker.queues import Queues
from loopmux_broker.requests import Request
from loopmux_broker.strikes import Strikes
from loopmux_broker.timers import Timers

SLICE = 64
"""Requests that are dealt with in one go. There may be 10 000 of one model or client; all at once would hold everybody
else up."""
PAUSE = 0.001
"""Seconds between two of these, for others to be heard."""
PLENTY = 4 * SLICE
"""Actions, or requests dealt with, after which the rest of what one event brings has time until the next turn."""
_ABANDONED = 10_000
"""Requests of lost clients whose last attempts are remembered, the longest forgotten first."""


class Alarm(IntEnum):
    """What a timer is for; the rest of its key says whose it is."""

    CLIENT_SILENT = 1  # peer
    CLIENT_GRACE = 2  # instance
    CLIENT_BLOCKED = 3  # instance
    MEMBER_SILENT = 4  # peer
    RUN = 5  # request, attempt
    STOP = 6  # request, attempt
    DEADLINE = 7  # request
    TERMINAL = 8  # request
    TOMBSTONE = 9  # request
    STRIKES = 10  # peer
    LAUNCHER = 11  # name
    SETTLED = 12  # nobody
    RECOVERY = 13  # request
    HELD = 14  # peer
    STALL = 15  # peer
    DRAIN = 16  # peer
    ROUND = 17  # model
    HOME = 18  # request
    ADAPTER = 19  # operation
    CLIENT_LOST = 20  # instance
    MISSED = 21  # model


LIVENESS = frozenset(
    {
        Alarm.CLIENT_SILENT,
        Alarm.CLIENT_GRACE,
        Alarm.MEMBER_SILENT,
        Alarm.RUN,
        Alarm.HELD,
        Alarm.LAUNCHER,
        Alarm.RECOVERY,
        Alarm.SETTLED,
        Alarm.MISSED,
        Alarm.STALL,
    }
)
"""Timers that judge a peer by its silence, and so must not count the time that the broker itself was away."""

TimerKey = tuple[Alarm, bytes | str, int]
"""(what for, whose, attempt or 0)."""


@dataclass(slots=True)
class Identity:
    """Which broker process this is: told in WELCOME and REPORT."""

    epoch: bytes
    pid: int
    software: str
    started: float


@dataclass(slots=True)
class Tables:
    """The broker's whole state. ``out`` collects the actions of the event that is being handled."""

    config: BrokerConfig
    identity: Identity
    queues: Queues
    admission: Admission
    clients: Clients
    pool: Pool = field(default_factory=Pool)
    requests: dict[bytes, Request] = field(default_factory=dict)
    affinity: Affinity = field(default_factory=Affinity)
    strikes: Strikes = field(default_factory=Strikes)
    timers: Timers[TimerKey] = field(default_factory=Timers)
    settled: bool = False
    """Whether whoever belongs to this broker has had the time to join."""
    missed: dict[str, float] = field(default_factory=dict)
    """Models that no launcher declares and whose last worker was lost a moment ago, or only its connection: when."""
    rivals: dict[Peer, float] = field(default_factory=dict)
    pardoned: set[Peer] = field(default_factory=set)
    """The connections that stood when the broker itself was away, but those that have shown since that they still do:
    their ends may have closed them for its silence."""
    back_at: float = -math.inf
    """When the broker was away last: for three heartbeats, a closed connection of these is no news about its end."""
    abandoned: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    """The last attempts of requests whose client was given up: if it comes with them again, their numbers go on, since
    a worker may still say something of the former ones."""
    vacant: dict[Worker, None] = field(default_factory=dict)
    """Workers that may have got a free slot by the event that is being handled."""
    cold: set[str] = field(default_factory=set)
    """Models without a worker that somebody has begun to wait for in the event that is being handled."""
    counters: Counter[str] = field(default_factory=Counter)
    traced: bool = False
    """Whether the log tells what becomes of each request. Who tells it asks first: words for nobody cost as much."""
    out: list[Action] = field(default_factory=list)

    @classmethod
    def empty(cls, config: BrokerConfig, identity: Identity) -> Tables:
        """The state of a broker that has just started."""
        pool = Pool()
        queues = Queues(config.head_start, pool.knows)
        return cls(config, identity, queues, Admission(config.limits), Clients(config.weights), pool)

    def joined(self, model: str) -> bool:
        """Whether whoever serves or declares a model has joined, if anybody does."""
        return self.settled and model not in self.missed

    def enqueue(self, request: Request) -> None:
        """A request waits for a slot."""
        request.home = "" if request.attempt else self.affinity.last(request) or ""
        self.queues.push(request)
        if self.queues.waiting(request.submit.model) == 1 and not self.pool.serves(request.submit.model):
            self.cold.add(request.submit.model)
        self.admission.queue(request.client.principal, 1)

    def dequeue(self, request: Request) -> None:
        """It waits no longer. A worker that was being emptied for it is there for others again."""
        self.queues.remove(request)
        self.admission.queue(request.client.principal, -1)
        if request.awaits:
            request.awaits = ""
            self.timers.cancel((Alarm.HOME, request.id, 0))
        if request.held_by is not None:
            request.held_by.held_for = None
            self.vacant[request.held_by] = None
            request.held_by = None

    def abandon(self, request: Request) -> None:
        """Nobody waits for a request any more; remember the number of its last attempt."""
        if request.attempt:
            self.abandoned[request.id] = request.attempt
            if len(self.abandoned) > _ABANDONED:
                self.abandoned.popitem(last=False)

    def trace(self, event: str, request_id: bytes, **fields: object) -> None:
        """Log one step of a request's life."""
        self.out.append(Log("debug", event, {"request": request_id.hex(), **fields}))

    @property
    def patience(self) -> float:
        """Seconds of silence after which a peer is lost."""
        return SILENT_HEARTBEATS * self.config.heartbeat
