"""A launcher that waits less than usual for signs of life, of workers that hang upon SIGUSR2.

``python -m launcher.impatient`` takes what ``python -m loopmux_launcher`` takes.
"""

from __future__ import annotations

import os
import sys

from loopmux_launcher import server, watchdog
from loopmux_launcher.__main__ import main

SILENCE = 1.8
"""Seconds; idle workers give a sign of life every second."""

if __name__ == "__main__":
    watchdog.SILENCE = SILENCE
    server.worker_command = lambda python, *words: [str(python), "-m", "chaos.hanging", *words]
    server.worker_variables = lambda code, extra: {**os.environ, **extra}
    sys.exit(main())
