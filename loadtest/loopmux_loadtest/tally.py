"""What becomes of the requests of a load test, counted as it happens, and the figures that come of it. Pure.

Times are seconds on one clock of the caller's. A request's time begins when it was due, not when it was sent: one that
the tester itself sent late waited as well (no coordinated omission).
"""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from loopmux.errors import LoopmuxError
from loopmux.results import Usage

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed (nearest rank); NaN for none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def arrivals(rate: float, seed: int, *, requests: int | None = None, seconds: float = math.inf) -> Iterator[float]:
    """When requests arrive that know nothing of each other, ``rate`` a second: a Poisson process.

    Yields seconds from the start, ``requests`` of them or those before ``seconds``; the same for the same seed.
    """
    dice, at = random.Random(seed), 0.0  # noqa: S311 - no secret: the same arrivals every time
    for _ in repeat(None) if requests is None else repeat(None, requests):
        at += dice.expovariate(rate)
        if at >= seconds:
            return
        yield at


def _series() -> array[float]:
    return array("d")


@dataclass(slots=True)
class Tally:
    """All requests of a load test.

    Attributes:
        begun, ended, stopped: requests that were sent, that ended well, that were cancelled with the test.
        failed: the others that are over, by error code; ``errors`` has the first message of each.
        tokens: produced by all of them, as far as they came.
        usage: of those that ended well.
        late: by how much each was sent after it was due.
        first: from then to its first token.
        between: from one token to the next, an entry a token; of several that came together each has its share.
        latency: from when it was due to its end, of those that ended well.
    """

    begun: int = 0
    ended: int = 0
    stopped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    usage: Usage = field(default_factory=Usage)
    late: array[float] = field(default_factory=_series)
    first: array[float] = field(default_factory=_series)
    between: array[float] = field(default_factory=_series)
    latency: array[float] = field(default_factory=_series)

    @property
    def under_way(self) -> int:
        """Requests that are not over."""
        return self.begun - self.ended - self.stopped - self.failed.total()

    def begin(self, due: float, now: float) -> Request:
        """A request is sent."""
        self.begun += 1
        self.late.append(now - due)
        return Request(self, due)

    def figures(self, seconds: float) -> dict[str, Any]:
        """The report, in JSON values: counts, rates over the ``seconds`` of the test, percentiles in milliseconds.

        Each spread has its own ``count``: a request without a token is in no time to the first one.
        """
        return {
            "seconds": round(seconds, 3),
            "requests": self.begun,
            "ended": self.ended,
            "failed": dict(self.failed),
            "stopped": self.stopped,
            "errors": self.errors,
            "requests_per_s": round(self.ended / seconds, 3),
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / seconds, 1),
            "prompt_tokens": self.usage.prompt_tokens,
            "reused_tokens": self.usage.cached_tokens,
            "first_token_ms": _spread(self.first),
            "between_tokens_ms": _spread(self.between),
            "latency_ms": _spread(self.latency),
            "late_ms": _spread(self.late),
        }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    spread = {name: round(1e3 * percentile(seconds, share), 3) for name, share in _SHARES.items()}
    return {"count": len(seconds), **spread}


@dataclass(slots=True)
class Request:
    """One request of a tally, told what happens to it."""

    tally: Tally
    due: float
    last: float | None = None
    """When its last token came."""

    def produced(self, tokens: int, now: float) -> None:
        """So many tokens came together."""
        self.tally.tokens += tokens
        if self.last is None:
            self.tally.first.append(now - self.due)
        else:
            self.tally.between.extend(repeat((now - self.last) / tokens, tokens))
        self.last = now

    def ended(self, usage: Usage, now: float) -> None:
        """It ended well."""
        self.tally.ended += 1
        self.tally.usage += usage
        self.tally.latency.append(now - self.due)

    def failed(self, error: LoopmuxError) -> None:
        """It ended with an error."""
        self.tally.failed[error.code] += 1
        self.tally.errors.setdefault(error.code, error.message)

    def stopped(self) -> None:
        """It was cancelled because the test ends."""
        self.tally.stopped += 1
