"""Draws against the distribution that the parameters define, worked out here in plain Python."""

import itertools
import math
from collections import Counter

import pytest
import torch

from loopmux_worker.engine import drawing
from loopmux_worker.engine.drawing import Draw
from loopmux_worker.engine.sampling import uniform

DRAWS = 20_000
ROWS = 2000

# Steep, with equals, with one that is all but impossible and one that is.
LOGITS = [2.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, -1.0, -1.5, -3.0, -40.0, -math.inf]


def draws(count, **more):
    fields = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, **more}
    return [Draw(**fields, quantile=uniform(seed=11, position=i)) for i in range(count)]


def expected(temperature, top_k=None, top_p=1.0, min_p=0.0):
    """Probability by token: filters one after the other, equals in the order of their ids."""
    weights = {i: math.exp((logit - max(LOGITS)) / temperature) for i, logit in enumerate(LOGITS)}
    best = sorted(weights, key=lambda i: (-LOGITS[i], i))[:top_k]
    in_front = itertools.accumulate((weights[i] for i in best), initial=0.0)
    whole = math.fsum(weights[i] for i in best)
    kept = [i for i, mass in zip(best, in_front, strict=False) if mass < top_p * whole]
    kept = [i for i in kept if weights[i] >= min_p * max(weights.values())]
    whole = math.fsum(weights[i] for i in kept)
    return {i: weights[i] / whole for i in kept}


def critical(freedom):
    """What chi-square with so many degrees of freedom exceeds once in 10 000 times (Wilson and Hilferty 1931)."""
    z, step = 3.719, 2 / (9 * freedom)
    return freedom * (1 - step + z * math.sqrt(step)) ** 3


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 30.0},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.45},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 2.0, "min_p": 0.3},
        {"temperature": 3.0, "top_k": 8, "top_p": 0.8},
        {"temperature": 3.0, "top_p": 0.95, "min_p": 0.45},
        {"temperature": 3.0, "top_k": 9, "top_p": 0.9, "min_p": 0.4},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(filters, device):
    found = Counter()
    logits = torch.tensor(LOGITS, device=device).expand(ROWS, -1)
    every = draws(DRAWS, **filters)
    for start in range(0, DRAWS, ROWS):
        found.update(drawing.choose(logits, every[start : start + ROWS])[0].tolist())
    shares = expected(**filters)
    assert set(found) <= set(shares)
    # Tokens that are expected less than 5 times count as one: chi-square does not hold for such.
    rare = {i for i, share in shares.items() if share * DRAWS < 5}
    cells = [(found[i], shares[i] * DRAWS) for i in set(shares) - rare]
    if len(cells) < 2:
        return
    distance = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    assert distance < critical(len(cells) - 1), (distance, found, shares)
    assert sum(found[i] for i in rare) <= 20


def test_a_quantile_finds_its_token_in_order_of_the_ids(device):
    logits = torch.zeros(4, 1000, device=device)
    quantiles = [0.0, 0.25, 0.4999, 1 - 2**-53]
    chosen, best = drawing.choose(logits, [Draw(1.0, None, 1.0, 0.0, quantile) for quantile in quantiles])
    assert chosen.tolist() == [0, 250, 499, 999]
    assert best.tolist() == [0.0] * 4


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 5000])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.999999}, {"top_k": 300}, {"top_k": 4999, "top_p": 0.9}], ids=str)
def test_any_width_holds_the_first_and_the_last_quantile(vocabulary, filters, device):
    fields = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, **filters}
    pair = [Draw(**fields, quantile=0.0), Draw(**fields, quantile=1 - 2**-53)]
    (first, last), _ = drawing.choose(torch.zeros(2, vocabulary, device=device), pair)
    part = math.ceil(min(vocabulary, fields["top_k"] or vocabulary) * fields["top_p"])
    assert (int(first), int(last)) == (0, part - 1)


def test_ranking_puts_equals_in_the_order_of_their_ids_whatever_the_count(device):
    torch.manual_seed(5)
    logits = torch.randn(3, 2000).bfloat16().float().to(device)  # some 400 different values
    logits[1, ::2] = -math.inf
    reference = [sorted(range(2000), key=lambda i, row=row: (-row[i], i)) for row in logits.tolist()]
    for count in (0, 1, 7, 500, 2000):
        found = drawing.ranked(logits.amax(-1, keepdim=True) - logits, count)
        assert found.tolist() == [row[:count] for row in reference]


def test_greedy_takes_the_first_of_equals(device):
    torch.manual_seed(6)
    logits = torch.randn(300, 2000).bfloat16().float().to(device)  # several best ones in many rows
    logits[0] = 0
    logits[1, 3::2] = logits.amax() + 1
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert expected[:2] == [0, 3]
    assert drawing.choose(logits, [Draw(0.0, None, 1.0, 0.0, 0.0)] * 300)[0].tolist() == expected
    best = logits.amax(-1, keepdim=True)
    assert drawing._first(logits, best).tolist() == expected, "the form for other devices, here too"


def test_the_first_of_nothing_is_still_a_token(device):
    logits = torch.full((2, 5), math.nan, device=device)
    logits[1] = -math.inf
    found = drawing._first(logits, logits.amax(-1, keepdim=True))
    assert found.tolist() == [4, 0]
