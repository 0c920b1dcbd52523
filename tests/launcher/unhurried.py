"""A launcher that gives what it stops, and who is to follow it, ten minutes each.

``python -m launcher.unhurried`` takes what ``python -m loopmux_launcher`` takes.
"""

from __future__ import annotations

import sys

from loopmux_launcher import lifecycle, server
from loopmux_launcher.__main__ import main

if __name__ == "__main__":
    lifecycle.STOP_GRACE = server._STAY = 600.0
    sys.exit(main())
