"""How a worker introduces itself: what its engine serves, as REGISTER has room for it. Pure."""

from __future__ import annotations

from dataclasses import replace

from loopmux.codec import pack, shorten
from loopmux.errors import ConfigError
from loopmux.messages import LeftOut, Register
from loopmux.wire import ROUTE_LIMIT
from loopmux_worker.engine.base import Description

_MOST_MODELS = 64
"""Entries of a list in ROUTE."""
_MOST_HELD = 2**31
"""More than any worker holds: room for the number in REGISTER."""
_REASONS = (1000, 500, 250, 120, 60, 30)
"""Bytes that each reason of a model left out may take: the most with which the whole fits."""


def described(register: Register, description: Description) -> Register:
    """A worker's introduction with what its engine serves now.

    Raises:
        ConfigError: it serves more than fits into the message.
    """
    register = replace(
        register,
        models=description.models,
        adapters=description.adapters,
        slots=description.slots,
        engine=description.engine,
    )
    for limit in _REASONS:
        reasons = tuple(LeftOut(one.id, shorten(one.reason, limit)) for one in description.left_out)
        register = replace(register, left_out=reasons)
        size = len(pack(replace(register, held=_MOST_HELD)))
        if size <= ROUTE_LIMIT:
            break
    if max(len(description.models), len(description.left_out)) > _MOST_MODELS or size > ROUTE_LIMIT:
        raise ConfigError(
            f"worker {register.name!r} serves {len(description.models)} models whose names take {size} bytes; at most "
            f"{_MOST_MODELS} in {ROUTE_LIMIT} bytes can be announced: spread them over several workers"
        )
    return register
