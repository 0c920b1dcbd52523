"""Attention over KV rows, registered with transformers as an attention implementation.

A step is one packed forward: input ids of shape (1, tokens), where consecutive tokens belong to segments (see
``schedule``). The function stores each token's key and value in its sequence's row and attends from each query to its
own row alone. transformers makes no mask for an implementation that it has no mask function for, which suits us: what a
token may see follows from its row and position.

Grouped-query heads are folded into the query axis, so that all heads that share a key are one query matrix. On a CPU
with bf16 that took 1.7 ms where ``enable_gqa`` took 8.6 (16 rows of 576 tokens, 12 heads on 4). Only a sequence's first
chunk is not folded: it needs no mask, and took 2.4 ms where a folded and masked one took 3.4 (512 tokens).

Masks are numbers to add, in the type of the queries, made once a step: every layer would make them of a mask of bool.

On a CPU segments of a few tokens, as all are that decode, are computed by a kernel of our own where there is one (see
``native``), which stores the keys of the others, too.
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

from loopmux.errors import ConfigError
from loopmux_worker.engine.slots import native
from loopmux_worker.engine.slots.rows import Copy
from loopmux_worker.engine.slots.schedule import Segment
from loopmux_worker.engine.slots.zeroed import zeros

_NAMES = itertools.count()
_NEAR = 64
"""Tokens that computing in vain costs about as much as another call."""
_FEW = 8
"""Most tokens of a segment that the kernel computes, one by one. With 16 rows of 544 tokens, segments of 8
took 46 ms where torch took 54, segments of 16 87 and 78 (12 layers of 12 heads on 4, bfloat16).
"""
# What some models pass to their attention that this one does not compute; None or absent is fine.
_FOREIGN = ("softcap", "s_aux", "head_mask", "cache_position_bias", "position_bias")


class Unsupported(Exception):
    """The model asks for something that attention over rows does not compute; the message says what."""


@dataclass(slots=True)
class Group:
    """Segments that are computed in one call, with ``count`` tokens each.

    ``rows`` are theirs: neighbours, which can be viewed, or any, which have to be gathered. ``tokens`` are their places
    in the packed step, ``length`` the longest state among them, new tokens included.
    """

    rows: slice | Tensor
    count: int
    length: int
    tokens: slice
    starts: tuple[int, ...]  # position of the first token of each segment
    device: torch.device
    masks: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict)  # by all that layers may differ in

    def causal(self, window: int | None) -> bool:
        """Whether it is one sequence from its beginning, so that the order of the tokens says what each sees."""
        return self.count == self.length and len(self.starts) == 1 and (window is None or window >= self.length)

    def mask(self, window: int | None, folded: int, dtype: torch.dtype) -> Tensor | None:
        """0 for what each query sees, else -inf: (segments, 1, folded * count, length); None where it is everything."""
        kind = window, folded, dtype
        if kind not in self.masks:
            self.masks[kind] = self._mask(*kind)
        return self.masks[kind]

    def _mask(self, window: int | None, folded: int, dtype: torch.dtype) -> Tensor | None:
        if self.count == 1 and window is None and min(self.starts) == self.length - 1:
            return None
        starts = torch.tensor(self.starts, device=self.device)[:, None, None]
        positions = starts + torch.arange(self.count, device=self.device)[:, None]
        keys = torch.arange(self.length, device=self.device)
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return mask[:, None].repeat(1, 1, folded, 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """One step for the attention of every layer: where its keys go, and which calls compute it."""

    step: native.Step
    groups: tuple[Group, ...]  # of all tokens
    long: tuple[Group, ...]  # those that the kernel leaves


class KVMemory:
    """The KV memory of one model: keys and values of shape (rows, kv heads, context, head size) per layer.

    So the keys of one head, which are read together, lie together. A layer's tensors are made when its first keys come,
    for only then their shape is certain.

    Args:
        rows: how many.
        context: tokens of each.
        device: where they are.
        kernels: what computes attention: ``torch``, ``native`` (our kernel, or nothing), or ``auto`` (our kernel where
            there is one).
    """

    def __init__(self, rows: int, context: int, device: torch.device, kernels: str = "auto") -> None:
        self.rows, self.context, self.device, self._wanted = rows, context, device, kernels
        self.gathers = device.type == "cuda"  # whether rows anywhere share a call; see ``_together``
        self.layout: Layout | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._kernels: dict[tuple[torch.dtype, int, int, bool], native.Kernel | str] = {}
        self._reached = [0] * rows  # tokens behind which a row holds nothing but zeros
        self.name = f"loopmux_rows_{next(_NAMES)}"
        AttentionInterface.register(self.name, self.attend)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.element_size() for layer in self._layers.values() for t in layer)

    @property
    def attention(self) -> str:
        """What computes it, for people; where it is torch, why."""
        found = {kernel if isinstance(kernel, str) else "" for kernel in self._kernels.values()}
        return ", ".join(f"torch: {reason}" if reason else "native" for reason in sorted(found))

    def copy(self, copies: Sequence[Copy]) -> None:
        """Make copies, in order."""
        for copy in copies:
            self._reached[copy.target] = max(self._reached[copy.target], copy.length)
            for layer in self._layers.values():
                for tensor in layer:
                    tensor[copy.target, :, : copy.length] = tensor[copy.source, :, : copy.length]

    def _clear_behind(self, row: int, tokens: int) -> None:
        """Take out what an earlier sequence left behind a row's first tokens.

        Rows of a call are read as far as the longest of them goes. What a mask hides counts nothing if it is a number;
        one that is none makes all of the row none.
        """
        for layer in self._layers.values() if self._reached[row] > tokens else ():
            for tensor in layer:
                tensor[row, :, tokens : self._reached[row]] = 0
        self._reached[row] = tokens

    def prepare(self, segments: Sequence[Segment]) -> None:
        """Say what the next forward computes; the order of its tokens is that of the segments.

        Raises:
            IndexError: a segment lies outside the rows.
        """
        rows: list[int] = []
        positions: list[int] = []
        groups: list[Group] = []
        for members in _together(segments, anywhere=self.gathers):
            start, count = len(rows), members[0].count
            for segment in members:
                if not (0 <= segment.row < self.rows and 0 <= segment.start <= self.context - count):
                    raise IndexError(f"{segment} is outside {self.rows} rows of {self.context} tokens")
                self._clear_behind(segment.row, segment.start + count)
                rows += [segment.row] * count
                positions += range(segment.start, segment.start + count)
            starts = tuple(segment.start for segment in members)
            tokens = slice(start, len(rows))
            first, last = members[0].row, members[-1].row
            viewed = last - first == len(members) - 1
            picked = slice(first, last + 1) if viewed else torch.tensor([s.row for s in members], device=self.device)
            groups.append(Group(picked, count, max(starts) + count, tokens, starts, self.device))
        where = torch.tensor((rows, positions), device=self.device)
        few = [place for group in groups if group.count <= _FEW for place in range(len(rows))[group.tokens]]
        step = native.Step(where[0], where[1], torch.tensor(few, dtype=torch.long), torch.get_num_threads())
        self.layout = Layout(step, tuple(groups), tuple(group for group in groups if group.count > _FEW))

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
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
        if attention_mask is not None:  # transformers makes none: it says what this function does not know
            raise Unsupported(f"it makes a mask of its own, {tuple(attention_mask.shape)}")
        if query.shape[0] != 1 or not key.shape[2] == query.shape[2] == len(layout.step.rows):
            raise Unsupported(f"its attention is called with queries {tuple(query.shape)}, keys {tuple(key.shape)}")
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % kv_heads:
            raise Unsupported(f"it has {heads} heads on {kv_heads} key heads")
        keys, values = self._layer(module, key, value)
        kernel = self._kernel(query, key, value)
        if isinstance(kernel, native.Kernel):
            out = kernel(layout.step, query, key, value, keys, values, sliding_window, scaling)
            for group in layout.long:
                out[group.tokens] = _group(group, query, keys, values, sliding_window, scaling)
            return out.unsqueeze(0), None
        rows, positions = layout.step.rows, layout.step.positions
        keys[rows, :, positions] = key[0].transpose(0, 1)
        values[rows, :, positions] = value[0].transpose(0, 1)
        parts = [_group(group, query, keys, values, sliding_window, scaling) for group in layout.groups]
        # Contiguous, as transformers' own: some models view it.
        return (parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor) -> native.Kernel | str:
        """Our kernel for a layer, or why torch computes it.

        Raises:
            ConfigError: there has to be one, and there is none.
        """
        alike = query.dtype == key.dtype == value.dtype and query.shape[3] == key.shape[3] and key.shape == value.shape
        shape = query.dtype, query.shape[3], query.shape[1] // key.shape[1]
        if (*shape, alike) not in self._kernels:
            if self._wanted == "torch":
                found: native.Kernel | str = "configured"
            elif self.device.type != "cpu":
                found = f"the device is {self.device}"
            elif not alike:
                found = "keys, values and queries are not alike"
            else:
                found = native.find(*shape)
            if self._wanted == "native" and isinstance(found, str):
                raise ConfigError(f"kernels: found native, but there is none for attention: {found}; use auto or torch")
            self._kernels[*shape, alike] = found
        return self._kernels[*shape, alike]

    def _layer(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            raise Unsupported(f"its attention layers ({type(module).__name__}) are not numbered")
        layer = self._layers.get(index)
        if layer is None:
            made = [zeros((self.rows, t.shape[1], self.context, t.shape[3]), like=t) for t in (key, value)]
            layer = self._layers[index] = (made[0], made[1])
        for held, new in zip(layer, (key, value), strict=True):
            if (held.dtype, held.shape[1], held.shape[3]) != (new.dtype, new.shape[1], new.shape[3]):
                raise Unsupported(
                    f"its attention layer {index} is called with keys or values of different shapes or types"
                )
        return layer


def _group(
    group: Group, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scaling: float | None
) -> Tensor:
    """Attention of one group by torch: (tokens, heads, size)."""
    seen = keys[group.rows, :, : group.length], values[group.rows, :, : group.length]
    asked = query[:, :, group.tokens]
    if group.causal(window):
        got = scaled_dot_product_attention(asked, *seen, is_causal=True, scale=scaling, enable_gqa=True)
        return got[0].transpose(0, 1)
    mask = group.mask(window, query.shape[1] // keys.shape[1], query.dtype)
    return _folded(asked[0], *seen, mask, scaling)


def _folded(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of packed queries (heads, rows * count, size) to rows of their own; (rows * count, heads, size)."""
    heads, tokens, _ = query.shape
    rows, kv_heads = keys.shape[:2]
    folded, count = heads // kv_heads, tokens // rows
    asked = query.view(kv_heads, folded, rows, count, -1).permute(2, 0, 1, 3, 4).flatten(2, 3)
    got = scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=scaling)
    return got.view(rows, kv_heads, folded, count, -1).permute(0, 3, 1, 2, 4).reshape(tokens, heads, -1)


def _together(segments: Sequence[Segment], *, anywhere: bool) -> list[list[Segment]]:
    """Runs of segments that one call can compute: single tokens in rows that follow each other, else one by one.

    Rows of a call are computed as long as the longest is, so on a CPU only those of like length share one: 16 rows of
    which one has 900 tokens and the others 100 took 7.1 ms together, 2.4 one by one; where all have 160, 1.1 and 1.4.

    With ``anywhere`` single tokens in any rows: on a GPU a call costs more than gathering what it needs (16 rows
    computed one by one made a step take 57 ms on an H200). There like lengths are those within the same powers of two,
    so that one long state does not make a hundred short ones as long.
    """
    runs: list[list[Segment]] = []
    for segment in segments:
        run = runs[-1] if runs else []
        if run and run[0].count == segment.count == 1 and _shares(segment, run, anywhere):
            run.append(segment)
        else:
            runs.append([segment])
    return runs


def _shares(segment: Segment, run: list[Segment], anywhere: bool) -> bool:
    if anywhere:
        return segment.start.bit_length() == run[0].start.bit_length()
    return segment.row == run[-1].row + 1 and _like(segment.start, run[0].start)


def _like(one: int, other: int) -> bool:
    """Whether two states are of like length: a quarter apart at most, or so short that it does not matter."""
    return abs(one - other) <= max(_NEAR, min(one, other) // 4)
