"""What is let in: limits by number and bytes, in all and per client, refused at once with a time to come back.

All clients with one key are one here.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopmux_broker.clients import Principal

MIB = 1024 * 1024
_SHORTEST, _LONGEST = 0.1, 30.0
"""Bounds of ``retry_after``, seconds: sooner is a hammer, later leaves a freed queue empty."""
_KNOWN = 4
"""Times ``client_queued``: requests of one client that the broker knows, with those that run and those that ended and
are not acknowledged, when it queues another one."""
_MEMORY = 0.1
"""Weight of the newest interval in the running mean between two ends: about the last ten count."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait or be held.

    Attributes:
        queued, client_queued: requests waiting for a slot, in all and per client.
        held, client_held: bytes of request bodies of live requests, in all and per client.
        output: bytes of output that clients have not acknowledged, in all.
    """

    queued: int = 10_000
    client_queued: int = 2_000
    held: int = 512 * MIB
    client_held: int = 128 * MIB
    output: int = 512 * MIB


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in, and when to try again (seconds)."""

    reason: str
    retry_after: float


class Admission:
    """Counts what is held, and refuses what would exceed the limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.queued = 0
        self.held = 0
        self.output = 0
        self._interval = 0.0
        self._last_end: float | None = None

    def refusal(self, principal: Principal, size: int, *, queues: bool, returning: bool = False) -> Refusal | None:
        """Whether a request of ``size`` bytes is refused; ``queues`` when no slot is free for it.

        One that is ``returning`` was let in before, and so were those that had slots then and are queued now: only the
        sum of both is limited. What others have not read does not keep it out.
        """
        crowded = self._many(principal) if returning else self.full(principal) if queues else ""
        reason = crowded or self._heavy(principal, size) or ("" if returning else self._unread())
        return Refusal(reason, self.retry_after()) if reason else None

    def full(self, principal: Principal) -> str:
        """Why no request of a client may be queued now; empty if one may."""
        limits, known = self.limits, principal.known
        if self.queued >= limits.queued:
            return f"{self.queued} requests are queued, the most allowed"
        if principal.queued >= limits.client_queued:
            return f"{principal.queued} requests of {principal.who} are queued, the most allowed for one client"
        if known >= _KNOWN * limits.client_queued:
            found = f"{known} requests of {principal.who} are queued, run or wait for ENDACK"
            return f"{found}, the most allowed for one client"
        return ""

    def _many(self, principal: Principal) -> str:
        known = principal.known
        if known >= self.limits.queued + _KNOWN * self.limits.client_queued:
            return f"{known} requests of {principal.who} are back, the most allowed for one client"
        return ""

    def _heavy(self, principal: Principal, size: int) -> str:
        limits = self.limits
        if self.held + size > limits.held:
            return f"{self.held} bytes of requests are held and this one has {size}, {limits.held} are allowed"
        if principal.held + size > limits.client_held:
            held, allowed = principal.held, limits.client_held
            return (
                f"{held} bytes of requests of {principal.who} are held and this one has {size}, {allowed} are allowed"
            )
        return ""

    def _unread(self) -> str:
        if self.output > self.limits.output:
            return f"{self.output} bytes of output wait for clients to read them, {self.limits.output} are allowed"
        return ""

    def retry_after(self) -> float:
        """How long until a tenth of the queue has been served, at the pace of the last ends."""
        return min(max(self._interval * self.queued / 10, _SHORTEST), _LONGEST)

    def admit(self, principal: Principal, size: int) -> None:
        """A request of ``size`` bytes is held from now on."""
        self.held += size
        principal.held += size

    def ended(self, principal: Principal, size: int, now: float) -> None:
        """A request ended and its body is let go."""
        self.held -= size
        principal.held -= size
        if self._last_end is not None:
            self._interval += _MEMORY * (now - self._last_end - self._interval)
        self._last_end = now

    def queue(self, principal: Principal, by: int) -> None:
        """``by`` (1 or -1) requests wait more than before."""
        self.queued += by
        principal.queued += by
