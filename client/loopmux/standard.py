"""Standard input, output and error, without which a program may have been started."""

from __future__ import annotations

import os
import sys

_INPUT, _OUTPUT, _ERROR = range(3)


def complete() -> None:
    """Put the null device in the place of those that are closed.

    The next files to be opened would get their numbers: sockets that children read from, and that libraries complain
    to.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(_INPUT, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(_OUTPUT, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(_ERROR, "w", closefd=False)
