"""Dying with the parent: a worker whose launcher is gone would hold its memory for nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent dies; end at once if it has died already.

    On Linux the kernel does it (the *thread* that started this process counts as its parent: it has to live as long as
    the worker is to). Elsewhere a thread waits for the end of the standard input, which the parent holds open.

    Args:
        parent: process id of the parent as it told it.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)
    else:
        threading.Thread(target=_watch_input, name="parent", daemon=True).start()


def _watch_input() -> None:
    while os.read(0, 4096):
        pass  # nobody writes there; what matters is the end
    os._exit(1)
