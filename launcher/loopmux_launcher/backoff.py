"""When to start a crashed process again, and when to give up."""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_DELAY = 0.5
"""Seconds before the first restart: a single crash costs little, a peer may already have taken over."""
LONGEST_DELAY = 30.0
"""Seconds; someone who repairs the cause should not wait longer for the next try."""
_DOUBLINGS = 10
"""More than it takes to the longest; a power of 2 must not overflow, however often a process crashes."""
CRASHES = 5
WINDOW = 60.0
"""How many crashes are a crash loop; of a process that was ready, within these seconds."""


@dataclass(slots=True)
class Backoff:
    """The crashes of one process.

    A crash loop is ``CRASHES`` starts in a row that never got ready, however long each took. A process that was ready
    is started again, ever later: what ended it may have been asked of it, by somebody who asks a few times.

    Attributes:
        eager: everybody waits for this process, and no peer takes over: its first restart comes at once, and as many
            exits within ``WINDOW`` seconds are a crash loop, too.
    """

    eager: bool = False
    recent: list[float] = field(default_factory=list)
    failed_starts: int = 0
    streak: int = 0

    def got_ready(self) -> None:
        """The process works: failed starts before this one are forgiven."""
        self.failed_starts = 0

    def crashed(self, now: float, *, was_ready: bool, ran: float, draw: float) -> float | None:
        """Note an exit; the seconds to wait before the next start, or None for a crash loop.

        Args:
            ran: seconds that the process lived; longer than ``WINDOW`` starts the delays from the beginning.
            draw: a random number in [0, 1): half of the delay is jitter, so that workers do not start in step.
        """
        self.recent = [then for then in self.recent if now - then < WINDOW] + [now]
        self.failed_starts = 0 if was_ready else self.failed_starts + 1
        self.streak = 1 if was_ready and ran > WINDOW else self.streak + 1
        if self.failed_starts >= CRASHES or (self.eager and len(self.recent) >= CRASHES):
            return None
        if self.eager and self.streak == 1:
            return 0.0
        doublings = min(self.streak - 1, _DOUBLINGS)
        return min(LONGEST_DELAY, FIRST_DELAY * 2.0**doublings) * (0.5 + draw / 2)
