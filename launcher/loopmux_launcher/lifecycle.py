"""The life of one supervised process, as a pure state machine.

::

    WAITING ─start─▶ STARTING ─ready─▶ READY
                        │ ▲               │ exit
         exit, failed,  │ └──── PAUSING ◀─┤
         start time-out ▼   wake          │
                     ENDING ─exit─▶ PAUSING or PARKED (crash loop, or a bad configuration: it would fail again)

    stop: any of them ─▶ STOPPING ─exit─▶ GONE
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import Enum

from loopmux import exitcodes
from loopmux_launcher.backoff import WINDOW, Backoff

STOP_GRACE = 5.0
"""Seconds between asking a process to end and killing it."""


class State(Enum):
    """Where a process is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ENDING = "ending"
    PAUSING = "pausing"
    PARKED = "parked"
    STOPPING = "stopping"
    GONE = "gone"


@dataclass(slots=True)
class Process:
    """One process that should run. Methods note what happened; their caller carries the consequences out.

    Attributes:
        phase: what it said it is doing while it starts (loading, warming).
        reason: why it last failed, for people.
        explained: the reason is its own word, which the end of its output would only repeat.
        last_lines: the end of its output at its last exit, where that has something to add.
        left_out: models that it could not load, with the reason; it serves the others of its group.
        wake: when ``TimerFired`` should look at it again.
    """

    name: str
    start_timeout: float
    state: State = State.WAITING
    phase: str = "loading"
    detail: str = ""
    reason: str = ""
    explained: bool = False
    last_lines: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    started: float = 0.0
    wake: float | None = None
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def runs(self) -> bool:
        """Whether the operating system has (or is about to have) a process for it."""
        return self.state in (State.STARTING, State.READY, State.ENDING, State.STOPPING)

    def serves(self, model: str) -> bool:
        """Whether it is ready for a model of its group."""
        return self.state is State.READY and model not in self.left_out

    def start(self, now: float) -> None:
        """It is being started."""
        self.state, self.phase, self.detail, self.reason = State.STARTING, "loading", "", ""
        self.started, self.wake, self.left_out, self.explained = now, now + self.start_timeout, {}, False

    def got_ready(self) -> None:
        """It said that it is ready."""
        self.state, self.detail, self.wake = State.READY, "", None
        self.backoff.got_ready()

    def end(self, reason: str, now: float, *, explained: bool = False) -> None:
        """It failed, or took too long; it is asked to end and counts as crashed when it has."""
        self.state, self.reason, self.wake = State.ENDING, reason, now + STOP_GRACE
        self.explained = explained

    def stop(self, now: float) -> None:
        """It is no longer wanted."""
        self.state = State.STOPPING if self.runs else State.GONE
        self.wake = now + STOP_GRACE if self.state is State.STOPPING else None

    def exited(self, code: int, last_lines: tuple[str, ...], now: float, draw: float) -> float | None:
        """It is gone; returns the seconds until its next start, None if there is none (then it is PARKED or GONE)."""
        if self.state is State.STOPPING:
            self.state, self.wake = State.GONE, None
            return None
        was_ready = self.state is State.READY
        self.reason, self.last_lines = self.reason or spell_exit(code), () if self.explained else last_lines
        delay = self.backoff.crashed(now, was_ready=was_ready, ran=now - self.started, draw=draw)
        if code == exitcodes.CONFIG or delay is None:
            self.state, self.wake = State.PARKED, None
            return None
        self.state, self.wake = State.PAUSING, now + delay
        return delay

    def why_parked(self) -> str:
        """Why it will not be started again, in one sentence."""
        crashes = len(self.backoff.recent)
        if crashes > 1:
            times = f"{crashes} times in {WINDOW:.0f} s" if crashes >= self.backoff.failed_starts else "at every start"
            return f"failed {times}, the last time: {self.reason}"
        return self.reason

    def failed_like(self, other: Process) -> bool:
        """Whether it is parked for the reason that another gives too, in its own words."""
        return self.state is State.PARKED and other.explained and self.why_parked() == other.why_parked()

    def parked_because(self) -> str:
        """The same with its name."""
        return f"{self.name}: {self.why_parked()}"

    def last_words(self) -> str:
        """Why it will not be started again, and the end of its output."""
        return "\n".join((self.parked_because(), *self.last_lines))


def spell_exit(code: int) -> str:
    """An exit code or signal in words."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory, or killed by hand)" if -code == signal.SIGKILL else ""
    return f"it was ended by {name}{hint}"
