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
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

_GRACE = 3.0
"""Seconds for a foreign program to clean up after SIGTERM before it is killed."""
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program, where it does not choose otherwise."""
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


@contextmanager
def foreign(
    command: list[str], variables: Mapping[str, str], folder: Path | None = None, *, stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a foreign program (pip) in a group of its own, which the kernel kills when this process dies.

    Where the block raises, nothing that it has started is left. Main thread only.
    """
    with ExitStack() as ending:
        with _uninterrupted():
            process = subprocess.Popen(
                tethered(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                env=dict(variables), cwd=folder, start_new_session=True,
            )  # fmt: skip
            ending.enter_context(process)
            ending.push(lambda kind, *_: _end(process) if kind else None)
        yield process


def tethered(command: list[str]) -> list[str]:
    """The command line that runs a foreign program and has it killed when this process dies."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _WRAPPER, str(os.getpid()), *command]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back what signals raise until the end of the block.

    Who is interrupted while it starts a process never learns its number, and cannot end it. (A mask of signals would
    not do: the kernel gives them to another thread then, and the child inherits it.)
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
        held.append(number)

    before = {number: handler for number in ENDS if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in held:
            signal.raise_signal(again)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program with all that it has started: what one of these wrote afterwards would stay behind."""
    kill_group(process, signal.SIGTERM)
    _wait_for(lambda: has_exited(process))
    kill_group(process)
    process.wait()
    _wait_for(lambda: _is_gone(process.pid))


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _GRACE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _is_gone(group: int) -> bool:
    """Whether no process is left in a group whose leader has been reaped."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


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
