"""How many prompt tokens a step may compute beside its running streams. Pure: fed with measured step times."""

from __future__ import annotations

import math

LARGEST = 512
"""Tokens of a step without running streams: enough to be computed at full speed, short enough to stay answerable."""
_SMALLEST = 16
_UNKNOWN = 64
"""Tokens beside running streams before it is known what a token costs."""
_WEIGHT = 12
"""How much worse it is to wait for a first token than to wait between two: many small chunks make many steps of few
streams, and all of them end later. Beside 12 streams and more, one newcomer costs each at most one more step."""
_MARGIN = 0.8
"""Share of what a chunk may take that it is made for: its costs are known to about a quarter."""
_KEYS = 2048
"""Tokens behind which one is taken to cost twice what it costs at the beginning, before any is seen there."""
_TRUST = 0.2
"""Share of the difference between a step's time and what was expected that goes into the costs."""
_SLOWEST = 0.5
"""What a cost shrinks to at most in one step, so that none falls to zero or below."""
_OUTLIER = 3.0
"""A step counts as at most so many times what was expected of it: a machine that stood still says nothing of costs."""
_STALE = 64
"""Steps with chunks after which one is made without, to see what that costs by now: less than 2 % of the time."""


class Pace:
    """Keeps what a chunk of a prompt adds to a step within ``max(1, 12 · waiting / decoding)`` steps' time.

    So many running streams pause for no longer than one more token takes when one more request comes, and where many
    wait for their first token for each stream that would pause, they are served in large chunks.

    A step is taken to cost something fixed (reading the weights), so much for each stream, for each prompt token, and
    for each key that one attends to. The first two are learned from steps without prompts alone, the others from those
    with: out of a sum of all, seen at chunk sizes chosen by these very costs, it could not be told which of them is
    wrong.
    """

    def __init__(self) -> None:
        self._step: tuple[float, float] | None = None  # seconds: fixed, per stream
        self._token: tuple[float, float] | None = None  # seconds: per prompt token, per key of one
        self._since = 0  # steps with chunks since the last one without

    def budget(self, decoding: int, waiting: int, reached: int = 0) -> int:
        """Prompt tokens for the next step.

        Args:
            decoding: streams.
            waiting: requests without a first token.
            reached: tokens that the one has behind it whose prompt is next.
        """
        if not decoding:
            return LARGEST
        if self._step is None or self._since >= _STALE:
            return 0
        if self._token is None:
            return _UNKNOWN
        spare = _MARGIN * max(1.0, _WEIGHT * waiting / decoding) * self._expected(decoding)
        token, key = self._token
        first = token + key * reached  # and each one after it costs a key more, so that n take first * n + key * n² / 2
        return max(_SMALLEST, min(LARGEST, int(2 * spare / (first + math.sqrt(first**2 + 2 * key * spare)))))

    def note(self, decoding: int, prompt: int, keys: int, seconds: float) -> None:
        """A step took so many seconds for ``decoding`` streams and ``prompt`` tokens, which attended to ``keys``."""
        streams = self._expected(decoding)
        if prompt:
            self._since += bool(decoding)
            if self._token is None:
                each = max(seconds - streams, seconds / 2) / (prompt + keys / _KEYS)
                self._token = each, each / _KEYS
            else:
                token, key = _shared(self._token, (prompt, keys), seconds, streams)
                most = seconds / (token * prompt + key * keys)  # no more than all of the step
                self._token = token * min(1.0, most), key * min(1.0, most)
            return
        self._since = 0
        if self._step is None:
            self._step = seconds / 2, seconds / 2 / decoding
        else:
            self._step = _shared(self._step, (1, decoding), seconds, 0.0)

    def _expected(self, decoding: int) -> float:
        """Seconds of a step without prompts."""
        fixed, stream = self._step or (0.0, 0.0)
        return fixed + stream * decoding if decoding else fixed


def _shared(costs: tuple[float, float], counts: tuple[int, int], seconds: float, rest: float) -> tuple[float, float]:
    """Two costs, corrected by a step that had so many of each: each by its share of what is not ``rest``."""
    one, other = costs[0] * counts[0], costs[1] * counts[1]
    change = (_correction(seconds, rest + one + other) - 1) * (one + other) / (one**2 + other**2)
    return costs[0] * max(_SLOWEST, 1 + change * one), costs[1] * max(_SLOWEST, 1 + change * other)


def _correction(seconds: float, expected: float) -> float:
    """What to multiply costs with, of which so many seconds were expected."""
    return max(_SLOWEST, 1 + _TRUST * (min(seconds, _OUTLIER * expected) - expected) / expected)
