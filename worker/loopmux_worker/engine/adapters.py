"""Adapters in a model, through PEFT: checked against the base before they are used, switched per request."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from loopmux.errors import AdapterNotFoundError, ConfigError, LoopmuxError
from loopmux_worker.causes import in_words
from loopmux_worker.engine import adapterfiles
from loopmux_worker.engine.adapterfiles import Adapter, AdapterFiles

_UNCAST: dict[str, Any] = (
    {"autocast_adapter_dtype": False}
    if "autocast_adapter_dtype" in inspect.signature(PeftModel.add_adapter).parameters
    else {}
)
"""Else PEFT keeps copies of half-precision adapters in float32; 0.18 keeps none of those that are added, and takes
no such argument."""


class Adapters:
    """The adapters of one model. The base alone is always among the choices.

    Not thread-safe, and ``using`` holds for the whole model: whoever runs the model owns this.
    """

    def __init__(self, model: Any, *, allow_pickle: bool = False) -> None:
        self._model = model
        self._allow_pickle = allow_pickle
        self._peft: Any = None  # made with the first adapter; it puts its layers into the model in place
        self._loaded: dict[str, Adapter] = {}
        self._internal: dict[str, str] = {}  # what PEFT knows them by: its names hold no dots and none of its prefixes
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
        found = adapterfiles.read(directory, allow_pickle=self._allow_pickle)
        adapter = found.adapter()
        internal = f"a{self._count}"
        self._count += 1
        try:
            self._inject(internal, found)
            self._fill(internal, found)
        except Exception as error:
            self._remove(internal, found.config)
            if isinstance(error, LoopmuxError) or not self._loaded:
                raise
            raise ConfigError(
                f"{found.folder}: PEFT does not take it beside {', '.join(self._loaded)} ({in_words(error)}), expected "
                "adapters that can be on the base together: serve it by a worker of its own"
            ) from error
        self._loaded[name], self._internal[name] = adapter, internal
        return adapter

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterNotFoundError: it is not loaded.
        """
        if name not in self._loaded:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded")
        del self._loaded[name]
        self._remove(self._internal.pop(name))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """The model computes with this adapter, or as the base alone for None, within the block."""
        if self._peft is None:
            yield
        elif name is None:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(self._internal[name])
            yield

    def _remove(self, internal: str, half: PeftConfig | None = None) -> None:
        """Take an adapter out, also one that PEFT had put in by ``half``; after the last the model is as it was.

        PEFT keeps a name as the active one, which must not be that of a deleted adapter. Of one that failed on its way
        in it forgets the name and leaves the layers, so the name is given back to it to delete.
        """
        if not self._loaded:
            _unwrap(self._model)
            if hasattr(self._model, "peft_config"):
                del self._model.peft_config
            self._peft = None
            return
        self._peft.set_adapter(next(iter(self._internal.values())))
        if half is not None:
            self._peft.peft_config[internal] = half
        self._peft.delete_adapter(internal)

    def _inject(self, internal: str, found: AdapterFiles) -> None:
        try:
            if self._peft is None:
                self._peft = PeftModel(self._model, found.config, internal, autocast_adapter_dtype=False)
            else:
                self._peft.add_adapter(internal, found.config, **_UNCAST)
        except Exception as error:
            raise found.misfit(error) from error
        self._peft.eval()

    def _fill(self, internal: str, found: AdapterFiles) -> None:
        expected = get_peft_model_state_dict(self._peft, adapter_name=internal, save_embedding_layers=False)
        found.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
        own = {name: found.weights[name] for name in expected}
        result = set_peft_model_state_dict(self._peft, own, adapter_name=internal)
        if result.unexpected_keys:
            raise ConfigError(f"{found.folder}: PEFT has no place for {result.unexpected_keys[0]}")
        filled = get_peft_model_state_dict(self._peft, adapter_name=internal, save_embedding_layers=False)
        for name, tensor in filled.items():
            found.check_numbers(name, tensor)
        for parameter in self._peft.parameters():
            parameter.requires_grad_(False)


def _unwrap(module: Any) -> None:
    """Take away all that PEFT has put around the layers of a module, also what it has put inside of each other."""
    for name, child in list(module.named_children()):
        inner = child
        while isinstance(inner, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner.original_module
        if inner is not child:
            setattr(module, name, inner)
        _unwrap(inner)
