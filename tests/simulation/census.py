"""How much a core remembers: the entries of every container that can be reached from it, by the field that holds it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

_PLAIN = (bytes, str, int, float, bool, type(None), type)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)

_HEAPS = frozenset({"Timers._heap", "Connection._timers"})
_HEAP = 2_000
"""Entries (a timer is about 7) that a heap may have where nothing runs."""


def census(*roots: object) -> Counter[str]:
    """Entries by ``Class.field``."""
    counted: Counter[str] = Counter()
    seen: set[int] = set()
    todo: list[tuple[str, object]] = [(type(root).__name__, root) for root in roots]
    while todo:
        name, it = todo.pop()
        if isinstance(it, _PLAIN) or callable(it) or id(it) in seen:
            continue
        seen.add(id(it))
        if isinstance(it, _CONTAINERS):
            counted[name] += len(it)
            todo += ((name, part) for part in (*it, *(it.values() if isinstance(it, dict) else ())))
        else:
            todo += ((f"{type(it).__name__}.{field}", value) for field, value in _fields(it))
    return counted


def grown(before: Counter[str], after: Counter[str], allowed: int) -> dict[str, int]:
    """What has grown by more than ``allowed``. Heaps keep cancelled timers for a while."""
    most = {name: _HEAP if name in _HEAPS else before[name] + allowed for name in after}
    return {name: n - before[name] for name, n in after.items() if n > most[name]}


def _fields(it: object) -> Iterator[tuple[str, Any]]:
    yield from vars(it).items() if hasattr(it, "__dict__") else ()
    for kind in type(it).__mro__:
        for slot in getattr(kind, "__slots__", ()):
            if hasattr(it, slot):
                yield slot, getattr(it, slot)
