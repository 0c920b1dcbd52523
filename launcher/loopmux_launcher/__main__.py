"""``loopmux-launcher``, also ``python -m loopmux_launcher``: the launcher as a program."""

from __future__ import annotations

import sys

from loopmux_launcher.commands import main

if __name__ == "__main__":
    sys.exit(main())
