"""What a caller gets back: results, stream events, tool calls, usage and timing.

These are plain frozen dataclasses; the same ``ToolCall``, ``Usage`` and ``Timing`` travel inside messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "deadline", "error"]
"""Why a generation ended: an end or stop token or string, its limit, calls to run. The others come as errors."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the model made, whole.

    Attributes:
        id: unique within the request; the tool message that answers it carries it.
        name: the tool's name as the model wrote it.
        arguments: parsed arguments; empty when ``error`` is set.
        error: why the call could not be parsed, or None. Such a call is answered with the error, never run.
        raw: the text the model produced for it, where ``error`` is set.
    """

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, or their sum over a loop.

    ``cached_tokens`` are those of ``prompt_tokens`` whose attention state was reused, ``computed_tokens`` the others.
    ``rewritten_tokens`` are those of earlier answers that the prompt does not repeat as they were produced, because the
    chat template writes them otherwise now; the prompt is computed again from the first of them.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    rewritten_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not found in the cache."""
        return self.prompt_tokens - self.cached_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.rewritten_tokens + other.rewritten_tokens,
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went inside the worker, seconds. Tokens are those of the attempt that ended.

    Attributes:
        queued: from arrival at the worker to the start of its prefill.
        first_token: from arrival at the worker to its first token (TTFT there): ``queued`` and ``prefill`` together.
        total: from arrival at the worker to its end.
        prefill: from the start of its prefill to its first token.
        per_token: mean time from one token to the next (TPOT); 0 where there was one or none.
    """

    queued: float = 0.0
    first_token: float = 0.0
    total: float = 0.0
    prefill: float = 0.0
    per_token: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A produced token, its log probability, and the most likely alternatives as (token id, log probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of clean text. The deltas of a stream, joined, are the result's text.

    ``position`` is the absolute index of the first of the tokens ``token_ids`` that this piece came with.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    position: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of what the model thinks before it answers. These of a stream, joined, are the result's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """The request waits: where it stands in the queue and what its model is doing (queued, building, loading, warming).

    Attributes:
        position: about how many get a slot before it does, itself included; 0 where that is not known.
        elapsed: seconds in this phase.
        detail: a line for people: progress, or a reason.
    """

    phase: str
    position: int = 0
    elapsed: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation.

    Attributes:
        text: clean text, without prompt, reasoning, special tokens or tool calls.
        token_ids: all produced token ids, end token included.
        finish_reason: why it ended.
        tool_calls: the calls of this turn, in order.
        model, adapter: as the request named them; a model id that has an adapter names none besides.
        worker: who answered.
        request_id: hexadecimal, as in the broker's log (at level debug), and in a worker's where something is wrong.
        attempts: 1 unless a worker was lost, or left, on the way.
        reasoning: what the model thought, for models that say so.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    model: str
    adapter: str | None
    worker: str
    request_id: str
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    attempts: int = 1
    reasoning: str = ""


StreamEvent = TextDelta | ToolCall | Waiting | Usage | ReasoningDelta
"""What iterating over a stream yields. ``Usage`` comes last."""
