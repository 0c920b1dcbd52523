"""Adapters in a model, through PEFT: checked against the base before they are used, switched per request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file

from loopmux.errors import AdapterNotFoundError, ConfigError
from loopmux_worker.engine import files
from loopmux_worker.engine.loading import is_finite


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter: the name that PEFT knows it by, the fingerprint of its files, the base that it names."""

    internal: str
    fingerprint: str
    folder: Path
    made_for: str | None


class Adapters:
    """The adapters of one model. The base alone is always among the choices.

    Not thread-safe, and ``using`` holds for the whole model: whoever runs the model owns this.
    """

    def __init__(self, model: Any, *, allow_pickle: bool = False) -> None:
        self._model = model
        self._allow_pickle = allow_pickle
        self._peft: Any = None  # made with the first adapter; it puts its layers into the model in place
        self._loaded: dict[str, Adapter] = {}
        self._count = 0

    @property
    def loaded(self) -> dict[str, Adapter]:
        """By name."""
        return dict(self._loaded)

    def load(self, name: str, directory: str) -> Adapter:
        """Load an adapter under a name.

        Raises:
            ConfigError: it is incomplete, damaged, of a kind that is not served, or made for another base.
        """
        folder = files.adapter_folder(directory)
        path = files.adapter_weights(folder, allow_pickle=self._allow_pickle)
        config = _read_config(folder)
        weights = _read_weights(path)
        internal = f"a{self._count}"  # PEFT's names may hold no dots and must not resemble its own prefixes
        self._count += 1
        try:
            self._inject(internal, config, folder)
            self._fill(internal, weights, folder)
        except Exception:
            self._remove(internal, config)
            raise
        adapter = Adapter(internal, files.fingerprint(folder), folder, config.base_model_name_or_path)
        self._loaded[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterNotFoundError: it is not loaded.
        """
        if name not in self._loaded:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded")
        self._remove(self._loaded.pop(name).internal)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """The model computes with this adapter, or as the base alone for None, within the block."""
        if self._peft is None:
            yield
        elif name is None:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(self._loaded[name].internal, inference_mode=True)
            yield

    def _remove(self, internal: str, half: PeftConfig | None = None) -> None:
        """Take an adapter out, also one that PEFT had put in by ``half``; after the last the model is as it was.

        PEFT keeps a name as the active one, which must not be that of a deleted adapter. Of one that failed on its way
        in it forgets the name and leaves the layers, so the name is given back to it to delete.
        """
        if not self._loaded:
            _unwrap(self._model)
            self._peft = None
            return
        self._peft.set_adapter(next(iter(self._loaded.values())).internal, inference_mode=True)
        if half is not None:
            self._peft.peft_config[internal] = half
        self._peft.delete_adapter(internal)

    def _inject(self, internal: str, config: PeftConfig, folder: Path) -> None:
        try:
            if self._peft is None:
                # Without autocast: PEFT would keep copies of half-precision adapters in float32
                self._peft = PeftModel(self._model, config, internal, autocast_adapter_dtype=False)
            else:
                self._peft.add_adapter(internal, config, autocast_adapter_dtype=False)
        except Exception as error:
            raise ConfigError(
                f"{folder} does not fit the base model: {error}; correct its adapter_config.json, or put it on its own "
                "base"
            ) from error
        self._peft.eval()

    def _fill(self, internal: str, weights: dict[str, torch.Tensor], folder: Path) -> None:
        expected = get_peft_model_state_dict(self._peft, adapter_name=internal, save_embedding_layers=False)
        _compare(weights, {name: tuple(t.shape) for name, t in expected.items()}, folder)
        result = set_peft_model_state_dict(self._peft, weights, adapter_name=internal)
        if result.unexpected_keys:
            raise ConfigError(f"{folder}: PEFT has no place for {result.unexpected_keys[0]}")
        for parameter in self._peft.parameters():
            parameter.requires_grad_(False)


def _unwrap(model: Any) -> None:
    """Take away all that PEFT has put around a model's layers."""
    wrapped = [n for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for name in wrapped:
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue  # what is around it goes, and it with that
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
        setattr(model.get_submodule(parent), child, inner)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _read_config(folder: Path) -> PeftConfig:
    described = files.read_json(folder / "adapter_config.json")
    kind = described.get("peft_type")
    if kind != PeftType.LORA.value:
        raise ConfigError(f"{folder}: found an adapter of type {kind!r}, served are LORA ones (DoRA and rsLoRA too)")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder}/adapter_config.json: this PEFT does not read it: {error}") from error
    config.inference_mode = True
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            files.tensors(path)
            weights = load_file(str(path))
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({error}): copy or save it again") from error
    for name, tensor in weights.items():
        if tensor.numel() and not is_finite(tensor):
            raise ConfigError(f"{path}: the tensor {name} holds NaN or infinite values: the adapter is damaged")
    return weights


def _compare(found: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuse an adapter whose tensors are not exactly those that the base needs for its configuration."""
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(
                f"{folder}: the tensor {name} is missing, expected shape {shape}: the adapter is incomplete or was "
                "made for another base model; save it again, or put it on its own base"
            )
        if tuple(found[name].shape) != shape:
            raise ConfigError(
                f"{folder}: the tensor {name} has shape {tuple(found[name].shape)}, expected {shape}: its weights and "
                "its adapter_config.json do not belong together, or it was made for another base model; save it "
                "again, or put it on its own base"
            )
    extra = [name for name in found if name not in expected]
    if extra:
        raise ConfigError(
            f"{folder}: the tensor {extra[0]} of shape {tuple(found[extra[0]].shape)} has no place in the base model: "
            "the adapter was made for another one; put it on its own base"
        )
