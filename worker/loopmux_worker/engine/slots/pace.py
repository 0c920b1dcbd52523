"""How many prompt tokens a step may compute beside its running streams. Pure: fed with measured step times."""

from __future__ import annotations

LARGEST = 512
"""Tokens of a step without running streams: enough to be computed at full speed, short enough to stay answerable."""
_SMALLEST = 16
_WEIGHT = 4
"""How much worse it is to wait for a first token than to wait between two: small chunks make many steps of few streams,
and all of them end later."""
_TELLING = 64
"""Tokens from which a chunk says what a token costs."""
_MEMORY = 0.8
"""Share of the old estimate that a new measurement leaves."""


class Pace:
    """Keeps a step with a chunk of a prompt within about twice the time of one without.

    So nobody's stream pauses for longer than one more token takes, whatever is sent to the engine meanwhile. Where
    more than a few wait for their first token, a step may take longer in proportion to how many they are for each
    stream that would pause.

    A step with a chunk is taken to last as long as one without, plus something fixed, plus so much for each token.
    """

    def __init__(self) -> None:
        self._step: float | None = None  # seconds of a step that only decodes
        self._token: float | None = None  # seconds of one prompt token in a step of many
        self._fixed = 0.0  # seconds that a chunk of any size adds to a step

    def budget(self, decoding: int, waiting: int) -> int:
        """Prompt tokens for the next step, with so many streams decoding and requests without a first token."""
        if not decoding:
            return LARGEST
        if self._step is None or self._token is None:
            return _SMALLEST * 4
        spare = max(1.0, _WEIGHT * waiting / decoding) * self._step - self._fixed
        return max(_SMALLEST, min(LARGEST, int(spare / self._token)))

    def note(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step took so many seconds for ``decoding`` streams and ``prompt`` tokens."""
        if not prompt:
            self._step = _mixed(self._step, seconds)
        elif not decoding:
            if prompt >= _TELLING:
                self._token = _mixed(self._token, seconds / prompt)
        elif self._step is not None and self._token is not None:
            self._fixed = _mixed(self._fixed, max(0.0, seconds - self._step - self._token * prompt))


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else _MEMORY * old + (1 - _MEMORY) * new
