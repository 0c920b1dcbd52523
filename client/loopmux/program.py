"""Starting a program of the server side, which needs packages that the client does not."""

from __future__ import annotations

import importlib
import sys

from loopmux import exitcodes


def run(name: str, module: str) -> int:
    """Call ``main()`` of a module; says what to install where only the client is.

    Returns:
        The exit status.
    """
    try:
        return int(importlib.import_module(module).main())
    except ModuleNotFoundError as error:
        print(
            f"{name}: needs {error.name}, which {sys.executable} does not have: "
            "install Loopmux with its extra [server], in its source folder  pip install '.[server]'",
            file=sys.stderr,
        )
        return exitcodes.FAILURE
    except KeyboardInterrupt:
        return exitcodes.INTERRUPTED
