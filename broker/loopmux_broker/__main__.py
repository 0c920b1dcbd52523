"""``loopmux-broker``, also ``python -m loopmux_broker``: the broker as a program."""

import sys

from loopmux.program import run


def main() -> int:
    """Run the broker."""
    return run("loopmux-broker", "loopmux_broker.program")


if __name__ == "__main__":
    sys.exit(main())
