"""What one engine serves: base, adapters, tokenizers; what comes and goes at run time; how it describes itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import peft
import torch
import transformers

from loopmux.errors import AdapterNotFoundError, BadRequestError, ConfigError, LoopmuxError
from loopmux.madefor import other_base
from loopmux.messages import LeftOut, ModelSpec, ServedModel, WorkerSpec
from loopmux.modelfolders import adapter_folder
from loopmux_worker import logs
from loopmux_worker.causes import ran_out
from loopmux_worker.engine import fingerprints, memory, specfolders
from loopmux_worker.engine.adapterfiles import Adapter
from loopmux_worker.engine.base import Description, fitting, taken
from loopmux_worker.engine.grammars import matching
from loopmux_worker.engine.loading import Loaded, Progress, as_config_error, tokenizer_of
from loopmux_worker.engine.served import Served, family_for

_NOTES = 8192
"""Bytes of notes that are reported; there may be some about each of many models."""


class AdapterStore(Protocol):
    """Adapters in a model; who puts them to use is the engine's matter."""

    @property
    def loaded(self) -> dict[str, Adapter]:
        """By name."""
        ...

    def load(self, name: str, directory: str) -> Adapter:
        """Load an adapter under a name, whole or not at all."""
        ...

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        ...


class Models:
    """Everything that one engine serves.

    Args:
        spec: what to serve.
        loaded: its base.
        adapters: where adapters go.
        progress: told what is being done.
        why: the reason for the engine that uses this, for ``status``.

    Raises:
        LoopmuxError: something does not fit that is not one adapter's alone, or no model is left.
    """

    def __init__(self, spec: WorkerSpec, loaded: Loaded, adapters: AdapterStore, progress: Progress, why: str) -> None:
        self.loaded = loaded
        self._spec, self._adapters, self._why = spec, adapters, why
        self.served: dict[str, Served] = {}
        """By model id. Replaced, never changed: requests are prepared in another thread."""
        self._left_out: dict[str, LoopmuxError] = {}
        self._leaving: set[str] = set()
        self._add_all(progress)

    @property
    def first(self) -> str:
        """Some model's id."""
        return next(iter(self.served))

    # --- loading ------------------------------------------------------------------------------------------------------

    def _add_all(self, progress: Progress) -> None:
        """Take in all models of the specification; one whose adapter cannot be used is left out with the reason."""
        for model in self._spec.models:
            if model.adapter_dir:
                progress("loading", f"adapter {model.id}")
            try:
                self._add(self._without_merged(model))
            except Exception as error:
                if model.adapter_dir is None or ran_out(error):
                    raise  # that is not this adapter's own fault
                if not isinstance(error, LoopmuxError):
                    logs.exception("loading an adapter failed", model=model.id)
                self._left_out[model.id] = as_config_error(error)
        if not self.served:
            raise specfolders.nothing_left(self._left_out)
        for name, reason in self._left_out.items():
            logs.error("model left out", model=name, reason=reason.message)

    def _add(self, model: ModelSpec) -> None:
        """Take in one model: its tokenizer, and its adapter if it has one."""
        before = fingerprints.state(adapter_folder(model.adapter_dir)) if model.adapter_dir else ()
        tokenizer, notes = tokenizer_of(model, self.loaded, self._spec)
        if model.adapter_dir:
            with memory.loading_adapter(model.id, model.adapter_dir):
                adapter = self._adapters.load(model.id, model.adapter_dir)
            try:
                fingerprints.check_unchanged(adapter.folder, before)
            except ConfigError:
                self._adapters.unload(model.id)
                raise
            base = self._spec.base_model or str(self.loaded.folder)
            if note := other_base(adapter.made_for, base, adapter.folder):
                logs.warning("adapter of another base", model=model.id, note=note)
                notes.append(f"{model.id}: {note}")
        family, told = family_for(model, tokenizer)
        notes += told
        served = Served(model, tokenizer, self.loaded.ends_with(tokenizer), family, tuple(notes))
        self.served = {**self.served, model.id: served}

    def _without_merged(self, model: ModelSpec) -> ModelSpec:
        """A merged model in ``adapter_dir`` was loaded as the base: there is no adapter to put on it."""
        merged = model.adapter_dir and adapter_folder(model.adapter_dir) == self.loaded.folder
        return replace(model, adapter_dir=None) if merged else model

    def load_adapter(self, name: str, directory: str, like: str) -> ServedModel:
        """Load an adapter and serve it as a model of that name; see ``Engine``.

        Raises:
            LoopmuxError: the name is taken, or the adapter cannot be used.
        """
        if name in self._leaving:
            raise BadRequestError(
                f"adapter {name!r}: one of that name is being unloaded, for requests that still use it: load this one "
                "when they have ended, or under another name",
                retryable=True,
            )
        if name in self.served:
            there = self._adapters.loaded.get(name)
            if there is None or there.fingerprint != fingerprints.of(adapter_folder(directory)):
                raise taken(name)
            return self._announced(self.served[name].spec)
        asked_like = self.served[like].spec if like in self.served else ModelSpec("")
        self._add(replace(asked_like, id=name, adapter_dir=directory))
        self._left_out.pop(name, None)
        return self._announced(self.served[name].spec)

    def leave(self, name: str) -> None:
        """Serve an adapter's model no more: new requests for it are refused, those that use it go on until ``unload``.

        Raises:
            AdapterNotFoundError: no such adapter, or it is leaving already.
        """
        self.check_not_leaving(name)
        if name not in self._adapters.loaded:
            raise AdapterNotFoundError(
                f"adapter {name!r} is not loaded; loaded: {', '.join(self._staying()) or 'none'}"
            )
        self._leaving.add(name)
        self.served = {other: served for other, served in self.served.items() if other != name}

    def unload(self, name: str) -> None:
        """Forget an adapter that left and that no request uses any more."""
        try:
            self._adapters.unload(name)
        finally:
            self._leaving.discard(name)

    @property
    def leaving(self) -> frozenset[str]:
        """Adapters that go when nobody uses them any more."""
        return frozenset(self._leaving)

    def _staying(self) -> tuple[str, ...]:
        return tuple(name for name in self._adapters.loaded if name not in self._leaving)

    def check_not_leaving(self, *names: str | None) -> None:
        """Refuse new requests for adapters that are being unloaded.

        Raises:
            AdapterNotFoundError: naming the adapter.
        """
        for name in names:
            if name in self._leaving:
                raise AdapterNotFoundError(
                    f"adapter {name!r} is being unloaded: found requests that still use it, new ones are not taken; "
                    f"use another one ({', '.join(self._staying()) or 'none is loaded'}), or load it again when they "
                    "have ended",
                    model=name,
                )

    def identity(self, adapter: str | None) -> str:
        """What attention state depends on beside the tokens: the content of base and adapter."""
        return f"{self.loaded.fingerprint} {self._adapters.loaded[adapter].fingerprint if adapter else ''}"

    # --- about itself -------------------------------------------------------------------------------------------------

    def describe(self, engine: str, slots: int, more: dict[str, Any]) -> Description:
        """What is loaded, as an engine of this name describes itself."""
        served = tuple(self._announced(model.spec) for model in self.served.values())
        left_out = tuple(LeftOut(name, error.message) for name, error in self._left_out.items())
        report = {"engine": engine, "why": self._why, **self._report(), **more}
        return Description(engine, served, slots, self._staying(), report, left_out)

    def _announced(self, model: ModelSpec) -> ServedModel:
        adapter = self._adapters.loaded.get(model.id)
        parts = {
            "base": self.loaded.fingerprint,
            "adapter": adapter.fingerprint if adapter else "",
            "prompt": f"{model.model_type} {model.tool_format} {model.system_prompt or ''}",
        }
        return ServedModel(model.id, fingerprints.combined(parts), model.id if adapter else None)

    def _report(self) -> dict[str, Any]:
        loaded = self.loaded
        notes = [*loaded.notes, *(note for served in self.served.values() for note in served.notes)]
        return {
            "base_model": str(loaded.folder),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "llguidance": matching.release(),
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "context": loaded.context,
            "parameters": loaded.parameters,
            "weights_bytes": loaded.weights_bytes,
            "threads": loaded.threads,
            "adapters": {name: adapter.fingerprint for name, adapter in self._adapters.loaded.items()},
            "tool_formats": {
                name: served.family.name for name, served in self.served.items() if served.spec.model_type == "instruct"
            },
            "unloading": sorted(self._leaving),
            "notes": fitting(notes, _NOTES),
        }
