"""Choosing the next token: logits, parameters and history in, a token out. Pure torch, no model.

Randomness is counter-based: the draw at absolute position i of a request comes from (seed, i) and nothing else, so that
a result depends neither on batch neighbours nor on a restart in the middle.

Order: logit bias and penalties, temperature, top-k, top-p, min-p. The repetition penalty (Keskar et al. 2019) counts
prompt and output, presence and frequency penalties count the output alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopmux.errors import BadRequestError, EngineError
from loopmux.messages import Sampling
from loopmux.results import TokenLogprob

_MASK = 2**64 - 1
_CANDIDATES = 1024
"""How many of the best tokens are looked at first for top-p: they nearly always hold its mass, and sorting a whole
vocabulary costs more than the rest of the choice."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A chosen token, with its log probability under the model's own distribution if that was asked for."""

    token: int
    logprob: TokenLogprob | None = None


def seed_of(sampling: Sampling, request: bytes) -> int:
    """The request's seed: the one it names, else one drawn from its random id, the same in every attempt."""
    if sampling.seed is not None:
        return sampling.seed
    return int.from_bytes(hashlib.blake2b(request, digest_size=8).digest(), "big")


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a position: splitmix64 over seed and position (Steele et al. 2014)."""
    return _mix(_mix(seed & _MASK) + position * 0x9E3779B97F4A7C15) / 2**64


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    # 53 bits, so that the quotient by 2**64 is exact and below 1
    return (x ^ (x >> 31)) & ~0x7FF


class Sampler:
    """Chooses the tokens of one request.

    Args:
        sampling: checked parameters.
        seed: see ``seed_of``.
        vocabulary: width of the model's head.
        prompt: the prompt's token ids, for the repetition penalty.
        logprobs: alternatives to report per token; None for no log probabilities.

    Raises:
        BadRequestError: ``logit_bias`` names a token that the model does not have.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        seed: int,
        vocabulary: int,
        prompt: Sequence[int] = (),
        logprobs: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._sampling, self._seed, self._logprobs = sampling, seed, logprobs
        self._bias = _bias(sampling, vocabulary, device)
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocabulary, device=device)

    def note(self, token: int) -> None:
        """Count a token of the output: a chosen one, or one of a replayed prefix."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def choose(self, logits: Tensor, position: int) -> Pick:
        """The token at an absolute position of the output, from logits of shape (vocabulary,). Does not ``note`` it.

        Raises:
            EngineError: the logits are not numbers.
        """
        logits = logits.float()
        adjusted = self._adjust(logits)
        best = adjusted.max()
        if not torch.isfinite(best):
            raise EngineError(
                f"the model produced {best.item()} as its best logit at position {position}: "
                "its weights are damaged, or its dtype overflows (try dtype: float32)"
            )
        if self._sampling.temperature == 0:
            token = int(adjusted.argmax())
        else:
            scaled = (adjusted - best) / self._sampling.temperature
            token = _draw(scaled, self._sampling, uniform(self._seed, position))
        return Pick(token, self._logprob(logits, token))

    def _adjust(self, logits: Tensor) -> Tensor:
        sampling = self._sampling
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            punished = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, punished, logits)
        if self._counts is not None:
            logits = logits - sampling.presence_penalty * (self._counts > 0) - sampling.frequency_penalty * self._counts
        return logits

    def _logprob(self, logits: Tensor, token: int) -> TokenLogprob | None:
        if self._logprobs is None:
            return None
        log_probabilities = torch.log_softmax(logits, -1)
        values, ids = log_probabilities.topk(min(self._logprobs, len(logits)))
        top = tuple(zip(map(int, ids.tolist()), values.tolist(), strict=True))
        return TokenLogprob(token, float(log_probabilities[token]), top)


def _bias(sampling: Sampling, vocabulary: int, device: torch.device | str) -> tuple[Tensor, Tensor] | None:
    if not sampling.logit_bias:
        return None
    ids = [int(token) for token in sampling.logit_bias]
    if max(ids) >= vocabulary:
        raise BadRequestError(f"logit_bias: found token {max(ids)}, expected ids below {vocabulary}")
    values = list(sampling.logit_bias.values())
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(values, device=device)


def _draw(scaled: Tensor, sampling: Sampling, u: float) -> int:
    """The token at quantile ``u`` of the filtered distribution; ``scaled`` are logits over temperature, best one 0."""
    ids: Tensor | None = None
    if sampling.top_k:
        scaled, ids = scaled.topk(min(sampling.top_k, len(scaled)))
    if sampling.top_p < 1:
        scaled, order = _nucleus(scaled, sampling.top_p, ordered=ids is not None)
        ids = ids[order] if ids is not None else order
    probabilities = scaled.double().exp()
    if sampling.min_p:
        probabilities = torch.where(probabilities >= sampling.min_p, probabilities, 0)  # the best one has 1
    cumulative = probabilities.cumsum(0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    # u < 1, but rounding may still reach the end, where the last entries can be impossible ones
    if index >= len(cumulative):
        index = int(probabilities.nonzero()[-1])
    return int(ids[index]) if ids is not None else index


def _nucleus(scaled: Tensor, top_p: float, *, ordered: bool) -> tuple[Tensor, Tensor]:
    """The fewest best tokens whose probabilities reach ``top_p``, best first, with their places in ``scaled``."""
    total = scaled.double().logsumexp(0)
    for count in (min(_CANDIDATES, len(scaled)), len(scaled)):
        if ordered:
            best, places = scaled, torch.arange(len(scaled), device=scaled.device)
        else:
            best, places = scaled.topk(count)
        mass = (best.double() - total).exp().cumsum(0)
        if float(mass[-1]) >= top_p or count == len(scaled):
            break
    # A token stays while the mass in front of it has not reached top_p; the first one always stays.
    keep = int((mass < top_p).sum()) + 1
    return best[:keep], places[:keep]
