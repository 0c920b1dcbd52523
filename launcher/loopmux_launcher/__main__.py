"""``loopmux-launcher``, also ``python -m loopmux_launcher``: the launcher as a program."""

import sys

from loopmux.program import run


def main() -> int:
    """Run the launcher's command line."""
    return run("loopmux-launcher", "loopmux_launcher.commands")


if __name__ == "__main__":
    sys.exit(main())
