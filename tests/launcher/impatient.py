"""A launcher that waits less than usual for signs of life; its workers give more of them, and hang upon SIGUSR2.

``python -m launcher.impatient`` takes what ``python -m loopmux_launcher`` takes.
"""

from __future__ import annotations

import os
import sys

from loopmux_launcher import server, watchdog
from loopmux_launcher.__main__ import main

SILENCE, POLL = 4.0, 0.1
"""Seconds without a sign of life that are too many, and the most from one to the next."""
_WORKER = f"""
import sys
from chaos import hanging
from loopmux_worker import server

server._LONGEST_POLL = {POLL}
sys.exit(hanging.serve(600.0))
"""

if __name__ == "__main__":
    watchdog.SILENCE = SILENCE
    server.worker_command = lambda python, *words: [str(python), "-c", _WORKER, *words]
    server.worker_variables = lambda code, extra: {**os.environ, **extra}
    sys.exit(main())
