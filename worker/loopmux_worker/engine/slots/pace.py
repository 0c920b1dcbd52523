"""How many prompt tokens a step may compute beside its running streams. Pure: fed with measured step times."""

from __future__ import annotations

LARGEST = 512
"""Tokens of a step without running streams: enough to be computed at full speed, short enough to stay answerable."""
_SMALLEST = 16
_UNKNOWN = 64
"""Tokens beside running streams before anything was measured."""
_WEIGHT = 12
"""How much worse it is to wait for a first token than to wait between two: many small chunks make many steps of few
streams, and all of them end later. Beside 12 streams and more, one newcomer costs each at most one more step."""
_TRUST = 0.2
"""Share of the difference between a step's time and what was expected that goes into the costs."""
_SLOWEST = 0.5
"""What a cost shrinks to at most in one step, so that none falls to zero or below."""
_OUTLIER = 3.0
"""A step counts as at most so many times what was expected of it: a machine that stood still says nothing of costs."""
_FIXED = 0.3
"""Share of the very first step that is taken for its fixed cost, until more is known."""


class Pace:
    """Keeps what a chunk of a prompt adds to a step within ``max(1, 12 · waiting / decoding)`` steps' time.

    So many running streams pause for no longer than one more token takes when one more request comes, and where many
    wait for their first token for each stream that would pause, they are served in large chunks.

    A step is taken to cost something fixed (reading the weights), so much for each stream, and so much for each prompt
    token. A step that took longer or shorter than expected changes each of the three by its share of what was expected,
    so what a step had nothing of keeps its cost.
    """

    def __init__(self) -> None:
        self._costs: tuple[float, float, float] | None = None  # seconds: fixed, per stream, per prompt token

    def budget(self, decoding: int, waiting: int) -> int:
        """Prompt tokens for the next step, with so many streams decoding and requests without a first token."""
        if not decoding:
            return LARGEST
        if self._costs is None:
            return _UNKNOWN
        fixed, stream, token = self._costs
        spare = max(1.0, _WEIGHT * waiting / decoding) * (fixed + stream * decoding)
        return max(_SMALLEST, min(LARGEST, int(spare / token)))

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step took so many seconds for ``decoding`` streams and ``prompt`` tokens."""
        counts = (1, decoding, prompt)
        if self._costs is None:
            each = (1 - _FIXED) * seconds / max(1, decoding + prompt)  # a stream's token is a token, too
            self._costs = (_FIXED * seconds, each, each)
            return
        parts = [cost * count for cost, count in zip(self._costs, counts, strict=True)]
        expected = sum(parts)
        off = _TRUST * (min(seconds, _OUTLIER * expected) - expected) / expected
        # A part's share twice: of what was expected, and of what is to be corrected.
        weight = sum(part * part for part in parts)
        fixed, stream, token = (
            cost * max(_SLOWEST, 1 + off * part * expected / weight)
            for cost, part in zip(self._costs, parts, strict=True)
        )
        self._costs = fixed, stream, token
