"""From logits to tokens, many rows at once: greedy, temperature, top-k, top-p, min-p. Pure torch; knows no request.

Each row has parameters of its own, and no row's answer depends on the others. Two things see to that. Probabilities are
whole multiples of a small unit, so sums of them are exact in whatever order a device adds them up. And tokens are
ranked by probability, then id, so that ties (frequent in bf16) fall the same way however many candidates are ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_CANDIDATES = 256
"""How many of the best tokens top-p looks at first: they mostly hold its mass, and ranking costs more than all else."""

_WIDER = 16
"""How many times more it looks at where they do not: ranking all of 32 000 takes 10 times as long as the best 4096."""

_BLOCK = 256
"""Tokens whose probabilities are added up before any is looked at: about the root of a vocabulary, where the running
sum over blocks and the one inside a block are shortest together."""

_COLDEST = 1e-30
"""Lower temperatures are taken for this one, which a float32 can hold and divide by. It is greedy but for ties."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is drawn.

    Attributes:
        temperature: 0 takes the best token, the first of equals.
        top_k: how many of the best tokens take part; None for all.
        top_p: the best tokens whose probabilities among those reach it take part; 1 for all.
        min_p: tokens with at least this share of the best one's probability take part.
        quantile: the random number in [0, 1) that decides.
    """

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    quantile: float

    @property
    def ranks(self) -> bool:
        """Whether it needs to know which tokens are the best."""
        return self.top_k is not None or self.top_p < 1


class Columns(NamedTuple):
    """The fields of draws, each of shape (rows, 1): float32 where whole rows meet it, float64 where sums do."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    quantile: Tensor


def choose(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """A token per row, and the row's best logit, both of shape (rows,), from float32 logits (rows, vocabulary).

    The token of a row whose best logit is not finite means nothing.
    """
    best = logits.amax(-1)
    tokens = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    kinds = [_greedy if draw.temperature == 0 else _draw_ranked if draw.ranks else _draw for draw in draws]
    for kind in (_greedy, _draw, _draw_ranked):
        rows = [i for i, other in enumerate(kinds) if other is kind]
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = kind(take(logits, rows), best[index].unsqueeze(-1), [draws[i] for i in rows])
    return tokens, best


def ranked(behind: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` best tokens per row, best first, equals by id: shape (rows, count).

    ``behind`` (rows, vocabulary), float32, is how far each logit lies behind the row's best one: 0 or more.
    """
    # The bits of floats that are not negative, taken for whole numbers, have the order of the floats. A float64 that
    # was a float32 ends in 29 zero bits, which hold an id.
    ids = torch.arange(behind.shape[-1], device=behind.device)
    keys = behind.double().view(torch.int64).add_(ids)
    return keys.topk(count, largest=False).values & (2**29 - 1)


def take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Those rows of a tensor, in ascending order; the tensor itself where they are all of them."""
    if len(rows) == len(tensor):
        return tensor
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))


def _greedy(logits: Tensor, best: Tensor, _draws: Sequence[Draw]) -> Tensor:
    """The best token, the first of equals."""
    if logits.device.type != "cpu":
        return _first(logits, best)  # which of equals ``max`` finds is left open elsewhere
    return logits.max(-1).indices  # twice as fast as argmax


def _first(logits: Tensor, best: Tensor) -> Tensor:
    """The first place (rows,) of the row's best logit; in rows that are no numbers the last one."""
    last = logits.shape[-1] - 1
    places = torch.arange(last + 1, device=logits.device)
    return torch.where(logits == best, places, last).amin(-1)


def _draw(logits: Tensor, best: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens of shape (rows,) out of the whole vocabulary."""
    behind = best - logits
    columns, unit = _columns(draws, behind), _unit(behind)
    weights = _weights(behind, columns, unit)
    if any(draw.min_p for draw in draws):  # a pass over everything
        weights = _without_unlikely(weights, columns, unit)
    return _at_quantile(weights, columns.quantile).squeeze(-1)


def _draw_ranked(logits: Tensor, best: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens of shape (rows,) out of the best tokens."""
    return _draw_among(_CANDIDATES, best - logits, draws)


def _draw_among(count: int, behind: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens of shape (rows,) out of the best ``count``; rows that need more are drawn again with more."""
    columns, unit, vocabulary = _columns(draws, behind), _unit(behind), behind.shape[-1]
    wanted = [min(draw.top_k or vocabulary, vocabulary) for draw in draws]
    count = min(count, max(wanted))
    ids = ranked(behind, count)
    weights = _weights(behind.gather(-1, ids), columns, unit)
    weights = weights.masked_fill(torch.arange(count, device=ids.device) >= columns.top_k, 0)
    mass = weights.cumsum(-1, dtype=torch.float64)
    whole = mass[:, -1:]
    if any(draw.top_k is None for draw in draws):
        everything = _weights(behind, columns, unit).sum(-1, keepdim=True, dtype=torch.float64)
        whole = torch.where(columns.top_k.isinf(), everything, whole)
    # A token stays while the mass in front of it has not reached top_p; the first one always stays.
    weights = weights.masked_fill(mass - weights >= columns.top_p * whole, 0)
    places = _at_quantile(_without_unlikely(weights, columns, unit), columns.quantile)
    tokens = ids.gather(-1, places).squeeze(-1)
    if max(wanted) > count:  # else no row can lack anything, and the device need not be asked
        lacks = torch.where(columns.top_k.isinf(), mass[:, -1:] < columns.top_p * whole, columns.top_k > count)
        lacking = [i for i, (lack,) in enumerate(lacks.tolist()) if lack]
        if lacking:
            index = torch.tensor(lacking, device=tokens.device)
            tokens[index] = _draw_among(count * _WIDER, take(behind, lacking), [draws[i] for i in lacking])
    return tokens


def _columns(draws: Sequence[Draw], like: Tensor) -> Columns:
    fields = [
        (max(d.temperature, _COLDEST), float("inf") if d.top_k is None else d.top_k, d.top_p, d.min_p, d.quantile)
        for d in draws
    ]
    columns = Columns(*torch.tensor(fields, dtype=torch.float64, device=like.device).unsqueeze(1).unbind(-1))
    return columns._replace(temperature=columns.temperature.to(like.dtype), min_p=columns.min_p.to(like.dtype))


def _unit(behind: Tensor) -> float:
    """The weight of a best token: as fine as it can be while a float64 holds every sum over the vocabulary exactly."""
    return 2.0 ** (52 - behind.shape[-1].bit_length())


def _weights(behind: Tensor, columns: Columns, unit: float) -> Tensor:
    """Probabilities relative to the best token's, as whole numbers of which that one has ``unit``."""
    return (behind / -columns.temperature).exp_().mul_(unit).round_()


def _without_unlikely(weights: Tensor, columns: Columns, unit: float) -> Tensor:
    return weights.masked_fill(weights < columns.min_p * unit, 0)


def _at_quantile(weights: Tensor, quantile: Tensor) -> Tensor:
    """The place of a quantile (rows, 1) in the distribution that ``weights`` (rows, places) are: shape (rows, 1).

    In rows that are no numbers it is any place.
    """
    blocks = functional.pad(weights, (0, -weights.shape[-1] % _BLOCK)).reshape(len(weights), -1, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    whole = sums.sum(-1, keepdim=True)
    # quantile < 1, but the product may be rounded up to the whole, which nothing passes
    block, rest = _passing(sums, (quantile * whole).floor().minimum(whole - 1))
    inside, _ = _passing(blocks.take_along_dim(block.unsqueeze(-1), 1).squeeze(1), rest)
    return (block * _BLOCK + inside).clamp(max=weights.shape[-1] - 1)


def _passing(parts: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place whose running sum passes ``target``, and what is left of the target there; all (rows, 1)."""
    sums = parts.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(sums, target, right=True).clamp(max=parts.shape[-1] - 1)
    return place, target - sums.gather(-1, place) + parts.gather(-1, place)
