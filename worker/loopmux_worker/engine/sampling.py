"""Choosing the next tokens: logits, parameters and history in, a token per request out. Pure torch, no model.

Randomness is counter-based: the draw at absolute position i of a request comes from (seed, i) and nothing else, so that
a result depends neither on batch neighbours nor on a restart in the middle.

Order: logit bias and penalties, grammar, temperature, top-k, top-p, min-p. The repetition penalty (Keskar et al. 2019)
counts prompt and output, presence and frequency penalties count the output alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopmux.errors import BadRequestError, EngineError
from loopmux.messages import Sampling
from loopmux.results import TokenLogprob
from loopmux_worker.engine import drawing
from loopmux_worker.engine.drawing import Draw

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Pick:
    """A chosen token, with its log probability under the model's own distribution if that was asked for."""

    token: int
    logprob: TokenLogprob | None = None


class Grammar(Protocol):
    """What an output is held to."""

    complete: bool

    def allowed(self) -> Tensor:
        """Which tokens may come next: shape (vocabulary,), on the CPU.

        Raises:
            EngineError: it cannot be told.
        """
        ...

    def push(self, token: int) -> None:
        """Take the next token.

        Raises:
            EngineError: it may not come.
        """
        ...


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
    """How the tokens of one request are chosen, and what was chosen so far.

    Args:
        sampling: checked parameters.
        seed: see ``seed_of``.
        vocabulary: width of the model's head.
        prompt: the prompt's token ids, for the repetition penalty.
        written: the output's token ids so far, which the grammar has taken.
        logprobs: alternatives to report per token; None for no log probabilities.
        device: where the logits will be.
        grammar: what the output is held to.

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
        written: Sequence[int] = (),
        logprobs: int | None = None,
        device: torch.device | str = "cpu",
        grammar: Grammar | None = None,
    ) -> None:
        self._sampling, self._seed, self._logprobs, self._grammar = sampling, seed, logprobs, grammar
        # Each of shape (vocabulary,), and None for what the request does not ask for.
        self._bias = _bias(sampling, vocabulary, device)
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            # An embedding may have more rows than the head has outputs: of those there is nothing to penalise
            made = [token for token in (*prompt, *written) if token < vocabulary]
            self._seen[torch.tensor(made, dtype=torch.long, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = (
                torch.bincount(torch.tensor(written, dtype=torch.long), minlength=vocabulary).float().to(device)
            )

    def note(self, token: int) -> None:
        """Count a token of the output.

        Raises:
            EngineError: the grammar does not allow it.
        """
        if self._grammar is not None:
            self._grammar.push(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    @property
    def complete(self) -> bool:
        """Whether the output is whole by its grammar, so that nothing may follow."""
        return self._grammar is not None and self._grammar.complete

    def choose(self, logits: Tensor, position: int) -> Pick:
        """The token at an absolute position of the output, from logits of shape (vocabulary,). Does not ``note`` it.

        Raises:
            EngineError: the logits are not numbers, or the grammar cannot tell what may come.
        """
        (pick,) = choose_rows(logits.unsqueeze(0), [self], [position])
        if isinstance(pick, EngineError):
            raise pick
        return pick

    def _draw(self, position: int) -> Draw:
        sampling = self._sampling
        quantile = uniform(self._seed, position)
        return Draw(sampling.temperature, sampling.top_k or None, sampling.top_p, sampling.min_p, quantile)


def choose_rows(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> list[Pick | EngineError]:
    """What each request's sampler chooses at its position of the output, as if it were alone. Does not ``note`` it.

    ``logits`` has shape (rows, vocabulary), any floating type, and a row per sampler. A row whose logits are not
    numbers, or whose grammar fails, gets an error, and no other row notices.
    """
    logits = logits.float()
    draws = [sampler._draw(position) for sampler, position in zip(samplers, positions, strict=True)]
    allowed = [_allowed(sampler) for sampler in samplers]
    tokens, best = drawing.choose(_adjusted(logits, samplers, allowed), draws)
    logprobs = _logprobs(logits, tokens, samplers)
    chosen, bests = torch.stack((tokens.double(), best.double())).tolist()  # one transfer; a float64 holds any id
    rows = zip(allowed, chosen, bests, logprobs, positions, strict=True)
    return [
        held if isinstance(held, EngineError) else _pick(int(token), best, logprob, position)
        for held, token, best, logprob, position in rows
    ]


def _pick(token: int, best: float, logprob: TokenLogprob | None, position: int) -> Pick | EngineError:
    if math.isfinite(best):
        return Pick(token, logprob)
    return EngineError(
        f"the model produced {best} as its best logit at position {position}: "
        "its weights are damaged, or its dtype overflows (try dtype: float32)"
    )


def _allowed(sampler: Sampler) -> Tensor | EngineError | None:
    """Which tokens a sampler's grammar allows next; None without one, the error where it cannot be told."""
    try:
        return None if sampler._grammar is None else sampler._grammar.allowed()
    except EngineError as error:
        return error


def _adjusted(logits: Tensor, samplers: Sequence[Sampler], allowed: Sequence[Tensor | EngineError | None]) -> Tensor:
    """Logits (rows, vocabulary) with bias, penalties and what grammars rule out; rows without any stay as they are."""
    for states, adjust in (
        ([sampler._bias for sampler in samplers], _add_bias),
        ([sampler._seen for sampler in samplers], _penalise_seen),
        ([sampler._counts for sampler in samplers], _penalise_counted),
        ([None if isinstance(held, EngineError) else held for held in allowed], _rule_out),
    ):
        rows = [i for i, state in enumerate(states) if state is not None]
        if not rows:
            continue
        state = torch.stack([state for state in states if state is not None])
        part = adjust(drawing.take(logits, rows), state, [samplers[i]._sampling for i in rows])
        all_rows = len(rows) == len(logits)
        logits = part if all_rows else logits.index_copy(0, torch.tensor(rows, device=logits.device), part)
    return logits


def _add_bias(logits: Tensor, bias: Tensor, _: Sequence[Sampling]) -> Tensor:
    return logits + bias


def _penalise_seen(logits: Tensor, seen: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    penalty = _column([sampling.repetition_penalty for sampling in samplings], logits)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _penalise_counted(logits: Tensor, counts: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    presence = _column([sampling.presence_penalty for sampling in samplings], logits)
    frequency = _column([sampling.frequency_penalty for sampling in samplings], logits)
    return logits - presence * (counts > 0) - frequency * counts


def _rule_out(logits: Tensor, allowed: Tensor, _: Sequence[Sampling]) -> Tensor:
    return logits.masked_fill(~allowed.to(logits.device), -math.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _logprobs(logits: Tensor, tokens: Tensor, samplers: Sequence[Sampler]) -> list[TokenLogprob | None]:
    """Log probabilities of the chosen tokens and the best ones under the model's own distribution, where asked for."""
    found: list[TokenLogprob | None] = [None] * len(samplers)
    wanted = {i: sampler._logprobs for i, sampler in enumerate(samplers) if sampler._logprobs is not None}
    if not wanted:
        return found
    rows = list(wanted)
    logits = drawing.take(logits, rows)
    count = min(max(wanted.values()), logits.shape[-1])
    best = drawing.ranked(logits.amax(-1, keepdim=True) - logits, count)
    ids = torch.cat((drawing.take(tokens, rows).unsqueeze(-1), best), -1)
    values = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    for row, (token, *others), (logprob, *more) in zip(rows, ids.tolist(), values.tolist(), strict=True):
        found[row] = TokenLogprob(token, logprob, tuple(zip(others, more, strict=True))[: wanted[row]])
    return found


def _bias(sampling: Sampling, vocabulary: int, device: torch.device | str) -> Tensor | None:
    if not sampling.logit_bias:
        return None
    ids = [int(token) for token in sampling.logit_bias]
    if max(ids) >= vocabulary:
        raise BadRequestError(f"logit_bias: found token {max(ids)}, expected ids below {vocabulary}")
    values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
    return torch.zeros(vocabulary).index_add(0, torch.tensor(ids), values).to(device)
