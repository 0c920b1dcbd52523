"""Mixed LoRA: one forward over packed tokens, of which every span of consecutive ones may use another adapter or none.

A linear layer that adapters target computes, for a token x with adapter i,

    y = W x + b + s_i · B_i A_i x

(LoRA, https://arxiv.org/abs/2106.09685, eq. 3; s = α/r, or α/√r for rsLoRA, https://arxiv.org/abs/2312.03732). For
short spans of several adapters the A_i and B_i are stacked, so that two products serve all of them, and a mask between
the two leaves each token the columns of its own. Layers that are one product (``linears.Joined``) are one for their
adapters, too: of B_i with zeros where a column of A_i is not the layer's. What counts is the number of calls, each of
which goes over the tokens once more, and less what they multiply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loopmux.errors import AdapterNotFoundError, BadRequestError, EngineError
from loopmux_worker.engine import adapterfiles
from loopmux_worker.engine.adapterfiles import Adapter
from loopmux_worker.engine.slots.linears import Joined, JoinedLinear, Replacement, can_pack, packed, product
from loopmux_worker.engine.slots.pairs import Pair, pairs_of

Span = tuple[str | None, int]
"""Consecutive tokens of one request: the name of their adapter or None, and how many they are."""

LONG = 64
"""Tokens from which a span is computed by itself. On 2 CPU cores in bf16, 8 adapters of rank 16 on 768 × 768: by itself
two products take 45 µs and 0.15 more per token, within the stack of all a token costs 0.9 µs more."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens that are computed together.

    Attributes:
        spans: what they use, in order.
        alone: the one adapter of all of them, or None where a mask tells.
    """

    start: int
    spans: tuple[Span, ...]
    alone: str | None

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + sum(count for _, count in self.spans)


def pieces(spans: Iterable[Span]) -> list[Piece]:
    """Cut packed tokens into what is computed together; tokens of the base alone between pieces are in none.

    A long span stands alone. Neighbouring short spans share a piece, also with short spans of the base between them.
    """
    found: list[Piece] = []
    pending: list[Span] = []
    start = position = 0

    def close() -> None:
        while pending and pending[-1][0] is None:
            pending.pop()
        if pending:
            names = {name for name, _ in pending}
            found.append(Piece(start, tuple(pending), names.pop() if len(names) == 1 else None))
        pending.clear()

    for name, count in _joined(spans):
        if count >= LONG:
            close()
            if name is not None:
                found.append(Piece(position, ((name, count),), name))
        elif pending or name is not None:
            start = start if pending else position
            pending.append((name, count))
        position += count
    close()
    return found


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Neighbours of the same adapter as one span."""
    joined: list[Span] = []
    for name, count in spans:
        if joined and joined[-1][0] == name:
            count += joined.pop()[1]
        joined.append((name, count))
    return joined


@dataclass(frozen=True, slots=True)
class _Step:
    """A piece for all layers that have the same adapters in the same ranks.

    Attributes:
        rows: its tokens; None for all.
        names: whose part is computed: of one, or of all that are stacked.
        others: (rows, sum of ranks), true where a column is not the token's; None where all are.
    """

    rows: slice | None
    names: tuple[str, ...]
    others: torch.Tensor | None


_Layout = tuple[tuple[str, int], ...]
"""Which adapters a layer has, and their ranks there."""


def _steps(found: Iterable[Piece], tokens: int, stack: Sequence[str], layout: _Layout, place: Any) -> list[_Step]:
    """What is to be done for pieces of ``tokens`` tokens on layers of one layout; ``stack`` is who shares products."""
    ranks = dict(layout)
    names = tuple(name for name in stack if name in ranks)
    steps = []
    for piece in found:
        rows = None if piece.stop - piece.start == tokens else slice(piece.start, piece.stop)
        if piece.alone is not None:
            if piece.alone in ranks:
                steps.append(_Step(rows, (piece.alone,), None))
        elif any(name in ranks for name, _ in piece.spans):
            number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
            of_token = torch.tensor([number.get(name, -1) for name, count in piece.spans for _ in range(count)])
            of_column = torch.tensor([i for i, name in enumerate(names) for _ in range(ranks[name])])
            steps.append(_Step(rows, names, (of_token[:, None] != of_column).to(place)))
    return steps


class Mixed:
    """The adapters on one product: that of a linear layer, or of several layers that get the same input.

    Attributes:
        pairs: each adapter's part, by name.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.in_features, self.out_features, self.device = in_features, out_features, device
        self.pairs: dict[str, Pair] = {}
        self._packs = device.type == "cpu" and can_pack(dtype)
        self._stacked: tuple[tuple[str, ...], Pair] | None = None
        self._tokens = 0
        self._work: list[tuple[_Step, Pair]] = []

    @property
    def layout(self) -> _Layout:
        """Its adapters with their ranks."""
        return tuple((name, pair.down.shape[0]) for name, pair in self.pairs.items())

    def prepare(self, tokens: int, steps: Iterable[_Step]) -> None:
        """Get ready for forwards of ``tokens`` tokens."""
        self._tokens, self._work = tokens, [(step, self._pair(step)) for step in steps]

    def _pair(self, step: _Step) -> Pair:
        """What a step multiplies with; a stack is kept until another is asked for."""
        if step.others is None:
            return self.pairs[step.names[0]]
        if self._stacked is None or self._stacked[0] != step.names:
            pairs = [self.pairs[name] for name in step.names]
            down, up = torch.cat([pair.down for pair in pairs]), torch.cat([pair.up for pair in pairs])
            stack = Pair(packed(down), packed(up.t().contiguous())) if self._packs else Pair(down, up)
            self._stacked = step.names, stack
        return self._stacked[1]

    def forget(self, name: str) -> None:
        """Go on without an adapter; until ``prepare`` as the base alone."""
        del self.pairs[name]
        self._stacked, self._work = None, []

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the product y (…, out) of x (…, in) is with the adapters, the tokens in the order of the spans.

        ``y`` may be changed.

        Raises:
            EngineError: they are not as many as was said.
        """
        if not self._work:
            return y
        if x.numel() != self._tokens * self.in_features:
            raise EngineError(f"a layer got {tuple(x.shape)}, the spans given before have {self._tokens} tokens")
        flat_x, flat_y = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        for step, pair in self._work:
            if step.rows is None:
                flat_y = self._added(step, pair, flat_x, flat_y)
            else:
                part = flat_y[step.rows]
                if (done := self._added(step, pair, flat_x[step.rows], part)) is not part:
                    part.copy_(done)
        return flat_y.view(y.shape)

    def _added(self, step: _Step, pair: Pair, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(tokens, out) with the adapters' part: ``y`` itself, changed, or another tensor."""
        if step.others is None:
            return y.addmm_(functional.linear(x, pair.down), pair.up)
        # Other columns become 0, and are not multiplied with it: another adapter's may have overflowed
        if self._packs:
            return product(product(x, pair.down).masked_fill_(step.others, 0), pair.up, onto=y)
        return y.addmm_(functional.linear(x, pair.down).masked_fill_(step.others, 0), pair.up)


class MixedLinear(Replacement):
    """A linear layer with adapters on it.

    Attributes:
        base: the layer as it was.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.base, self.mixed = base, Mixed(self.in_features, self.out_features, self.dtype, self.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        return self.mixed(x, self.base(x))


_Place = str | Joined
"""Whose product adapters are added to: that of a linear layer, by its name in the model, or of several."""


def _together(widths: Sequence[int], parts: Mapping[int, Pair]) -> Pair:
    """One pair for layers of these widths, from those of some of them by place; 0 where a column of A is not theirs."""
    chosen = [parts[place] for place in sorted(parts)]
    down = torch.cat([pair.down for pair in chosen])
    up = down.new_zeros(len(down), sum(widths))
    row = 0
    for place, pair in zip(sorted(parts), chosen, strict=True):
        column = sum(widths[:place])
        up[row : row + len(pair.up), column : column + widths[place]] = pair.up
        row += len(pair.up)
    return Pair(down, up)


class MixedAdapters:
    """The adapters of one model for packed forwards. Layers that no loaded adapter targets are as they were.

    Not thread-safe, and ``use`` holds for the whole model: whoever runs the model owns this.
    """

    def __init__(self, model: Any, *, allow_pickle: bool = False) -> None:
        self._model = model
        self._allow_pickle = allow_pickle
        self._loaded: dict[str, Adapter] = {}
        self._mixed: dict[_Place, Mixed] = {}
        self._stack: tuple[str, ...] = ()
        self._spans: tuple[tuple[Span, ...], tuple[Span, ...]] | None = (), ()

    @property
    def loaded(self) -> dict[str, Adapter]:
        """By name."""
        return dict(self._loaded)

    def load(self, name: str, directory: str) -> Adapter:
        """Load an adapter under a name; until the next ``use`` all tokens go through the base alone.

        Raises:
            BadRequestError: there is one of that name.
            CannotMix: it is of a kind that only PEFT can compute; the message says which.
            ConfigError: it is incomplete, damaged, of a kind that is not served, or made for another base.
        """
        if name in self._loaded:
            raise BadRequestError(f"adapter {name!r} is loaded already")
        found = adapterfiles.read(directory, allow_pickle=self._allow_pickle)
        adapter = found.adapter()
        pairs = pairs_of(self._model, found)
        self.use(())
        for place, pair in self._by_product(pairs).items():
            self._at(place).pairs[name] = pair
        self._loaded[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Forget an adapter; until the next ``use`` all tokens go through the base alone.

        Raises:
            AdapterNotFoundError: it is not loaded.
        """
        self._check(name)
        self.use(())
        del self._loaded[name]
        self._stack = tuple(n for n in self._stack if n != name)
        for place, mixed in list(self._mixed.items()):
            if name in mixed.pairs:
                mixed.forget(name)
            if not mixed.pairs:
                self._take_away(place)

    def use(self, spans: Sequence[Span], head: Sequence[Span] | None = None) -> None:
        """Say what the tokens of the next forwards are, in their order; holds until said otherwise.

        Args:
            spans: of all tokens. Nothing: the base alone, for any number of tokens.
            head: of those that the output head gets, where the model is told to keep only some; default: all.

        Raises:
            AdapterNotFoundError: one is not loaded; what was said before holds.
        """
        body, top = tuple(spans), tuple(spans if head is None else head)
        if (body, top) == self._spans:
            return
        for name, _ in (*body, *top):
            if name is not None:
                self._check(name)
        cut = {False: (pieces(body), _total(body)), True: (pieces(top), _total(top))}
        self._stack = self._shared([*cut[False][0], *cut[True][0]])
        self._spans = None  # whatever happens on the way, the next call starts anew
        output = getattr(self._model.get_output_embeddings(), "mixed", None)
        steps: dict[Any, list[_Step]] = {}
        for mixed in self._mixed.values():
            found, tokens = cut[mixed is output]
            kind = mixed is output, mixed.layout, mixed.device
            if kind not in steps:
                steps[kind] = _steps(found, tokens, self._stack, mixed.layout, mixed.device)
            mixed.prepare(tokens, steps[kind])
        self._spans = body, top

    def _shared(self, found: Iterable[Piece]) -> tuple[str, ...]:
        """Who is stacked: those that masks are needed for, and who was before, while they are at most half of it.

        So adapters that come and go from step to step cause no copying, and one that is long gone costs nothing.
        """
        needed = {name for piece in found if piece.alone is None for name, _ in piece.spans if name is not None}
        both = needed | set(self._stack)
        wanted = both if len(both) <= 2 * len(needed) else needed or both
        return self._stack if wanted == set(self._stack) else tuple(name for name in self._loaded if name in wanted)

    def _by_product(self, pairs: Mapping[str, Pair]) -> dict[_Place, Pair]:
        """An adapter's parts, by layer, as those of the products that the model computes."""
        found: dict[_Place, Pair] = {}
        joined: dict[Joined, dict[int, Pair]] = {}
        for path, pair in pairs.items():
            layer = self._model.get_submodule(path)
            if isinstance(layer, JoinedLinear):
                joined.setdefault(layer.joined, {})[layer.place] = pair
            else:
                found[path] = pair
        return found | {place: _together(place.sizes, parts) for place, parts in joined.items()}

    def _at(self, place: _Place) -> Mixed:
        """The adapters of a product, which is made ready for some."""
        if place not in self._mixed:
            if isinstance(place, Joined):
                self._mixed[place] = place.added = Mixed(place.in_features, sum(place.sizes), place.dtype, place.device)
            else:
                layer = MixedLinear(self._model.get_submodule(place))
                self._mixed[place] = layer.mixed
                self._set(place, layer)
        return self._mixed[place]

    def _take_away(self, place: _Place) -> None:
        """Leave a product as it was before any adapters."""
        del self._mixed[place]
        if isinstance(place, Joined):
            place.added = None
        else:
            self._set(place, self._model.get_submodule(place).base)

    def _set(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)

    def _check(self, name: str) -> None:
        if name not in self._loaded:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded")


def _total(spans: Iterable[Span]) -> int:
    return sum(count for _, count in spans)
