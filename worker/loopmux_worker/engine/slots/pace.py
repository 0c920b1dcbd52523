"""How many prompt tokens a step may compute beside its running streams. Pure: fed with measured step times."""

from __future__ import annotations

LARGEST = 512
"""Tokens of a step without running streams: enough to be computed at full speed, short enough to stay answerable."""
_SMALLEST = 16
_UNKNOWN = 64
"""Tokens beside running streams before it is known what a token costs."""
_WEIGHT = 12
"""How much worse it is to wait for a first token than to wait between two: many small chunks make many steps of few
streams, and all of them end later. Beside 12 streams and more, one newcomer costs each at most one more step."""
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

    A step is taken to cost something fixed (reading the weights), so much for each stream, and so much for each prompt
    token. The first two are learned from steps without prompts alone, the third from those with: out of a sum of all
    three, seen at chunk sizes chosen by these very costs, it could not be told which of them is wrong.
    """

    def __init__(self) -> None:
        self._step: tuple[float, float] | None = None  # seconds: fixed, per stream
        self._token: float | None = None  # seconds per prompt token
        self._since = 0  # steps with chunks since the last one without

    def budget(self, decoding: int, waiting: int) -> int:
        """Prompt tokens for the next step, with so many streams decoding and requests without a first token."""
        if not decoding:
            return LARGEST
        if self._step is None or self._since >= _STALE:
            return 0
        if self._token is None:
            return _UNKNOWN
        spare = max(1.0, _WEIGHT * waiting / decoding) * self._expected(decoding)
        return max(_SMALLEST, min(LARGEST, int(spare / self._token)))

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step took so many seconds for ``decoding`` streams and ``prompt`` tokens."""
        streams = self._expected(decoding)
        if prompt:
            self._since += bool(decoding)
            if self._token is None:
                self._token = max(seconds - streams, seconds / 2) / prompt
            else:
                corrected = self._token * _correction(seconds, streams + self._token * prompt)
                self._token = min(corrected, seconds / prompt)  # no more than all of the step
            return
        self._since = 0
        if self._step is None:
            self._step = seconds / 2, seconds / 2 / decoding
            return
        # Each of the two by its share of the step.
        fixed, stream = self._step
        change = _correction(seconds, streams) - 1
        weight = (fixed**2 + (stream * decoding) ** 2) / streams
        self._step = fixed * (1 + change * fixed / weight), stream * (1 + change * stream * decoding / weight)

    def _expected(self, decoding: int) -> float:
        """Seconds of a step without prompts."""
        fixed, stream = self._step or (0.0, 0.0)
        return fixed + stream * decoding if decoding else fixed


def _correction(seconds: float, expected: float) -> float:
    """What to multiply costs with, of which so many seconds were expected."""
    return max(_SLOWEST, 1 + _TRUST * (min(seconds, _OUTLIER * expected) - expected) / expected)
