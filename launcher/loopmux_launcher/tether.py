"""Tying processes to each other, so that no kill leaves an orphan.

On Linux a process can ask to be signalled when its parent dies (PR_SET_PDEATHSIG). It must ask for itself, and check
afterwards whether the parent died before. The signal comes when the *thread* that started it ends, so this program
starts processes from its main thread alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
_WRAPPER = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def die_with_parent(parent: int) -> None:
    """Have this process end (SIGTERM) when its parent dies; end at once if it is dead already.

    Raises:
        SystemExit: the parent is not (any more) the given process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        raise SystemExit(1)


def tethered(command: list[str]) -> list[str]:
    """The command line that runs a foreign program (pip) and has it killed when this process dies."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _WRAPPER, str(os.getpid()), *command]


def has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended, without reaping it: until it is reaped its number stays its own."""
    if process.returncode is not None:
        return True
    flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    return os.waitid(os.P_PID, process.pid, flags) is not None


def kill_group(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process that leads its own group, and everything in that group. Must not have been reaped."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass  # nothing of the group is left


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process by its number; one that is gone already needs none."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
