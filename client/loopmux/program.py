"""Starting programs that need packages which the client does not, or saying what to install for them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable

from loopmux import exitcodes


def run(name: str, module: str) -> int:
    """Call ``main()`` of a module; says what to install where only the client is.

    Returns:
        The exit status.
    """
    try:
        return int(importlib.import_module(module).main())
    except ModuleNotFoundError as error:
        print(needs(f"{name}:", [str(error.name)], "server"), file=sys.stderr)
        return exitcodes.FAILURE
    except KeyboardInterrupt:
        return exitcodes.INTERRUPTED


def missing(packages: Iterable[str]) -> list[str]:
    """Those of these packages that are not installed here."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def needs(what: str, packages: Iterable[str], extra: str) -> str:
    """What to tell people where something needs packages that are missing, all of them of one extra."""
    return (
        f"{what} needs {', '.join(packages)}, which {sys.executable} does not have: "
        f"install Loopmux with its extra [{extra}], in its source folder  pip install '.[{extra}]'"
    )
