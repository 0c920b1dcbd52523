"""The models that one engine serves: base, adapters and tokenizers; and what a job becomes before it can be run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import peft
import structlog
import torch
import transformers

from loopmux.errors import AdapterNotFoundError, BadRequestError, LoopmuxError
from loopmux.madefor import other_base
from loopmux.messages import Generate, LeftOut, ModelSpec, ServedModel, WorkerSpec
from loopmux.modelfolders import adapter_folder
from loopmux.results import Timing
from loopmux_worker.causes import ran_out
from loopmux_worker.engine import admission, files, folders, memory, templates
from loopmux_worker.engine.adapterfiles import Adapter
from loopmux_worker.engine.base import Description, Job, taken, timing_of
from loopmux_worker.engine.loading import Loaded, Progress, as_config_error, tokenizer_of
from loopmux_worker.engine.output import Piece, Reader, Reading
from loopmux_worker.engine.sampling import Sampler, seed_of
from loopmux_worker.engine.toolparse import CLOSE, OPEN

_log = structlog.get_logger(__name__)


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


@dataclass(slots=True)
class Request:
    """A job that may run: its prompt as token ids, and everything that its tokens go through."""

    prompt: list[int]
    adapter: str | None
    limit: int
    reader: Reader
    sampler: Sampler

    def replay(self, prefix: Iterable[int]) -> None:
        """Take in the tokens of an earlier attempt, up to the one that ended it."""
        for token in prefix:
            self.push(token)
            if self.reader.reason is not None:
                break

    def push(self, token: int) -> Piece:
        """Take in the next token."""
        self.sampler.note(token)
        return self.reader.push(token)


@dataclass(slots=True)
class Running:
    """A request that an engine has taken in: when it came, when it was begun, when its first own token came."""

    job: Job
    request: Request
    arrived: float
    started: float | None = None
    first: float | None = None

    def timing(self, now: float) -> Timing:
        """Where the time went, seconds."""
        tokens = self.request.reader.total - len(self.job.prefix)
        return timing_of(self.arrived, self.started, self.first, now, tokens)


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
        self._models: dict[str, ModelSpec] = {}
        self._left_out: dict[str, LoopmuxError] = {}
        self._leaving: set[str] = set()
        self._add_all(progress)

    @property
    def first(self) -> str:
        """Some model's id."""
        return next(iter(self._models))

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
                    _log.exception("loading an adapter failed", model=model.id)
                self._left_out[model.id] = as_config_error(error)
        if not self._models:
            raise folders.nothing_left(self._left_out)
        for name, reason in self._left_out.items():
            _log.error("model left out", model=name, reason=reason.message)

    def _add(self, model: ModelSpec) -> None:
        """Take in one model: its tokenizer, and its adapter if it has one."""
        tokenizer, notes = tokenizer_of(model, self.loaded, self._spec)
        if model.adapter_dir:
            with memory.loading_adapter(model.id, model.adapter_dir):
                adapter = self._adapters.load(model.id, model.adapter_dir)
            base = self._spec.base_model or str(self.loaded.folder)
            if note := other_base(adapter.made_for, base, adapter.folder):
                _log.warning("adapter of another base", model=model.id, note=note)
                notes.append(f"{model.id}: {note}")
        self._models[model.id] = model
        self.loaded.add(model, tokenizer, notes)

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
        if name in self._models:
            there = self._adapters.loaded.get(name)
            if there is None or there.fingerprint != files.fingerprint(adapter_folder(directory)):
                raise taken(name)
            return self._served(self._models[name])
        self._add(replace(self._models.get(like, ModelSpec("")), id=name, adapter_dir=directory))
        self._left_out.pop(name, None)
        return self._served(self._models[name])

    def leave(self, name: str) -> None:
        """Serve an adapter's model no more: new requests for it are refused, those that use it go on until ``unload``.

        Raises:
            AdapterNotFoundError: no such adapter, or it is leaving already.
        """
        self._check_not_leaving(name)
        if name not in self._adapters.loaded:
            raise AdapterNotFoundError(
                f"adapter {name!r} is not loaded; loaded: {', '.join(self._staying()) or 'none'}"
            )
        self._leaving.add(name)
        del self._models[name], self.loaded.tokenizers[name]

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

    def _check_not_leaving(self, *names: str | None) -> None:
        for name in names:
            if name in self._leaving:
                raise AdapterNotFoundError(
                    f"adapter {name!r} is being unloaded: found requests that still use it, new ones are not taken; "
                    f"use another one ({', '.join(self._staying()) or 'none is loaded'}), or load it again when they "
                    "have ended",
                    model=name,
                )

    # --- requests -----------------------------------------------------------------------------------------------------

    def identity(self, adapter: str | None) -> str:
        """What attention state depends on beside the tokens: the content of base and adapter."""
        return f"{self.loaded.fingerprint} {self._adapters.loaded[adapter].fingerprint if adapter else ''}"

    def prepare(self, job: Job) -> Request:
        """Check a job and make it ready to run.

        Raises:
            LoopmuxError: it cannot be run here; it says why.
        """
        generate, loaded = job.generate, self.loaded
        admission.check(generate)
        admission.check_stop_tokens(generate, loaded.head)
        self._check_not_leaving(job.run.model, job.run.adapter)
        model = admission.model_of(job.run, self._models)
        adapter = admission.adapter_of(job.run, self._models)
        if (generate.deterministic or job.run.deterministic) and loaded.dtype != torch.float32:
            raise BadRequestError(
                f"deterministic: the model runs in {str(loaded.dtype).removeprefix('torch.')}, where a resumed request "
                "may differ; set dtype: float32 for it"
            )
        prompt = self._prompt(generate, model)
        if job.prefix and max(job.prefix) >= loaded.vocabulary:
            raise BadRequestError(
                f"found token {max(job.prefix)} in what this request is to go on behind, this model's ids are below "
                f"{loaded.vocabulary}"
            )
        limit = admission.room_for(len(prompt), len(job.prefix), generate.max_new_tokens, loaded.context)
        sampler = Sampler(
            generate.sampling,
            seed=seed_of(generate.sampling, job.key.request),
            vocabulary=loaded.head,
            prompt=prompt,
            logprobs=generate.logprobs,
            device=loaded.device,
        )
        return Request(prompt, adapter, limit, Reader(self._reading(job, model, limit)), sampler)

    def _prompt(self, generate: Generate, model: ModelSpec) -> list[int]:
        prompt = templates.render(generate, model, self.loaded.tokenizers[model.id])
        if not prompt:
            raise BadRequestError("prompt: found no tokens, expected at least one")
        if max(prompt) >= self.loaded.vocabulary:
            raise BadRequestError(
                f"prompt_token_ids: found {max(prompt)}, this model's ids are below {self.loaded.vocabulary}"
            )
        return prompt

    def _reading(self, job: Job, model: ModelSpec, limit: int) -> Reading:
        generate, tokenizer = job.generate, self.loaded.tokenizers[model.id]
        calls = admission.parses_calls(generate)
        ends = frozenset(generate.stop_token_ids) | (
            frozenset() if generate.ignore_eos else self.loaded.ends_of(model.id)
        )
        plain = templates.uses_plain_chat(generate, model, tokenizer)
        stops = (*generate.stop, templates.PLAIN_CHAT_STOP) if plain else generate.stop
        return Reading(
            decode=lambda ids: str(
                tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            ),
            ends=ends,
            silent=_special(tokenizer, keep=(OPEN, CLOSE) if calls else ()),
            stops=stops,
            limit=limit,
            calls=job.key.request if calls else None,
            one_call=calls and not generate.parallel_tool_calls,
        )

    # --- about itself -------------------------------------------------------------------------------------------------

    def describe(self, engine: str, slots: int, more: dict[str, Any]) -> Description:
        """What is loaded, as an engine of this name describes itself."""
        served = tuple(self._served(model) for model in self._models.values())
        left_out = tuple(LeftOut(name, error.message) for name, error in self._left_out.items())
        report = {"engine": engine, "why": self._why, **self._report(), **more}
        return Description(engine, served, slots, self._staying(), report, left_out)

    def _served(self, model: ModelSpec) -> ServedModel:
        adapter = self._adapters.loaded.get(model.id)
        parts = {
            "base": self.loaded.fingerprint,
            "adapter": adapter.fingerprint if adapter else "",
            "prompt": f"{model.model_type} {model.system_prompt or ''}",
        }
        return ServedModel(model.id, files.combined(parts), model.id if adapter else None)

    def _report(self) -> dict[str, Any]:
        loaded = self.loaded
        return {
            "base_model": str(loaded.folder),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "context": loaded.context,
            "parameters": loaded.parameters,
            "weights_bytes": loaded.weights_bytes,
            "threads": torch.get_num_threads(),
            "adapters": {name: adapter.fingerprint for name, adapter in self._adapters.loaded.items()},
            "unloading": sorted(self._leaving),
            "notes": list(loaded.notes),
        }


def _special(tokenizer: Any, keep: tuple[str, ...]) -> frozenset[int]:
    """Ids of special tokens, which have no text; ``keep`` are those that mean something to a parser."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    kept = {tokenizer.added_tokens_encoder[text] for text in keep if text in tokenizer.added_tokens_encoder}
    return frozenset((marked | set(tokenizer.all_special_ids)) - kept)
