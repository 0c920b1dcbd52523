"""The arithmetic of load tests."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

from loopmux import ModelNotFoundError, Usage
from loopmux_loadtest.tally import Tally, arrivals, percentile


def test_percentiles() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert [percentile([7.0], share) for share in (0.0, 0.5, 0.99)] == [7, 7, 7]
    assert math.isnan(percentile([], 0.5))


def test_arrivals_are_those_of_their_seed() -> None:
    first = list(arrivals(20, 1, requests=50))
    assert first == list(arrivals(20, 1, requests=50)) != list(arrivals(20, 2, requests=50))
    assert len(first) == 50
    end = first[30]
    assert list(arrivals(20, 1, seconds=end)) == first[:30]


def test_arrivals_know_nothing_of_each_other() -> None:
    gaps = [b - a for a, b in pairwise([0.0, *arrivals(20, 0, requests=20_000)])]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 20, rel=0.02)
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.02)  # memoryless
    after_short = [b for a, b in pairwise(gaps) if a < 0.01]
    assert sum(after_short) / len(after_short) == pytest.approx(1 / 20, rel=0.05)


def test_a_request_begins_when_it_was_due_and_tokens_share_the_time_that_they_took() -> None:
    tally = Tally()
    request = tally.begin(due=1.0, now=3.0)
    request.produced(1, 4.0)
    request.produced(4, 5.0)
    assert (tally.under_way, list(tally.latency)) == (1, [])
    request.ended(Usage(10, 5, 4), 5.5)
    assert (tally.under_way, tally.tokens, tally.usage) == (0, 5, Usage(10, 5, 4))
    measured = (tally.late, tally.first, tally.between, tally.latency)
    assert [list(series) for series in measured] == [[2.0], [3.0], [0.25] * 4, [4.5]]


def test_the_report_counts_every_request_once() -> None:
    tally = Tally()
    requests = [tally.begin(0.0, 0.0) for _ in range(5)]
    requests[0].ended(Usage(10, 0, 4), 0.1)
    requests[1].failed(ModelNotFoundError("one"))
    requests[2].failed(ModelNotFoundError("another one"))
    requests[3].produced(2, 1.0)
    requests[3].stopped()
    assert tally.under_way == 1
    figures = tally.figures(2.0)
    assert json.loads(json.dumps(figures)) == figures
    assert figures == {
        "seconds": 2.0,
        "requests": 5,
        "ended": 1,
        "failed": {"model_not_found": 2},
        "stopped": 1,
        "errors": {"model_not_found": "one"},
        "requests_per_s": 0.5,
        "tokens": 2,
        "tokens_per_s": 1.0,
        "prompt_tokens": 10,
        "reused_tokens": 4,
        "first_token_ms": {"count": 1, "p50": 1000.0, "p90": 1000.0, "p99": 1000.0},
        "between_tokens_ms": None,
        "latency_ms": {"count": 1, "p50": 100.0, "p90": 100.0, "p99": 100.0},
        "late_ms": {"count": 5, "p50": 0.0, "p90": 0.0, "p99": 0.0},
    }
