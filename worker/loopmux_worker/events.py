"""What a worker's session is told and what it asks for. Pure data; ``session`` turns the first into the second."""

from __future__ import annotations

from dataclasses import dataclass

from loopmux.errors import LoopmuxError
from loopmux.messages import AdapterOrder, SessionHint
from loopmux.results import Usage
from loopmux.wire import Message
from loopmux_worker.engine.base import Description, Job, Key, Load, Output

STOP_WITHIN = 1.5
"""Seconds in which a worker leaves that is asked to (SIGTERM): nobody likes to wait for a program to end."""

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Received:
    """A well-formed message came from the broker."""

    message: Message


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection to the broker stands."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection to the broker broke; another one is being made."""


@dataclass(slots=True)
class Stepped:
    """The engine made a step, or took a request in that it refused."""

    outputs: tuple[Output, ...]
    load: Load


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The engine forgot a request; None if it had ended already."""

    key: Key
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Adapted:
    """The engine has loaded or unloaded an adapter, and is what ``description`` says; or could not, for ``error``."""

    id: bytes
    order: AdapterOrder
    description: Description | None
    error: LoopmuxError | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody asked this process to end within so many seconds.

    Half of them is for what runs to end here, the rest for it to go on elsewhere.
    """

    within: float = STOP_WITHIN


@dataclass(frozen=True, slots=True)
class Woke:
    """``next_timer`` was reached."""


Event = Received | Connected | Disconnected | Stepped | Cancelled | Adapted | Asked | Woke

# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Send:
    """Send a message. One that is not ``lasting`` is dropped where it cannot go out now: it comes again by itself."""

    message: Message
    lasting: bool = True


@dataclass(frozen=True, slots=True)
class Unsend:
    """Drop the messages that wait to go out: they belong to a connection that is gone."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Hand a request to the engine."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Have the engine forget a request; answered by ``Cancelled``."""

    key: Key


@dataclass(frozen=True, slots=True)
class Hint:
    """Tell the engine whether a session comes back."""

    hint: SessionHint


@dataclass(frozen=True, slots=True)
class Adapt:
    """Have the engine load an adapter (or unload it) between two steps; answered by ``Adapted``."""

    id: bytes
    order: AdapterOrder
    load: bool


@dataclass(frozen=True, slots=True)
class Leave:
    """End this process; ``error``: for that reason, the broker will not have it."""

    error: LoopmuxError | None = None


Action = Send | Unsend | Submit | Cancel | Hint | Adapt | Leave
