"""One packed forward of a transformers model over KV rows, and whether a model can be run like that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmux_worker.causes import device_lost, ran_out
from loopmux_worker.engine.base import Key
from loopmux_worker.engine.slots.attention import KVMemory, Unsupported
from loopmux_worker.engine.slots.lora import MixedAdapters
from loopmux_worker.engine.slots.schedule import Segment

_TRIED = 24
"""Tokens of the trial."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest difference of two logits in the trial, as a share of their range. Masks or positions that are wrong show up
as a difference of the order of the range itself."""


class Trial(NamedTuple):
    """What came of trying a model over rows.

    Attributes:
        why_not: why it cannot be run like that, if so.
        token_bytes: of one token's keys and values.
        plain: the logits that it was compared with.
    """

    why_not: str | None
    token_bytes: int = 0
    plain: tuple[Tensor, ...] = ()


class Forward:
    """Runs a model over KV rows.

    Args:
        model: a causal language model of transformers; its attention is switched to ``memory``.
        memory: the rows.
        adapters: told about every step.
    """

    def __init__(self, model: Any, memory: KVMemory, adapters: MixedAdapters) -> None:
        self._model, self.memory, self._adapters = model, memory, adapters
        model.set_attn_implementation(memory.name)

    def __call__(self, segments: Sequence[Segment], ids: list[int], positions: list[int], ends: list[int]) -> Tensor:
        """Logits (ends, vocabulary) behind the tokens at the places ``ends`` of a packed step."""
        device = self.memory.device
        self.memory.prepare(segments)
        self._adapters.use(
            [(segment.adapter, segment.count) for segment in segments],
            [(segment.adapter, 1) for segment in segments if segment.samples],
        )
        out = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(ends, dtype=torch.long, device=device),
        )
        logits: Tensor = out.logits[0]
        return logits


@torch.inference_mode()
def try_rows(
    model: Any,
    adapters: MixedAdapters,
    device: torch.device,
    vocabulary: int,
    plain: tuple[Tensor, ...] = (),
    kernels: str = "auto",
) -> Trial:
    """Whether a model can be run over rows.

    Decided by trying: two sequences, in chunks, beside each other and token by token, have to give the logits that the
    model gives by itself, within ``_TOLERANCE``. Afterwards the model is as it was.

    Args:
        plain: the logits of an earlier trial, where the model was changed since in a way that must not show.
        kernels: see ``KVMemory``.
    """
    own = model.config._attn_implementation
    if not type(model)._can_set_attn_implementation():
        return Trial(f"{type(model).__name__} has an attention of its own, which cannot be replaced")
    one = [(7 * i + 3) % vocabulary for i in range(_TRIED)]
    other = [(11 * i + 5) % vocabulary for i in range(_TRIED)]
    memory = _Watched(2, _TRIED, device, kernels)
    try:
        if not plain:
            inputs = [torch.tensor([ids], device=device) for ids in (one, other)]
            plain = tuple(model(input_ids=ids, use_cache=False).logits[0] for ids in inputs)
        found = _tried(Forward(model, memory, adapters), one, other)
    except (Unsupported, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if ran_out(error) or device_lost(error):
            raise  # that says nothing about the model
        return Trial(f"{type(model).__name__} cannot be run over rows ({error})")
    finally:
        model.set_attn_implementation(own)
    if untold := _untold(model, memory.windows):
        return Trial(f"{type(model).__name__} {untold}")
    for wanted, got in zip(plain, found, strict=True):
        extent = float(wanted.max() - wanted.min())
        worst = float((wanted.float() - got.float()).abs().max())
        if not worst <= _TOLERANCE.get(wanted.dtype, 0.1) * extent:
            found_out = f"other logits over rows (by {worst:.3g} in a range of {extent:.3g})"
            return Trial(f"{type(model).__name__} gives {found_out}")
    return Trial(None, memory.size // (memory.rows * memory.context), plain)


def positions_by_length(model: Any, context: int) -> str | None:
    """Why sequences of up to ``context`` tokens cannot share a step, if a long one moves the positions of all.

    With LongRoPE (https://arxiv.org/abs/2402.13753) transformers takes one set of frequencies for a whole call: that of
    its longest sequence.
    """
    given = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for rope in (given, *given.values()):  # one for all layers, or one for each kind of them
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limit = rope["original_max_position_embeddings"]
            if context > limit:
                return (
                    f"{type(model).__name__} places all tokens of a step by the longest sequence in it once that has "
                    f"more than {limit} tokens (rope_type: longrope); with context: {limit} none has"
                )
    return None


class _Watched(KVMemory):
    """Rows that note which windows the layers ask for."""

    def __init__(self, rows: int, context: int, device: torch.device, kernels: str) -> None:
        super().__init__(rows, context, device, kernels)
        self.windows: set[int | None] = set()

    def attend(self, *given: Any, **named: Any) -> tuple[Tensor, None]:
        self.windows.add(named.get("sliding_window"))
        return super().attend(*given, **named)


def _untold(model: Any, windows: set[int | None]) -> str | None:
    """What limits the sight of a token and is in the mask alone, which is not made here.

    Such limits are thousands of tokens wide: the trial is too short for them to show in its logits.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        return f"has layers of the kind {', '.join(sorted(unknown))}"
    slides = "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
    return "does not tell its attention about its sliding window" if slides and windows <= {None} else None


def _tried(forward: Forward, one: list[int], other: list[int]) -> list[Tensor]:
    """The logits of both sequences, computed in four steps of different shapes."""
    sequences = ((Key(b"1", 0), 0, one), (Key(b"2", 0), 1, other))
    logits: list[list[Tensor]] = [[], []]
    # (start, count) of each sequence in each step; 0 tokens leave it out.
    for shares in (((0, 9), (0, 5)), ((9, 1), (5, 12)), ((10, 1), (17, 1)), ((11, _TRIED - 11), (18, _TRIED - 18))):
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        for (key, row, tokens), (start, count) in zip(sequences, shares, strict=True):
            segments.append(Segment(key, row, start, count, True, None))
            ids += tokens[start : start + count]
            positions += range(start, start + count)
        # Backwards, so that a model shows that gives logits of all tokens, whichever are asked for.
        out = forward(segments, ids, positions, list(range(len(ids)))[::-1]).flip(0)
        cut = shares[0][1]
        logits[0].append(out[:cut])
        logits[1].append(out[cut:])
    return [torch.cat(part) for part in logits]
