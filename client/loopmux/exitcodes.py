"""What programs of ours end with that end badly; service managers, scripts and the launcher go by these numbers."""

from __future__ import annotations

from typing import Final

from loopmux.errors import BadRequestError, ConfigError, LoopmuxError

FAILURE: Final = 1
USAGE: Final = 2
"""The command line, or a request as it was asked for, is wrong."""
CONFIG: Final = 78
"""EX_CONFIG of sysexits.h: it would fail in the same way if it were started again."""
INTERRUPTED: Final = 130
"""By Ctrl-C, as shells put it: 128 and the signal's number."""


def of(error: LoopmuxError) -> int:
    """The code for an error that ends a program, whoever found it out."""
    if isinstance(error, BadRequestError):
        return USAGE
    return CONFIG if isinstance(error, ConfigError) else FAILURE
