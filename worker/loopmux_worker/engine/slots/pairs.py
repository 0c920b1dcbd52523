"""An adapter's low-rank parts, layer by layer, as PEFT understands its configuration.

Which layers an adapter targets, with which rank and scaling, is PEFT's to say: it puts the adapter on a copy of the
model that has no numbers, and what it made there is read.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from loopmux.errors import ConfigError
from loopmux_worker.engine.adapterfiles import AdapterFiles
from loopmux_worker.engine.slots.linears import Replacement


class CannotMix(ConfigError):
    """The adapter is of a kind that cannot share a forward with others; PEFT alone can compute it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter, or several stacked, on one layer.

    Attributes:
        down: A, (rank, in).
        up: B transposed and scaled, (rank, out).
    """

    down: torch.Tensor
    up: torch.Tensor


def pairs_of(model: Any, found: AdapterFiles) -> dict[str, Pair]:
    """An adapter's part for each layer that it targets, by the layer's name in the model.

    Raises:
        CannotMix: it is more than low-rank parts of linear layers.
        ConfigError: it was made for another base.
    """
    config = copy.deepcopy(found.config)
    config.init_lora_weights = False  # nothing to initialise: the numbers are in the files
    bare = _bare(model)
    try:
        peft = PeftModel(bare, config, "it", autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except Exception as error:
        raise found.misfit(error) from error
    touched = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers: dict[str, Any] = {name: module for name, module in bare.named_modules() if isinstance(module, touched)}
    for name, layer in layers.items():
        if reason := _unlike(name, layer):
            raise _cannot(found, f"{reason} (at {name})")
    expected = get_peft_model_state_dict(peft, adapter_name="it", save_embedding_layers=False)
    found.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
    keys = {name: [f"base_model.model.{name}.lora_{part}.weight" for part in "AB"] for name in layers}
    if {key for both in keys.values() for key in both} != set(expected):
        raise _cannot(found, "PEFT names its tensors in an unknown way")
    pairs = {}
    for name, (down, up) in keys.items():
        dtype, device = _place(model.get_submodule(name), model.dtype)
        # Scaled here and not in each step: in half precision a factor in a mask would be rounded for all alike
        scaled = found.weights[up].float() * layers[name].scaling["it"]
        pair = Pair(found.weights[down].to(device, dtype), scaled.t().to(device, dtype).contiguous())
        found.check_numbers(down, pair.down)
        found.check_numbers(up, pair.up)
        pairs[name] = pair
    return pairs


def _unlike(name: str, layer: Any) -> str | None:
    """What is more than a plain LoRA part in what PEFT made of a layer."""
    if "experts" in name.split("."):
        return "it targets experts, which get some of the tokens in an order of their own"
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return "it replaces modules or tokens of the base (modules_to_save, trainable tokens)"
    if type(layer) is not PeftLinear or type(layer.get_base_layer()) is not nn.Linear:
        return f"it targets a {type(getattr(layer, 'base_layer', layer)).__name__}, which is no plain linear layer"
    if layer.lora_variant:
        return f"it is of the kind {type(layer.lora_variant['it']).__name__}"
    if layer.lora_bias["it"]:
        return "it has biases of its own (lora_bias)"
    return None


def _cannot(found: AdapterFiles, reason: str) -> CannotMix:
    return CannotMix(f"{found.folder}: {reason}, so it cannot share a forward with other adapters: serve it by itself")


def _bare(model: nn.Module) -> Any:
    """A copy of a model that has its modules but no numbers; what stands for a linear layer is one again."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():
        if isinstance(module, (nn.Linear, Replacement)):
            memo[id(module)] = nn.Linear(module.in_features, module.out_features, device="meta")
    return copy.deepcopy(model, memo)


def _place(layer: Any, dtype: torch.dtype) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a layer's adapters; ``dtype`` for one whose weights are quantised."""
    here = layer if isinstance(layer, Replacement) else layer.weight
    return here.dtype if here.dtype.is_floating_point else dtype, here.device
