"""The parent of the broker: the same program, ready to serve, that forks the broker and forks it again when it dies.

What takes long about a broker's start are its interpreter and its imports. Here they are there once and for all; a fork
takes milliseconds, and shares their memory and the listening sockets.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections import deque
from collections.abc import Callable

from loopmux import exitcodes
from loopmux.pulse import Pulse, Silence, between
from loopmux_broker.lifeline import ENDS, unheard
from loopmux_broker.logs import Logger

_SERVED = 1.0
"""Seconds. What ends a broker sooner would end the next one, too: then its parent ends likewise, and whoever started
that judges how long to wait, and how often to try."""
_OFTEN, _WHILE = 20, 60.0
"""Deaths within so many seconds that are one cause's: the parent ends with the last of them, too."""
_FOR_GOOD = (exitcodes.USAGE, exitcodes.CONFIG)
"""Exit codes of what would be the same again, however long it took to find out."""
_NEWS = frozenset({signal.SIGCHLD, signal.SIGALRM, *ENDS})
_HUNG = 30.0
"""Seconds without a pulse after which a broker is killed: it loops without end, or somebody has stopped it and gone."""


def hold() -> None:
    """Keep signals for ``keep``, which takes them in one by one: no moment is the wrong one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it passes that on, and would never hear of its children
    signal.pthread_sigmask(signal.SIG_BLOCK, _NEWS - unheard())  # one that is blocked comes though it is ignored


def heed() -> None:
    """Take signals in as they come again, and those that have come meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NEWS)


def keep(log: Logger, pulse: Pulse, renew: Callable[[], None] = lambda: None) -> int | None:
    """Have a broker, and another one at once when one dies that has served. Main thread only, and no other thread yet.

    ``renew`` is called before there is another one.

    SIGTERM, SIGINT and SIGHUP go on to the broker. When it ends by these or by itself, that is the end. One that has no
    pulse any more is killed.

    Returns:
        In every broker, each a child of the process that called: None; signals are held still. In that process, once
        there is to be no broker any more: the exit code of the last one, 128 and the number of the signal that it died
        of.
    """
    hold()
    gc.freeze()  # else the collectors of the brokers would write to, and so copy, what is shared with them
    deaths: deque[float] = deque(maxlen=_OFTEN)
    while True:
        began = time.monotonic()
        broker = os.fork()
        if not broker:
            log.begin_anew()
            return None
        code, asked = _await_end(broker, pulse, log)
        if code == 0 or (asked and -code in _NEWS):
            return 0
        deaths.append(time.monotonic())
        lived, often = deaths[-1] - began, len(deaths) == _OFTEN and deaths[-1] - deaths[0] < _WHILE
        again = lived >= _SERVED and not often and not asked and code not in _FOR_GOOD
        if again or code < 0:  # else it has said itself what the matter is
            by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            log.say("warning" if again else "error", "broker died", by=by, after=round(lived, 2), again=again)
        if not again:
            return code if code > 0 else 128 - code
        renew()


def _await_end(broker: int, pulse: Pulse, log: Logger) -> tuple[int, bool]:
    """The exit code of a broker, negative for a signal, and whether it was asked to end."""
    asked, silence, pause = False, Silence(_HUNG, time.monotonic()), between(_HUNG)
    # Not sigtimedwait: to who was stopped and goes on after that time, Python names a signal that never came.
    signal.setitimer(signal.ITIMER_REAL, pause, pause)
    while True:
        news = signal.sigwait(_NEWS)
        if news == signal.SIGALRM:
            log.pass_on()
            if silence.look(beat=pulse.taken(), now=time.monotonic()):
                log.say("error", "broker hangs", seconds=round(_HUNG, 1), pid=broker)
                os.kill(broker, signal.SIGKILL)
        elif news == signal.SIGCHLD:
            ended, status = os.waitpid(broker, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), asked
        else:
            asked = True
            os.kill(broker, news)
