"""What was probably meant by a name that nobody knows."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

_COMPARED = 64
"""Names that are compared, those of the most similar length: a broker that knows thousands has a millisecond for it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an error message, whatever the case of the letters; empty when nothing known is close."""
    import difflib  # for people who mistyped only

    folded, by_folded = name.casefold(), {each.casefold(): each for each in known}
    alike = heapq.nsmallest(_COMPARED, by_folded, key=lambda each: abs(len(each) - len(folded)))
    near = difflib.get_close_matches(folded, alike, n=1)
    return f"did you mean {by_folded[near[0]]!r}?" if near else ""
