"""Peers that send what is no message: after a few strikes within a while they are not listened to for a while."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from loopmux_broker.events import Peer

LIMIT = 3
"""Strikes within the window that are too many."""
WINDOW = 60.0
"""Seconds for which a strike counts, and for which a peer is ignored."""


@dataclass(slots=True)
class Record:
    """One connection's strikes (times), and until when it is ignored."""

    times: deque[float] = field(default_factory=lambda: deque(maxlen=LIMIT))
    ignored_until: float = 0.0


class Strikes:
    """Strikes by connection."""

    def __init__(self) -> None:
        self.records: dict[Peer, Record] = {}

    def strike(self, peer: Peer, now: float) -> bool:
        """Count a strike; true when it was one too many and the peer is ignored from now on."""
        record = self.records.setdefault(peer, Record())
        record.times.append(now)
        out = len(record.times) == LIMIT and now - record.times[0] <= WINDOW
        if out:
            record.ignored_until = now + WINDOW
            record.times.clear()
        return out

    def ignored(self, peer: Peer, now: float) -> bool:
        """Whether nothing that the peer says counts."""
        record = self.records.get(peer)
        return record is not None and now < record.ignored_until

    def forget(self, peer: Peer) -> None:
        """The connection is gone."""
        self.records.pop(peer, None)

    def expired(self, peer: Peer, now: float) -> bool:
        """Forget the peer's record if nothing in it counts any more."""
        record = self.records.get(peer)
        if record is None:
            return True
        if now < record.ignored_until or (record.times and now - record.times[-1] < WINDOW):
            return False
        del self.records[peer]
        return True
