"""What ends the children of workers when the launcher is killed.

The kernel ends a worker with its launcher (``tether``), but not what that worker has started. So a small process of its
own knows the groups of all children, and ends them when the launcher is gone: it hears of that by the end of its input.
"""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing of it was left
"""


class Guard:
    """The guarding process: told of each group before it can matter, and again before its number may be another's.

    Where it was killed itself, the launcher goes on without one.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True, bufsize=0,
        )  # fmt: skip

    def watch(self, group: int) -> None:
        """A child leads a group of this number."""
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        """The group is gone; call it before its leader is reaped."""
        self._tell(f"-{group}\n")

    def close(self) -> None:
        """End it, with whatever is still in a group that it knows."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
        except BrokenPipeError:
            pass  # somebody killed it: the kernel still ends the workers with us
