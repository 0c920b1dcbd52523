"""Linear layers on CPU whose weights are packed once for oneDNN, in the order in which its kernels read them.

``torch.nn.functional.linear`` gives oneDNN plain weights, and it reads them slower or reorders them in every call.
These are the operators that torch's own compiler uses for frozen weights (``_inductor/fx_passes/mkldnn_fusion.py``).
Weights read, in GB/s, plain → packed, on 2 cores that read memory at 31 (AVX-512 with bf16, torch 2.13):

    out × in       bf16, 1 row    8 rows     16 rows    fp32, 1 row   8 rows      16 rows
    768 × 768      – → 13         8 → 11     6 → 11     13 → 19       9 → 14      8 → 12
    2048 × 768     10 → 16        11 → 19    9 → 15     13 → 22       11 → 23     9 → 17
    768 × 2048     17 → 22        15 → 22    11 → 17    17 → 22       10 → 19     10 → 16
    16000 × 768    13 → 24        – → –      8 → 13     12 → 21       5 → 20      5 → 16

With 128 and 512 rows, where computing takes longer than reading, packed took 0.75 to 1.0 times as long as plain, for
fp32 0.45 to 0.93. There was no shape and no number of rows for which plain was faster, so everything is packed.

Layers that get the same input (query, key and value; gate and up) are one product: fewer calls, each of which has to
bring the threads together, and larger matrices, which are read faster (see the table).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional


class Replacement(nn.Module):
    """What stands in a model where a linear layer was.

    Attributes:
        dtype: of the weights.
        device: where they are.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)
        weight = linear if isinstance(linear, Replacement) else linear.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device


class PackedLinear(Replacement):
    """A linear layer with packed weights; for inference alone."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain)
        self.bias = plain.bias
        self._packed = packed(plain.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        return product(x, self._packed, self.bias)


class JoinedLinear(Replacement):
    """One of several linear layers that get the same input; all are computed when the first of them is called.

    Attributes:
        joined: their product.
        place: which of its parts is this layer's.
    """

    def __init__(self, plain: nn.Linear, joined: Joined, place: int) -> None:
        super().__init__(plain)
        self.joined, self.place = joined, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out), a view into what was computed for all of them."""
        return self.joined.part(self.place, x)


class Joined:
    """The product of several layers, kept until each of them was asked for its part.

    Attributes:
        sizes: widths of the parts.
        dtype: of the weights.
        device: where they are.
        added: makes what is handed out of the input and the product; see ``lora``.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        first = layers[0].weight
        self.in_features, self.dtype, self.device = layers[0].in_features, first.dtype, first.device
        self.sizes = [layer.out_features for layer in layers]
        self.added: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._weight = packed(torch.cat([layer.weight.detach() for layer in layers]))
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, width of the part)."""
        # The very same tensor, not an equal one; it is kept alive, so no other can take its place in memory.
        if x is not self._input or place not in self._parts:
            y = product(x, self._weight, self._bias)
            if self.added is not None:
                y = self.added(x, y)
            self._input, self._parts = x, dict(enumerate(torch.split(y, self.sizes, -1)))
        found = self._parts.pop(place)
        if not self._parts:
            self._input = None
        return found


def alike(model: nn.Module, ids: torch.Tensor) -> list[tuple[nn.Linear, ...]]:
    """Linear layers of one parent that get the same input, as a forward of ``ids`` (1, tokens) shows."""
    calls: list[tuple[nn.Module, nn.Linear, torch.Tensor]] = []
    handles = []
    for parent in list(model.modules()):
        for child in parent.children():
            if _is_plain(child):

                def note(module: Any, inputs: tuple[torch.Tensor, ...], parent: nn.Module = parent) -> None:
                    if inputs:  # else it was given by name, and stays by itself
                        calls.append((parent, module, inputs[0]))

                handles.append(child.register_forward_pre_hook(note))
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, int, torch.dtype, bool], list[nn.Linear]] = {}
    for parent, layer, x in calls:
        key = (id(parent), id(x), layer.weight.dtype, layer.bias is not None)
        groups.setdefault(key, []).append(layer)
    return [tuple(group) for group in groups.values() if 1 < len(group) == len(set(group))]


def packed(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) in the order of oneDNN's kernels; for ``product`` alone."""
    opaque: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return opaque


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """x · weightᵀ + bias + onto, for a packed weight: (…, in) to (…, out); ``onto`` is left as it is."""
    y: torch.Tensor
    if onto is None:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight, bias, "add")
    return y


def pack(model: nn.Module, together: Iterable[tuple[nn.Linear, ...]] = ()) -> int:
    """Replace the linear layers of a model by packed ones, where this machine and this torch can; how many they are.

    Those of ``together`` get the same input, and become one product. The plain weight goes at once, unless something
    else has it: an embedding that is tied to the output head keeps it. Left as they are: layers elsewhere than on the
    CPU, quantised ones, and those that carry hooks.
    """
    made: dict[nn.Linear, Replacement] = {}  # a layer that the model has twice is packed once
    can = {dtype: can_pack(dtype) for dtype in {parameter.dtype for parameter in model.parameters()}}
    joined = {layer: group for group in together for layer in group}

    def replacement(layer: nn.Linear) -> Replacement:
        if layer in joined and layer not in made:
            group = joined[layer]
            whole = Joined(group)
            made.update({each: JoinedLinear(each, whole, place) for place, each in enumerate(group)})
            forget(group)
        elif layer not in made:
            made[layer] = PackedLinear(layer)
            forget([layer])
        return made[layer]

    def forget(layers: Iterable[nn.Linear]) -> None:
        for layer in layers:
            layer.register_parameter("weight", None)

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Linear) and (child in made or (_is_plain(child) and can[child.weight.dtype])):
                setattr(parent, name, replacement(child))
    return len(made)


def _is_plain(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and type(module.weight.data) is torch.Tensor
        and module.weight.device.type == "cpu"
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def can_pack(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype can be packed here: asked of torch, and seen on small ones."""
    try:
        if not _is_native(dtype):
            return False
        weight, x = torch.linspace(-1, 1, 512).view(16, 32).to(dtype), torch.ones(2, 32, dtype=dtype)
        with torch.inference_mode():
            once, right = packed(weight), functional.linear(x, weight)
            twice = product(x, once, onto=right)
            return torch.allclose(product(x, once), right, rtol=0.02) and torch.allclose(twice, 2 * right, rtol=0.02)
    except (AttributeError, RuntimeError):
        return False  # these operators are internal to torch: another release may lack them or change them


def _is_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and the processor computes in this dtype by itself."""
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32
