"""``python -m loopmux`` is the ``loopmux`` command."""

import sys

from loopmux.cli import main

if __name__ == "__main__":
    sys.exit(main())
