"""The life of one supervised process, as a pure state machine.

::

    WAITING ─start─▶ STARTING ─ready─▶ READY
                        │ ▲               │ exit
         exit, failed,  │ └──── PAUSING ◀─┤
         start time-out ▼   wake          │
                     ENDING ─exit─▶ PAUSING or PARKED (crash loop, or a bad configuration: it would fail again)

    stop: any of them ─▶ STOPPING ─exit─▶ GONE ─start─▶ STARTING, when it is wanted again
    PAUSING ─wake─▶ WAITING, where the environment that it is to run in by now was never ready
    READY ─no sign of life─▶ ENDING: it hangs, and is killed
    READY ─exit 0─▶ GONE: somebody else told it to leave (an administrator who drains it, a signal)
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field
from enum import Enum

from loopmux import exitcodes
from loopmux.cadence import LEAVE_PATIENTLY
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
        started, became_ready: when, on the clock of the events; infinity while that is to come.
        outdated: it was started by a former configuration; its next start follows the present one.
        last_of_its_kind: what it runs cannot go on in its successor, whose weights are others.
        patient: it was given the time for what it runs to end.
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
    became_ready: float = math.inf
    outdated: bool = False
    last_of_its_kind: bool = False
    patient: bool = False
    wake: float | None = None
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def runs(self) -> bool:
        """Whether the operating system has (or is about to have) a process for it."""
        return self.state in (State.STARTING, State.READY, State.ENDING, State.STOPPING)

    @property
    def alive(self) -> bool:
        """Whether it is one of those that serve, or is on the way to it."""
        return self.state in (State.STARTING, State.READY, State.ENDING, State.PAUSING)

    @property
    def dormant(self) -> bool:
        """Whether it can be started: it never was, or was stopped because it was not needed."""
        return self.state in (State.WAITING, State.GONE)

    @property
    def took(self) -> float:
        """Seconds from its start until it was ready."""
        return self.became_ready - self.started

    def serves(self, model: str) -> bool:
        """Whether it is ready for a model of its group."""
        return self.state is State.READY and model not in self.left_out

    def start(self, now: float) -> None:
        """It is being started."""
        self.state, self.phase, self.detail, self.reason = State.STARTING, "loading", "", ""
        self.started, self.wake, self.left_out, self.explained = now, now + self.start_timeout, {}, False
        self.became_ready = math.inf
        self.outdated = self.last_of_its_kind = self.patient = False

    def put_off(self) -> None:
        """It cannot be started yet: whoever sees that it can starts it."""
        self.state, self.wake = State.WAITING, None

    def got_ready(self, now: float) -> None:
        """It said that it is ready."""
        self.state, self.detail, self.wake, self.became_ready = State.READY, "", None, now
        self.backoff.got_ready()

    def end(self, reason: str, now: float, *, explained: bool = False) -> None:
        """It failed, took too long or hangs; it is asked to end and counts as crashed when it has."""
        self.state, self.reason, self.wake = State.ENDING, reason, now + STOP_GRACE
        self.explained = explained

    def stop(self, now: float, *, patiently: bool = False) -> None:
        """It is no longer wanted."""
        self.patient = patiently and self.state is State.READY
        self.state = State.STOPPING if self.runs else State.GONE
        grace = STOP_GRACE + (LEAVE_PATIENTLY if self.patient else 0.0)
        self.wake = now + grace if self.state is State.STOPPING else None

    def forgive(self) -> None:
        """Whatever it died of may be repaired: it may be started again, as if it never had been."""
        self.state, self.wake, self.backoff, self.reason = State.WAITING, None, Backoff(), ""
        self.last_lines, self.explained = (), False

    def exited(self, code: int, last_lines: tuple[str, ...], now: float, draw: float) -> float | None:
        """It is gone; returns the seconds until its next start, None if there is none (then it is PARKED or GONE)."""
        if self.state is State.STOPPING or (self.state is State.READY and code == 0):
            self.state, self.wake = State.GONE, None
            return None
        was_ready = self.became_ready < math.inf
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
