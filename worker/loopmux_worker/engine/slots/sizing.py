"""How many KV rows of what length fit a budget. Pure."""

from __future__ import annotations

from typing import NamedTuple

from loopmux.errors import ConfigError
from loopmux.messages import FEWEST_TOKENS

MOST = 16
"""Requests at once where nobody says: beyond it a step on a CPU takes longer in proportion, and nobody gains."""
MOST_ON_GPU = 64
"""The same on a GPU, which reads its weights no slower for more of them."""
_PARKED = 3
"""Parked rows per request that runs, where there is room: loops wait for their tools most of the time."""
_FEWEST = 4
"""Rows that are worth a shorter context where the context was not asked for."""
_GIB = 2**30
_UNKNOWN = 2**30
"""Bytes that are taken to be free where the system does not tell."""
_SHARE = 0.3
"""Of the memory that is free after loading, where no budget is given."""
_SHARE_OF_GPU = 0.85
"""The same for the memory of a GPU, which holds no page cache and serves nobody else; the rest is for a step's work."""


class Size(NamedTuple):
    """Rows of ``context`` tokens each; ``most`` requests run at once."""

    rows: int
    context: int
    most: int


def size(
    token: int,
    free: int | None,
    *,
    model_context: int,
    context: int | None,
    most: int | None,
    gib: float | None,
    on_gpu: bool = False,
) -> Size:
    """Rows for a budget.

    Args:
        token: bytes of one token's keys and values in all layers.
        free: bytes that are free once the model is loaded, None where nobody knows.
        model_context: tokens that the model was made for.
        context: tokens of a row, if somebody asked for a number.
        most: requests at once, if somebody asked for a number.
        gib: the budget, if somebody gave one; else a share of what is free.
        on_gpu: whether it is the memory of a GPU.

    Raises:
        ConfigError: not one row fits, fewer than the requests at once that were asked for, or more than is free.
    """
    if gib is not None:
        budget = int(gib * _GIB)
    else:
        budget = int((_UNKNOWN if free is None else free) * (_SHARE_OF_GPU if on_gpu else _SHARE))
    tokens = budget // token
    length = context or min(model_context, max(tokens // (most or _FEWEST), FEWEST_TOKENS))
    rows = tokens // length
    if rows < max(1, most or 1):
        raise ConfigError(
            f"kv_cache_gib: {budget / _GIB:.2f} GiB hold {tokens} tokens, which is {rows} requests of {length} tokens; "
            f"expected room for {max(1, most or 1)}: raise kv_cache_gib, or lower context or slots"
        )
    wanted = most or (MOST_ON_GPU if on_gpu else MOST)
    found = Size(min(rows, wanted * (1 + _PARKED)), length, min(wanted, rows))
    taken = found.rows * length * token
    if free is not None and taken > free:
        raise ConfigError(
            f"kv_cache_gib: {found.rows} rows of {length} tokens take {taken / _GIB:.2f} GiB; expected at most the "
            f"{free / _GIB:.2f} GiB that are free once the model is loaded: lower kv_cache_gib, slots or context, or "
            "stop other programs"
        )
    return found
