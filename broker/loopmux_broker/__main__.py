"""``loopmux-broker``, also ``python -m loopmux_broker``: the broker as a program."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the broker; says what to install where only the client is."""
    try:
        from loopmux_broker.program import main as run
    except ModuleNotFoundError as error:
        print(
            f"loopmux-broker: needs {error.name}, which {sys.executable} does not have: "
            "install it with  pip install 'loopmux[server]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
