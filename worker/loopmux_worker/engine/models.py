"""The models that one engine serves: base, adapters and tokenizers; and what a job becomes before it can be run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import peft
import structlog
import torch
import transformers

from loopmux.errors import AdapterNotFoundError, BadRequestError, ConfigError, LoopmuxError
from loopmux.madefor import other_base
from loopmux.messages import Generate, LeftOut, ModelSpec, ServedModel, WorkerSpec
from loopmux.modelfolders import adapter_folder
from loopmux.results import Timing, Usage
from loopmux_worker.causes import ran_out
from loopmux_worker.engine import admission, fingerprints, memory, specfolders, templates
from loopmux_worker.engine.adapterfiles import Adapter
from loopmux_worker.engine.base import Description, Job, taken, timing_of
from loopmux_worker.engine.calls import Family, family_of
from loopmux_worker.engine.continuing import Prompt
from loopmux_worker.engine.grammars import asked, matching
from loopmux_worker.engine.loading import Loaded, Progress, as_config_error, tokenizer_of
from loopmux_worker.engine.output import Piece, Reader, Reading
from loopmux_worker.engine.sampling import Sampler, seed_of
from loopmux_worker.engine.text import Decode

_log = structlog.get_logger(__name__)
_TAIL = 16
"""Tokens at a prompt's end that show whether it opened reasoning: the mark for it, in however many pieces."""


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


@dataclass(frozen=True, slots=True)
class Served:
    """A model id that is served, and what its prompts and answers go through.

    Attributes:
        tokenizer: the adapter's own where it has one.
        ends: token ids that end an output: its own tokenizer's are not its neighbours'.
        family: how its answers write reasoning and tool calls.
        notes: what somebody who wonders about its answers should know.
    """

    spec: ModelSpec
    tokenizer: Any
    ends: frozenset[int]
    family: Family
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that was checked, with its prompt as token ids; nobody else knows of it yet.

    Attributes:
        model, adapter: what it was prepared for; the adapter as a model id of its own, None for the base alone.
        rewritten: tokens of earlier answers that the prompt does not have as they were produced.
        reading: how its output is to be read.
        grammar: what its output is held to.
        arrived: when the worker got it.
    """

    job: Job
    model: Served
    adapter: Served | None
    prompt: list[int]
    rewritten: int
    reading: Reading
    grammar: matching.Matcher | None
    arrived: float


@dataclass(slots=True)
class Request:
    """A job that may run: its prompt as token ids, and everything that its tokens go through.

    ``exact``: its tokens are to be the same whatever runs beside it, and after a worker was lost.
    """

    prompt: list[int]
    rewritten: int
    adapter: str | None
    limit: int
    reader: Reader
    sampler: Sampler
    exact: bool

    def usage(self, total: int, cached: int = 0) -> Usage:
        """Token counts after ``total`` tokens of output; of the whole sequence ``cached`` were found."""
        prompt = len(self.prompt)
        return Usage(prompt, total, min(cached, prompt), self.rewritten)

    def replay(self, prefix: Iterable[int]) -> None:
        """Take in the tokens of an earlier attempt, up to the one that ended it."""
        for token in prefix:
            self.push(token)
            if self.reader.reason is not None:
                break

    def push(self, token: int) -> Piece:
        """Take in the next token."""
        self.sampler.note(token)
        return self.reader.push(token, last=self.sampler.complete)


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
        self._grammars = matching.Grammars(loaded.head)
        self._served: dict[str, Served] = {}  # replaced, never changed: ``prepare`` reads it from another thread
        self._left_out: dict[str, LoopmuxError] = {}
        self._leaving: set[str] = set()
        self._add_all(progress)

    @property
    def first(self) -> str:
        """Some model's id."""
        return next(iter(self._served))

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
        if not self._served:
            raise specfolders.nothing_left(self._left_out)
        for name, reason in self._left_out.items():
            _log.error("model left out", model=name, reason=reason.message)

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
                _log.warning("adapter of another base", model=model.id, note=note)
                notes.append(f"{model.id}: {note}")
        family, told = _family(model, tokenizer)
        notes += told
        served = Served(model, tokenizer, self.loaded.ends_with(tokenizer), family, tuple(notes))
        self._served = {**self._served, model.id: served}

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
        if name in self._served:
            there = self._adapters.loaded.get(name)
            if there is None or there.fingerprint != fingerprints.of(adapter_folder(directory)):
                raise taken(name)
            return self._announced(self._served[name].spec)
        asked_like = self._served[like].spec if like in self._served else ModelSpec("")
        self._add(replace(asked_like, id=name, adapter_dir=directory))
        self._left_out.pop(name, None)
        return self._announced(self._served[name].spec)

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
        self._served = {other: served for other, served in self._served.items() if other != name}

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

    def prepare(self, job: Job) -> Prepared:
        """Check a job and read its prompt. In any thread; uses no torch, whose threads are those of who computes.

        Raises:
            LoopmuxError: it cannot be run here; it says why.
        """
        arrived = time.monotonic() if job.arrived is None else job.arrived
        generate, loaded = job.generate, self.loaded
        generate.check()
        wanted = asked.asked(generate)
        admission.check_stop_tokens(generate, loaded.head)
        self._check_not_leaving(job.run.model, job.run.adapter)
        served = self._served  # one look: adapters come and go meanwhile
        specs = {name: one.spec for name, one in served.items()}
        model = served[admission.model_of(job.run, specs).id]
        adapter = admission.adapter_of(job.run, specs)
        if _exact(job) and loaded.dtype != torch.float32:
            raise BadRequestError(
                f"deterministic: the model runs in {str(loaded.dtype).removeprefix('torch.')}, where a resumed request "
                "may differ; set dtype: float32 for it"
            )
        prompt, rewritten = self._prompt(generate, model)
        known = min(loaded.vocabulary, loaded.head)
        if job.prefix and max(job.prefix) >= known:
            raise BadRequestError(
                f"found token {max(job.prefix)} in what this request is to go on behind, this model's ids are below "
                f"{known}"
            )
        limit = admission.room_for(len(prompt), len(job.prefix), generate.max_new_tokens, loaded.context)
        thinks = model.family.opens_reasoning(_decoder(model.tokenizer)(prompt[-_TAIL:]))
        reading = _reading(job, model, limit, thinks=thinks)
        grammar = None
        if wanted is not None:
            grammar = self._grammars.matcher(
                wanted, model.family, model.tokenizer, eos=model.ends, ends=reading.ends, thinks=thinks
            )
        return Prepared(job, model, served[adapter] if adapter else None, prompt, rewritten, reading, grammar, arrived)

    def begin(self, prepared: Prepared) -> Request:
        """A prepared job, ready to run and past its prefix.

        Raises:
            LoopmuxError: it cannot be run any more, for an adapter went since; or it names a token that is not there.
        """
        job, generate, loaded = prepared.job, prepared.job.generate, self.loaded
        self._check_not_leaving(job.run.model, job.run.adapter)
        for served in (prepared.model, prepared.adapter):
            if served is not None and self._served.get(served.spec.id) is not served:
                raise AdapterNotFoundError(
                    f"adapter {served.spec.id!r} was unloaded while this request's prompt was read; if one of that "
                    "name is loaded again, send the request again",
                    model=served.spec.id,
                )
        sampler = Sampler(
            generate.sampling,
            seed=seed_of(generate.sampling, job.key.request),
            vocabulary=loaded.head,
            prompt=prepared.prompt,
            logprobs=generate.logprobs,
            device=loaded.device,
            grammar=prepared.grammar,
        )
        adapter = prepared.adapter.spec.id if prepared.adapter else None
        reading = prepared.reading
        said = prepared.prompt, prepared.rewritten, adapter, reading.limit
        request = Request(*said, Reader(reading), sampler, _exact(job))
        request.replay(job.prefix)
        return request

    def _prompt(self, generate: Generate, model: Served) -> Prompt:
        prompt = templates.render(generate, model.spec, model.tokenizer, model.ends)
        if not prompt.ids:
            raise BadRequestError("prompt: found no tokens, expected at least one")
        if max(prompt.ids) >= self.loaded.vocabulary:
            where = "token_ids of a message" if generate.prompt_token_ids is None else "prompt_token_ids"
            raise BadRequestError(
                f"{where}: found {max(prompt.ids)}, this model's ids are below {self.loaded.vocabulary}"
            )
        return prompt

    # --- about itself -------------------------------------------------------------------------------------------------

    def describe(self, engine: str, slots: int, more: dict[str, Any]) -> Description:
        """What is loaded, as an engine of this name describes itself."""
        served = tuple(self._announced(model.spec) for model in self._served.values())
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
            "threads": torch.get_num_threads(),
            "adapters": {name: adapter.fingerprint for name, adapter in self._adapters.loaded.items()},
            "tool_formats": {
                name: served.family.name
                for name, served in self._served.items()
                if served.spec.model_type == "instruct"
            },
            "unloading": sorted(self._leaving),
            "notes": [*loaded.notes, *(note for served in self._served.values() for note in served.notes)],
        }


def _exact(job: Job) -> bool:
    return job.generate.deterministic or job.run.deterministic


def _family(model: ModelSpec, tokenizer: Any) -> tuple[Family, list[str]]:
    """How a model writes calls, and what is worth a note about it; without a template all that it writes is text."""
    if model.model_type == "base" or not templates.has_template(tokenizer):
        return family_of(None), []
    family = family_of(str(tokenizer.chat_template), model.tool_format)
    if family.name != "envelope" or model.tool_format != "auto" or not templates.shows_tools(tokenizer):
        return family, []
    note = (
        f"{model.id}: its chat template shows tools, but how they are called is not known; 'envelope' is used: "
        "set tool_format if it is another"
    )
    return family, [note]


def _decoder(tokenizer: Any) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _reading(job: Job, model: Served, limit: int, *, thinks: bool) -> Reading:
    generate, tokenizer, family = job.generate, model.tokenizer, model.family
    tools = admission.callable_tools(generate)
    plain = templates.uses_plain_chat(generate, model.spec, tokenizer)
    return Reading(
        decode=_decoder(tokenizer),
        ends=frozenset(generate.stop_token_ids) | (frozenset() if generate.ignore_eos else model.ends),
        silent=_special(tokenizer, keep=family.tokens(calls=bool(tools))),
        stops=(*generate.stop, templates.PLAIN_CHAT_STOP) if plain else generate.stop,
        limit=limit,
        parser=lambda: family.parser(job.key.request, tools, reasoning=thinks),
        one_call=bool(tools) and not generate.parallel_tool_calls,
    )


def _special(tokenizer: Any, keep: tuple[str, ...]) -> frozenset[int]:
    """Ids of special tokens, which have no text; ``keep`` are those that mean something to a parser."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    kept = {tokenizer.added_tokens_encoder[text] for text in keep if text in tokenizer.added_tokens_encoder}
    return frozenset((marked | set(tokenizer.all_special_ids)) - kept)
