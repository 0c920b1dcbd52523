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
"""

from __future__ import annotations

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


def pack(model: nn.Module) -> int:
    """Replace the linear layers of a model by packed ones, where this machine and this torch can; how many they are.

    The plain weight goes at once, unless something else has it: an embedding that is tied to the output head keeps it.
    Left as they are: layers elsewhere than on the CPU, quantised ones, and those that carry hooks.
    """
    made: dict[nn.Linear, PackedLinear] = {}  # a layer that the model has twice is packed once
    can = {dtype: can_pack(dtype) for dtype in {parameter.dtype for parameter in model.parameters()}}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if _is_plain(child) and can[child.weight.dtype]:
                made[child] = made.get(child) or PackedLinear(child)
                setattr(parent, name, made[child])
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
