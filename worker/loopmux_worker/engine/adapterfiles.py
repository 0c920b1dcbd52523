"""An adapter as it lies in its folder: what it says about itself and its tensors, checked before a model sees them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import PeftType
from safetensors.torch import load

from loopmux.errors import ConfigError
from loopmux.modelfolders import adapter_folder
from loopmux.weightfiles import ADAPTER_CONFIG, adapter_weights, read_json
from loopmux_worker.engine import fingerprints
from loopmux_worker.engine.loading import is_finite

_LARGEST_ALPHA = 2.0**16
"""Those in use are 1 to some hundred: with one that is this much larger the base's part is lost in the adapter's."""
_KEEPS_BASE: tuple[Any, ...] = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base as it is. For the others PEFT changes it when the adapter is put
on, for whoever uses it, and does not change it back."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of numbers that are used as they are. Others (int8, float8) mean something together with scales, which PEFT does not
save."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter: the fingerprint of its files, where they are, the base that it names."""

    fingerprint: str
    folder: Path
    made_for: str | None


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that was read and is whole; whether it fits a model is seen when it is put on one.

    Attributes:
        weights: by the names that PEFT saves them under.
    """

    folder: Path
    config: PeftConfig
    weights: dict[str, torch.Tensor]

    def adapter(self) -> Adapter:
        """What is kept of it once it is loaded."""
        return Adapter(fingerprints.of(self.folder), self.folder, self.config.base_model_name_or_path)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """See that the tensors are exactly those that a base needs for this configuration: names and shapes.

        Beside an adapter on the embeddings or the output head PEFT saves the base's own weight, which was not trained.

        Raises:
            ConfigError: one is missing, of another shape, or has no place.
        """
        for name, shape in expected.items():
            if name not in self.weights:
                raise ConfigError(
                    f"{self.folder}: the tensor {name} is missing, expected shape {shape}: the adapter is incomplete "
                    "or was made for another base model; save it again, or put it on its own base"
                )
            if (found := tuple(self.weights[name].shape)) != shape:
                raise ConfigError(
                    f"{self.folder}: the tensor {name} has shape {found}, expected {shape}: its weights and its "
                    "adapter_config.json do not belong together, or it was made for another base model; save it "
                    "again, or put it on its own base"
                )
        extra = [name for name in self.weights if name not in expected and not _is_copy(name, expected)]
        if extra:
            raise ConfigError(
                f"{self.folder}: the tensor {extra[0]} of shape {tuple(self.weights[extra[0]].shape)} has no place in "
                "the base model: the adapter was made for another one; put it on its own base"
            )

    def check_numbers(self, name: str, tensor: torch.Tensor) -> None:
        """See that a tensor is still finite in the type, and with the scaling, that it is computed with.

        Raises:
            ConfigError: it is not.
        """
        if tensor.numel() and not is_finite(tensor):
            largest = float(self.weights[name].abs().max())
            raise ConfigError(
                f"{self.folder}: the tensor {name} (up to {largest:.3g}, before scaling) is beyond what "
                f"{str(tensor.dtype).removeprefix('torch.')} holds, expected numbers within it: the adapter is "
                "damaged, or made for a model in a wider dtype, which dtype: bfloat16 or float32 gives it"
            )

    def misfit(self, error: Exception) -> ConfigError:
        """What to say when PEFT cannot put it on the base."""
        return ConfigError(
            f"{self.folder} does not fit the base model: {error}; correct its adapter_config.json, or put it on its "
            "own base"
        )


def _is_copy(name: str, expected: Collection[str]) -> bool:
    """Whether a tensor is that of the base below one of the adapter's parts."""
    layer, is_base, _ = name.rpartition(".base_layer.")
    return bool(is_base) and any(part.startswith(f"{layer}.lora_") for part in expected)


def read(directory: str, *, allow_pickle: bool) -> AdapterFiles:
    """Read an adapter.

    Raises:
        ConfigError: it is incomplete, damaged, or of a kind that is not served.
    """
    folder = adapter_folder(directory)
    path = adapter_weights(folder, pickle=allow_pickle)
    return AdapterFiles(folder, _read_config(folder), _read_weights(path))


def _read_config(folder: Path) -> PeftConfig:
    described = read_json(folder / ADAPTER_CONFIG)
    kind = described.get("peft_type")
    if kind != PeftType.LORA.value:
        raise ConfigError(f"{folder}: found an adapter of type {kind!r}, served are LORA ones (DoRA and rsLoRA too)")
    _check_settings(folder / ADAPTER_CONFIG, described)
    _check_reach(folder / ADAPTER_CONFIG, described)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder / ADAPTER_CONFIG}: this PEFT does not read it: {error}") from error
    config.inference_mode = True
    return config


def _check_settings(file: Path, described: Mapping[str, Any]) -> None:
    """Refuse ranks and scalings that no training has given: PEFT takes them as they are, and computes nonsense."""

    def check(name: str, value: Any, expected: str, *, good: bool) -> None:
        if not good:
            raise ConfigError(
                f"{file}: {name}: found {value!r}, expected {expected}: set what the adapter was trained with, or save "
                "it again"
            )

    def ranks(name: str, value: Any) -> None:
        check(name, value, "a whole number from 1", good=type(value) is int and value >= 1)

    def alphas(name: str, value: Any) -> None:
        number = type(value) in (int, float) and math.isfinite(value) and abs(value) <= _LARGEST_ALPHA
        check(name, value, f"a number between -{_LARGEST_ALPHA:.0f} and {_LARGEST_ALPHA:.0f}", good=number)

    for name, several, one in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        if name in described:
            one(name, described[name])
        pattern = described.get(several) or {}
        check(several, pattern, "names of layers with a number for each", good=isinstance(pattern, dict))
        for layer, value in pattern.items():
            one(f"{several}[{layer!r}]", value)


def _check_reach(file: Path, described: Mapping[str, Any]) -> None:
    """Refuse what changes the base for all who use it, or acts through more than the layers that PEFT puts on it."""
    changes = {
        "init_lora_weights": described.get("init_lora_weights", True) not in _KEEPS_BASE,
        "bias": described.get("bias", "none") != "none",
        **{name: bool(described.get(name)) for name in ("layer_replication", "kasa_config")},
    }
    if changing := next((name for name, changes_it in changes.items() if changes_it), None):
        raise ConfigError(
            f"{file}: {changing}: found {described[changing]!r}, with which PEFT changes the base itself, expected an "
            "adapter that leaves it to others as it is: merge it into its base (merge_and_unload) and serve the "
            "merged model"
        )
    if acting := next((name for name in ("alora_invocation_tokens", "arrow_config") if described.get(name)), None):
        raise ConfigError(
            f"{file}: {acting}: found {described[acting]!r}, by which a prompt or other adapters say where it acts, "
            "expected an adapter that acts on all tokens of its requests: train it without"
        )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            # Read, not mapped as by `load_file`: somebody may write the file again while it is served
            weights = load(path.read_bytes())
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({error}): copy or save it again") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ConfigError(f"{path}: found something else than named tensors: save the adapter again")
    for name, tensor in weights.items():
        if tensor.dtype not in _TYPES:
            raise ConfigError(
                f"{path}: the tensor {name} holds {str(tensor.dtype).removeprefix('torch.')}, expected one of "
                f"{', '.join(str(kind).removeprefix('torch.') for kind in _TYPES)}: save the adapter without "
                "quantising it"
            )
        if tensor.numel() and not is_finite(tensor):
            raise ConfigError(
                f"{path}: the tensor {name} holds NaN or infinite values: the adapter is damaged; save it again"
            )
    return weights
