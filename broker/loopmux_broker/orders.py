"""Whether an adapter may be loaded or unloaded, and by which workers; if not, with which error."""

from __future__ import annotations

from loopmux.errors import AdapterNotFoundError, BadRequestError, OverloadedError, listed, unknown_model
from loopmux.messages import AdapterOrder
from loopmux_broker.pool import Pool
from loopmux_broker.tables import Tables

_LONGEST_NAME = 100
"""Bytes of an adapter's name: REGISTER has room for 64 models in 4 KiB."""
_LONGEST_FOLDER = 2000
RETRY = 1.0
"""``retry_after`` where it cannot be done now, seconds."""


def loadable(tables: Tables, order: AdapterOrder) -> set[str]:
    """The workers that are to load it; none where the model runs on demand and does not now: the next one will.

    Raises:
        LoopmuxError: there are none, or the name is another model's.
    """
    pool, model, name = tables.pool, order.model, order.name
    if not name or len(name.encode()) > _LONGEST_NAME:
        raise BadRequestError(f"name: found {name[:80]!r}, expected 1 to {_LONGEST_NAME} bytes")
    if not order.folder.startswith("/") or len(order.folder.encode()) > _LONGEST_FOLDER:
        raise BadRequestError(
            f"folder: found {order.folder[:80]!r}, expected an absolute path of at most {_LONGEST_FOLDER} bytes"
        )
    workers = _running(pool, model) if _on_demand(pool, model) else _workers_of(tables, model)
    if (onto := _loaded_for(pool, model)) is not None:
        raise BadRequestError(f"model {model!r} is an adapter that was loaded for {onto!r}: name that one")
    words = pool.launchers_of(name).values()
    others = [w.name for w in pool.serving(name) if w.name not in workers]
    if others or any(word.entry.onto != model for word in words):
        raise BadRequestError(f"adapter {name!r}: found a model of that name already, choose another one")
    return workers


def unloadable(tables: Tables, order: AdapterOrder) -> set[str]:
    """The workers that are to unload it; there may be none now where launchers remember it.

    Raises:
        LoopmuxError: they do not have it, or the configuration says that they should.
    """
    pool, model, name = tables.pool, order.model, order.name
    words = pool.launchers_of(name).values()
    remembered = any(word.entry.onto == model for word in words)
    workers = _running(pool, model) if remembered else _workers_of(tables, model)
    if any(word.entry.onto is None for word in words) and name in pool.adapters(model):
        raise BadRequestError(
            f"adapter {name!r} is one of the configuration: take it out there, `unload` is for what `load` brought"
        )
    having = {w.name for w in pool.serving(name) if name in w.register.adapters} & workers
    if not having and not remembered:
        known = listed(pool.adapters(model))
        raise AdapterNotFoundError(f"model {model!r} has no adapter {name!r}, loaded are: {known}")
    return having


def _workers_of(tables: Tables, model: str) -> set[str]:
    pool = tables.pool
    if not pool.knows(model) and tables.settled:
        raise unknown_model(model, pool.known())
    workers = _running(pool, model)
    if not workers:
        how = pool.standing(model, 0.0)
        raise OverloadedError(
            f"model {model!r} has no worker now (it is {how}): adapters are loaded into workers that run; try "
            "again when there is one",
            retry_after=RETRY,
        )
    return workers


def _on_demand(pool: Pool, model: str) -> bool:
    """Whether a launcher starts workers of a model when they are needed, and they can be."""
    words = pool.launchers_of(model).values()
    return any(word.entry.scales and word.entry.phase != "failed" for word in words)


def _running(pool: Pool, model: str) -> set[str]:
    return {w.name for w in pool.serving(model) if not w.draining}


def _loaded_for(pool: Pool, name: str) -> str | None:
    """The model that an adapter was loaded for at run time."""
    return next((word.entry.onto for word in pool.launchers_of(name).values() if word.entry.onto), None)
