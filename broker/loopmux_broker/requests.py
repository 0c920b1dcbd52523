"""Requests and their states.

::

                 ┌──────────requeued───────────┬──────────────────┐
                 ▼                             │                  │
    SUBMIT ──▶ QUEUED ──dispatched──▶ DISPATCHED ──started──▶ RUNNING ──ended──▶ DONE ──▶ forgotten
                 ▲  └────────────────claimed───────────────────▶ ▲
    ATTACH ──▶ RECOVERING ──────────────claimed──────────────────┘
               (every state but DONE ──ended──▶ DONE)

A request that is queued again has a prefix, the tokens that it has produced: another worker goes on behind them.
RECOVERING is what a broker that was started again hears of from the client alone (ATTACH) or the worker alone (HELD),
until the other one speaks up. DONE is a tombstone: it is kept until the client acknowledges the terminal, at most 60 s.
DETACHED is no state of its own but a request of whatever state whose client has no connection: it goes on as before
when the client is back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from loopmux.messages import Submit
from loopmux_broker.events import Peer
from loopmux_broker.output import Output

if TYPE_CHECKING:
    from loopmux_broker.clients import Client
    from loopmux_broker.pool import Lease, Worker

Lane = tuple[str, str | None, str | None]
"""Model id, adapter, fingerprint: requests that the same workers can run."""


class State(IntEnum):
    """Where a request is in its life (IntEnum: hashed in C)."""

    QUEUED = 1
    DISPATCHED = 2
    RUNNING = 3
    DONE = 4
    RECOVERING = 5


class Step(IntEnum):
    """What moves a request from one state to the next."""

    DISPATCHED = 1
    STARTED = 2
    REQUEUED = 3
    ENDED = 4
    CLAIMED = 5


TRANSITIONS: dict[State, dict[Step, State]] = {
    State.QUEUED: {Step.DISPATCHED: State.DISPATCHED, Step.CLAIMED: State.RUNNING, Step.ENDED: State.DONE},
    State.DISPATCHED: {Step.STARTED: State.RUNNING, Step.REQUEUED: State.QUEUED, Step.ENDED: State.DONE},
    State.RUNNING: {Step.REQUEUED: State.QUEUED, Step.ENDED: State.DONE},
    State.RECOVERING: {Step.CLAIMED: State.RUNNING, Step.REQUEUED: State.QUEUED, Step.ENDED: State.DONE},
    State.DONE: {},
}
"""Every step that there is; any other is a bug of the broker."""


@dataclass(slots=True, eq=False)
class Request:
    """One request from SUBMIT until it is forgotten.

    Attributes:
        body: BODY of SUBMIT, kept until the end because another attempt needs it.
        charged: tokens that its client was charged for it, ``expected`` of them for what it had not produced then.
        foreseen: tokens of output up to which it was charged.
        brought: bytes of the tokens that its client came back with.
        arrived, deadline: on the broker's clock.
        attempt: number of the last attempt, 0 before the first; never handed out twice, not even by two brokers.
        given: number of the last attempt that this broker gave out, 0 if none.
        lost: attempts that ended because a worker was lost, each with the connection that this one had. After two the
            request runs ``alone``.
        mishaps: attempts that came to nothing by no fault of the request.
        excused: how many of these count no longer, as an attempt behind them brought tokens.
        fingerprint: of the weights that produced its output; it goes on only where they are the same.
        lease: the worker's slot that runs it now.
        avoid: name of the worker that just failed it.
        awaits: name of its session's worker, while it waits for that one alone.
        home: name of its session's worker, while it waits for whichever comes first.
        held_by: the worker that is being emptied to run it alone.
        terminal: its one terminal as it goes over the wire, once DONE.
        told: whether the terminal was pushed on the client's present connection.
        origin: the lease whose worker gave the terminal; None when the broker made it.
    """

    id: bytes
    client: Client
    submit: Submit
    body: bytes
    arrived: float
    deadline: float
    output: Output
    state: State = State.QUEUED
    attempt: int = 0
    given: int = 0
    lost: dict[int, Peer] = field(default_factory=dict)
    mishaps: int = 0
    excused: int = 0
    alone: bool = False
    fingerprint: str | None = None
    charged: int = 0
    expected: int = 0
    foreseen: int = 0
    brought: int = 0
    lease: Lease | None = None
    avoid: str = ""
    awaits: str = ""
    home: str = ""
    held_by: Worker | None = None
    terminal: bytes | None = None
    told: bool = False
    origin: Lease | None = None
    rank: tuple[float, int] = field(default=(0.0, 0))

    def move(self, step: Step) -> None:
        """Go to the next state.

        Raises:
            KeyError: the table has no such step from here.
        """
        self.state = TRANSITIONS[self.state][step]

    @property
    def fruitless(self) -> int:
        """Mishaps since an attempt that brought tokens."""
        return self.mishaps - self.excused

    @property
    def size(self) -> int:
        """Bytes that it was let in with, which are held until its end."""
        return len(self.body) + self.brought

    @property
    def orphan(self) -> bool:
        """Whether a worker has brought it after a restart, and its client has not."""
        return self.state is State.RECOVERING and self.lease is not None

    @property
    def lane(self) -> Lane:
        """The queue it belongs to."""
        return self.submit.model, self.submit.adapter, self.fingerprint
