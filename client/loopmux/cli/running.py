"""Running a command: errors of ours, and of whoever reads its output, become one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from loopmux import exitcodes
from loopmux.errors import LoopmuxError


def run(command: Callable[[], int], *, debug: bool) -> int:
    """Run a command: what it returns, or the code (``exitcodes``) for what it raised; ``debug`` shows tracebacks."""
    try:
        code = command()
        sys.stdout.flush()
    except LoopmuxError as error:
        if debug:
            traceback.print_exc()
        print(f"loopmux: {error}", file=sys.stderr)
        return exitcodes.of(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exitcodes.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`loopmux generate … | head`). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exitcodes.FAILURE
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"loopmux: {error}", file=sys.stderr)  # a full disk behind our output, most of the time
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exitcodes.FAILURE
    return code
