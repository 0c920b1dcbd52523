"""A launcher that gives what it stops ten minutes before it kills it.

``python -m launcher.unhurried`` takes what ``python -m loopmux_launcher`` takes.
"""

from __future__ import annotations

import sys

from loopmux_launcher import lifecycle
from loopmux_launcher.__main__ import main

if __name__ == "__main__":
    lifecycle.STOP_GRACE = 600.0
    sys.exit(main())
