"""Mixed LoRA: one forward over packed tokens, of which every run of consecutive ones may use another adapter or none.

A linear layer that adapters target computes, for a token x with adapter i,

    y = W x + b + s_i · B_i A_i x

(LoRA, https://arxiv.org/abs/2106.09685, eq. 3; s = α/r, or α/√r for rsLoRA, https://arxiv.org/abs/2312.03732). For
short runs of several adapters the A_i and B_i are stacked, so that two products serve all of them, and a mask between
the two leaves each token the columns of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loopmux.errors import AdapterNotFoundError, BadRequestError, EngineError
from loopmux_worker.engine import adapterfiles
from loopmux_worker.engine.adapterfiles import Adapter
from loopmux_worker.engine.slots.linears import Replacement
from loopmux_worker.engine.slots.pairs import Pair, pairs_of

Run = tuple[str | None, int]
"""Consecutive tokens of one request: the name of their adapter or None, and how many they are."""

LONG = 32
"""Tokens from which a run is computed by itself: two more calls cost less than the other adapters' columns for it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens that are computed together.

    Attributes:
        runs: what they use, in order.
        alone: the one adapter of all of them, or None where a mask tells.
    """

    start: int
    runs: tuple[Run, ...]
    alone: str | None

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + sum(count for _, count in self.runs)


def pieces(runs: Iterable[Run]) -> list[Piece]:
    """Cut packed tokens into what is computed together; tokens of the base alone between pieces are in none.

    A long run stands alone. Neighbouring short runs share a piece, also with short runs of the base between them.
    """
    found: list[Piece] = []
    pending: list[Run] = []
    start = position = 0

    def close() -> None:
        while pending and pending[-1][0] is None:
            pending.pop()
        if pending:
            names = {name for name, _ in pending}
            found.append(Piece(start, tuple(pending), names.pop() if len(names) == 1 else None))
        pending.clear()

    for name, count in _joined(runs):
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


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Neighbours of the same adapter as one run."""
    joined: list[Run] = []
    for name, count in runs:
        if joined and joined[-1][0] == name:
            count += joined.pop()[1]
        joined.append((name, count))
    return joined


@dataclass(frozen=True, slots=True)
class _Work:
    """A piece on one layer: rows, what they are multiplied with, and (rows, rank) that hides what is not theirs."""

    rows: slice
    pair: Pair
    mask: torch.Tensor | None


class MixedLinear(Replacement):
    """A linear layer with adapters on it.

    Attributes:
        base: the layer as it was.
        pairs: each adapter's part, by name.
    """

    def __init__(self, base: nn.Module, pairs: Mapping[str, Pair]) -> None:
        super().__init__(base)
        self.base = base
        self.pairs = dict(pairs)
        self._stacked: tuple[tuple[str, ...], Pair] | None = None
        self._tokens = 0
        self._work: tuple[_Work, ...] = ()

    def prepare(self, tokens: int, found: Sequence[Piece], stack: tuple[str, ...], mask: Masks) -> None:
        """Get ready for forwards of ``tokens`` tokens cut into these pieces; ``stack`` is who shares products."""
        names = tuple(name for name in stack if name in self.pairs)
        work: list[_Work] = []
        for piece in found:
            rows = slice(piece.start, piece.stop)
            if piece.alone is not None:
                if piece.alone in self.pairs:
                    work.append(_Work(rows, self.pairs[piece.alone], None))
            elif any(name in self.pairs for name, _ in piece.runs):
                columns = tuple((name, self.pairs[name].down.shape[0]) for name in names)
                pair = self._stack(names)
                work.append(_Work(rows, pair, mask(piece, columns, pair.down)))
        self._tokens, self._work = tokens, tuple(work)

    def _stack(self, names: tuple[str, ...]) -> Pair:
        """Several adapters as one; kept until others are asked for."""
        if len(names) == 1:
            return self.pairs[names[0]]
        if self._stacked is None or self._stacked[0] != names:
            pairs = [self.pairs[name] for name in names]
            self._stacked = names, Pair(torch.cat([p.down for p in pairs]), torch.cat([p.up for p in pairs]))
        return self._stacked[1]

    def replace(self, pairs: Mapping[str, Pair]) -> None:
        """Other adapters from now on; until ``prepare`` the base alone."""
        self.pairs, self._stacked, self._work = dict(pairs), None, ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out), the tokens in the order of the runs."""
        y: torch.Tensor = self.base(x)
        if not self._work:
            return y
        flat_x, flat_y = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
        if flat_x.shape[0] != self._tokens:
            raise EngineError(f"a layer got {flat_x.shape[0]} tokens, the runs given before have {self._tokens}")
        for work in self._work:
            low = functional.linear(flat_x[work.rows], work.pair.down)
            if work.mask is not None:
                low *= work.mask
            flat_y[work.rows].addmm_(low, work.pair.up)
        return y


Masks = Callable[[Piece, tuple[tuple[str, int], ...], torch.Tensor], torch.Tensor]
"""The mask of a piece for columns of (adapter, rank), in dtype and place of a tensor."""


def _masks() -> Masks:
    """Masks for one set of pieces: layers that have the same adapters in the same ranks share one."""
    made: dict[Any, torch.Tensor] = {}

    def mask(piece: Piece, columns: tuple[tuple[str, int], ...], like: torch.Tensor) -> torch.Tensor:
        key = (piece.start, columns, like.dtype, like.device)
        if key not in made:
            number: dict[str | None, int] = {name: i for i, (name, _) in enumerate(columns)}
            of_token = [number.get(name, -1) for name, count in piece.runs for _ in range(count)]
            of_column = [i for i, (_, rank) in enumerate(columns) for _ in range(rank)]
            same = torch.tensor(of_token)[:, None] == torch.tensor(of_column)
            made[key] = same.to(like.device, like.dtype)
        return made[key]

    return mask


class MixedAdapters:
    """The adapters of one model for packed forwards. Layers that no loaded adapter targets are as they were.

    Not thread-safe, and ``use`` holds for the whole model: whoever runs the model owns this.
    """

    def __init__(self, model: Any, *, allow_pickle: bool = False) -> None:
        self._model = model
        self._allow_pickle = allow_pickle
        self._loaded: dict[str, Adapter] = {}
        self._layers: dict[str, MixedLinear] = {}  # by the name of the linear layer whose place they take
        self._stack: tuple[str, ...] = ()
        self._runs: tuple[tuple[Run, ...], tuple[Run, ...]] | None = (), ()

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
        for layer, pair in pairs.items():
            self._layer(layer).pairs[name] = pair
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
        for path, layer in list(self._layers.items()):
            if name in layer.pairs:
                layer.replace({n: pair for n, pair in layer.pairs.items() if n != name})
            if not layer.pairs:
                self._set(path, self._layers.pop(path).base)

    def use(self, runs: Sequence[Run], head: Sequence[Run] | None = None) -> None:
        """Say what the tokens of the next forwards are, in their order; holds until said otherwise.

        Args:
            runs: of all tokens. Nothing: the base alone, for any number of tokens.
            head: of those that the output head gets, where the model is told to keep only some; default: all.

        Raises:
            AdapterNotFoundError: one is not loaded; what was said before holds.
        """
        body, top = tuple(runs), tuple(runs if head is None else head)
        if (body, top) == self._runs:
            return
        for name, _ in (*body, *top):
            if name is not None:
                self._check(name)
        cut, cut_top = pieces(body), pieces(top)
        self._stack = self._shared(cut + cut_top)
        self._runs = None  # whatever happens on the way, the next call starts anew
        mask, top_mask = _masks(), _masks()
        output = self._model.get_output_embeddings()
        for layer in self._layers.values():
            if layer is output:
                layer.prepare(_total(top), cut_top, self._stack, top_mask)
            else:
                layer.prepare(_total(body), cut, self._stack, mask)
        self._runs = body, top

    def _shared(self, found: Iterable[Piece]) -> tuple[str, ...]:
        """Who is stacked: those that masks are needed for, and while they are at least half of it, who was before.

        So adapters that come and go from step to step cause no copying, and one that is long gone costs nothing.
        """
        needed = {name for piece in found if piece.alone is None for name, _ in piece.runs if name is not None}
        if needed <= set(self._stack) and len(self._stack) <= 2 * len(needed):
            return self._stack
        return tuple(name for name in self._loaded if name in needed) if needed else self._stack

    def _layer(self, path: str) -> MixedLinear:
        if path not in self._layers:
            self._layers[path] = MixedLinear(self._model.get_submodule(path), {})
            self._set(path, self._layers[path])
        return self._layers[path]

    def _set(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)

    def _check(self, name: str) -> None:
        if name not in self._loaded:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded")


def _total(runs: Iterable[Run]) -> int:
    return sum(count for _, count in runs)
