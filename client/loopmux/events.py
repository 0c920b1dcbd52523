"""What happens to a client's connection and its requests (events), and what there is to do about it (actions).

Shared by the two pure cores, ``stream`` (one request) and ``connection`` (all requests of a client), and by the two
shells, ``pump`` (a thread) and ``aiodriver``.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopmux.errors import LoopmuxError
from loopmux.messages import Done, SessionHint, Status, Submit
from loopmux.results import Result, StreamEvent
from loopmux.wire import Kind, Message


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks. ``deadline`` is on the clock that ``now`` comes from; with ``collect`` nobody reads along."""

    id: bytes
    submit: Submit
    body: bytes
    deadline: float
    idle_timeout: float | None = None
    collect: bool = False


# --- events of one request --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attached:
    """A broker that may be sent to is there; ``fresh`` if it is a new process that knows nothing of the request."""

    window: int
    max_body: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Detached:
    """The broker is away."""


@dataclass(frozen=True, slots=True)
class Refused:
    """There will be no broker for this request."""

    error: LoopmuxError


@dataclass(slots=True)
class Arrived:
    """A message of this request came."""

    message: Message


@dataclass(frozen=True, slots=True)
class Ponged:
    """The broker answered a PING: a moment to repeat what may have been lost."""


@dataclass(frozen=True, slots=True)
class Consumed:
    """The reader has taken a ``Deliver`` that was to be reported: it has ``total`` tokens now."""

    request: bytes
    total: int


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The caller wants the request to end, or waits no longer for the answer to the question of this id."""

    request: bytes


@dataclass(frozen=True, slots=True)
class TimePassed:
    """A timer is due."""


RequestEvent = Attached | Detached | Refused | Arrived | Ponged | Consumed | CancelAsked | TimePassed

# --- events of the connection -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    """A caller made a request."""

    request: Request

    @property
    def id(self) -> bytes:
        """The request's, as ``Asked`` has its own."""
        return self.request.id


@dataclass(frozen=True, slots=True)
class Asked:
    """A caller wants the broker's status, adapters loaded or unloaded, or a worker to leave (``kind`` and ``route``).

    ``id`` is the question's own, ``deadline`` when it stops waiting for a broker, ``patience`` the seconds that one
    that is there gets for the answer, where it takes longer.
    """

    id: bytes
    deadline: float
    kind: Kind = Kind.STATUS
    route: bytes = b""
    patience: float = 0.0


@dataclass(frozen=True, slots=True)
class Hinted:
    """A tool loop says when its session comes back."""

    hint: SessionHint


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The socket's connection was closed: whatever was sent and not answered may be lost."""


@dataclass(frozen=True, slots=True)
class Barred:
    """The broker will not have this client, by its key or for the want of one; why is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Connected:
    """The socket has a connection, perhaps to another process than before."""


@dataclass(slots=True)
class Received:
    """A message came from the socket, unchecked."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Closed:
    """The caller is done with this connection."""


ConnectionEvent = (
    Submitted
    | Asked
    | Hinted
    | Received
    | Connected
    | Disconnected
    | Barred
    | Closed
    | Consumed
    | CancelAsked
    | TimePassed
)

# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Send:
    """Send this to the broker."""

    message: Message


@dataclass(slots=True)
class Deliver:
    """Hand the event to the reader. ``report`` is the total to answer with in ``Consumed``, or 0 for no answer."""

    request: bytes
    event: StreamEvent
    report: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """The outcome: a result."""

    request: bytes
    result: Result


@dataclass(frozen=True, slots=True)
class Fail:
    """The outcome: an error."""

    request: bytes
    error: LoopmuxError


RequestAction = Send | Deliver | Finish | Fail


@dataclass(frozen=True, slots=True)
class Introduce:
    """Send this, and throw away what could not be sent before: it was meant for a connection that is gone."""

    message: Message


@dataclass(frozen=True, slots=True)
class Answer:
    """The broker's answer to ``Asked``."""

    id: bytes
    status: Status | Done


Action = Send | Introduce | Deliver | Finish | Fail | Answer
