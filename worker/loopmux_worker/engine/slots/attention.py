"""Attention over KV rows, registered with transformers as an attention implementation.

A step is one packed forward: input ids of shape (1, tokens), where consecutive tokens belong to segments (see
``schedule``). The function stores each token's key and value in its sequence's row and attends from each query to its
own row alone. transformers makes no mask for an implementation that it has no mask function for, which suits us: what a
token may see follows from its row and position.

Grouped-query heads are folded into the query axis, so that all heads that share a key are one query matrix. On a CPU
with bf16 that took 1.7 ms where ``enable_gqa`` took 8.6 (16 rows of 576 tokens, 12 heads on 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from loopmux_worker.engine.slots.rows import Copy
from loopmux_worker.engine.slots.schedule import Segment

_NAMES = itertools.count()
# What some models pass to their attention that this one does not compute; None or absent is fine.
_FOREIGN = ("softcap", "s_aux", "head_mask", "cache_position_bias", "position_bias")


class Unsupported(Exception):
    """The model asks for something that attention over rows does not compute; the message says what."""


@dataclass(slots=True)
class Group:
    """Segments that are computed in one call: neighbours in rows ``first`` to ``last`` with ``count`` tokens each.

    ``tokens`` are their places in the packed step, ``length`` the longest state among them, new tokens included.
    """

    first: int
    last: int
    count: int
    length: int
    tokens: slice
    positions: Tensor  # (segments, count): absolute position of each query
    even: bool  # whether all states are that long
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, folded: int) -> Tensor | None:
        """What each query sees, (segments, 1, folded * count, length) of bool; None where it is everything."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, folded)
        return self.masks[window]

    def _mask(self, window: int | None, folded: int) -> Tensor | None:
        if self.count == 1 and window is None and self.even:
            return None
        keys = torch.arange(self.length, device=self.positions.device)
        seen = keys <= self.positions[..., None]
        if window is not None:
            seen &= keys > self.positions[..., None] - window
        rows, count, length = seen.shape
        return seen[:, None, None].expand(rows, 1, folded, count, length).reshape(rows, 1, folded * count, length)


@dataclass(frozen=True, slots=True)
class Layout:
    """One step for the attention of every layer: where its keys go, and which calls compute it."""

    places: Tensor  # (tokens,): row * context + position
    groups: tuple[Group, ...]


class Memory:
    """The KV memory of one model: keys and values of shape (rows, context, kv heads, head size) per layer.

    A layer's tensors are made when its first keys come, for only then their shape is certain.
    """

    def __init__(self, rows: int, context: int, device: torch.device) -> None:
        self.rows, self.context, self.device = rows, context, device
        self.layout: Layout | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.name = f"loopmux_rows_{next(_NAMES)}"
        AttentionInterface.register(self.name, self.attend)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.element_size() for layer in self._layers.values() for t in layer)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Make copies, in order."""
        for copy in copies:
            for layer in self._layers.values():
                for tensor in layer:
                    tensor[copy.target, : copy.length] = tensor[copy.source, : copy.length]

    def prepare(self, segments: Sequence[Segment]) -> None:
        """Say what the next forward computes; the order of its tokens is that of the segments."""
        places: list[int] = []
        groups: list[Group] = []
        for members in _neighbours(segments):
            start = len(places)
            for segment in members:
                first = segment.row * self.context + segment.start
                places += range(first, first + segment.count)
            count = members[0].count
            positions = torch.tensor([range(s.start, s.start + count) for s in members], device=self.device)
            length = max(s.start + count for s in members)
            tokens = slice(start, len(places))
            even = all(s.start + count == length for s in members)  # worked out here: a GPU would have to be waited for
            groups.append(Group(members[0].row, members[-1].row + 1, count, length, tokens, positions, even))
        self.layout = Layout(torch.tensor(places, device=self.device), tuple(groups))

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG002 - the signature is that of transformers
        scaling: float | None = None,
        dropout: float = 0.0,  # noqa: ARG002 - of training
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer: query (1, heads, tokens, size), key and value (1, kv heads, tokens, size).

        Returns:
            (1, tokens, heads, size), and None for the weights.

        Raises:
            Unsupported: the model needs more than this.
        """
        layout = self.layout
        assert layout is not None, "prepare() comes before a forward"
        for name in _FOREIGN:
            if kwargs.get(name) is not None:
                raise Unsupported(f"its attention uses {name}")
        if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
            raise Unsupported(f"its attention is called with queries {tuple(query.shape)}, keys {tuple(key.shape)}")
        keys, values = self._layer(module, key, value)
        keys.flatten(0, 1)[layout.places] = key[0].transpose(0, 1)
        values.flatten(0, 1)[layout.places] = value[0].transpose(0, 1)
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % kv_heads:
            raise Unsupported(f"it has {heads} heads on {kv_heads} key heads")
        folded = heads // kv_heads
        out = query.new_empty(1, query.shape[2], heads, value.shape[3])
        for group in layout.groups:
            rows = group.last - group.first
            # (heads, tokens, size) -> (rows, kv heads, folded * count, size)
            asked = query[0, :, group.tokens].reshape(kv_heads, folded, rows, group.count, query.shape[3])
            asked = asked.permute(2, 0, 1, 3, 4).flatten(2, 3)
            got = scaled_dot_product_attention(
                asked,
                keys[group.first : group.last, : group.length].transpose(1, 2),
                values[group.first : group.last, : group.length].transpose(1, 2),
                attn_mask=group.mask(sliding_window, folded),
                scale=scaling,
            )
            got = got.reshape(rows, kv_heads, folded, group.count, value.shape[3]).permute(0, 3, 1, 2, 4)
            out[0, group.tokens] = got.reshape(rows * group.count, heads, value.shape[3])
        return out, None

    def _layer(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            raise Unsupported(f"its attention layers ({type(module).__name__}) are not numbered")
        layer = self._layers.get(index)
        if layer is None:
            made = [t.new_zeros(self.rows, self.context, t.shape[1], t.shape[3]) for t in (key, value)]
            layer = self._layers[index] = (made[0], made[1])
        return layer


def _neighbours(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Runs of segments that one call can compute: single tokens in rows that follow each other, else one by one."""
    runs: list[list[Segment]] = []
    for segment in segments:
        last = runs[-1][-1] if runs else None
        if last is not None and last.count == segment.count == 1 and segment.row == last.row + 1:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs
