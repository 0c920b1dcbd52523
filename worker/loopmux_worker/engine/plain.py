"""The plain engine: transformers' own ``generate()``, one request at a time. Slow, and right for every model.

``generate()`` runs in one helper thread, which alone touches the model while it runs. Each token is chosen by our
``Sampler`` (as a logits processor that leaves only the chosen token) and read by our ``Reader`` (as a stopping
criterion), so sampling, text and stopping are the same here as in any other engine.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace
from typing import Any

import peft
import structlog
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from loopmux.errors import BadRequestError, EngineError, LoopmuxError
from loopmux.madefor import other_base
from loopmux.messages import Generate, LeftOut, ModelSpec, Run, Sampling, ServedModel, WorkerSpec
from loopmux.results import Usage
from loopmux.wire import new_id, pack_tokens
from loopmux_worker.engine import admission, files, folders, memory, templates
from loopmux_worker.engine.adapters import Adapters
from loopmux_worker.engine.base import Description, Failed, Finished, Job, Key, Load, Output, Produced
from loopmux_worker.engine.generating import Choose, Read, Task
from loopmux_worker.engine.loading import Loaded, Progress, as_config_error, load, tokenizer_of
from loopmux_worker.engine.output import Reader, Reading
from loopmux_worker.engine.sampling import Sampler, seed_of
from loopmux_worker.engine.toolparse import CLOSE, OPEN

_log = structlog.get_logger(__name__)

_WAIT = 0.01
"""Seconds that a step waits for the helper thread: shorter than a token, long enough not to spin."""


class PlainEngine:
    """One model with its adapters behind ``generate()``.

    Args:
        spec: what to load.
        progress: told what is being done.
        why: the reason for this engine, for ``status``.

    Raises:
        ConfigError: something does not fit; it says what.
    """

    def __init__(self, spec: WorkerSpec, progress: Progress, why: str) -> None:
        self._spec, self._why = spec, why
        self._loaded: Loaded = load(spec, progress)
        self._adapters = Adapters(self._loaded.model, allow_pickle=spec.allow_pickle_weights)
        self._model_lock = threading.Lock()
        self._models: dict[str, ModelSpec] = {}
        self._left_out: dict[str, LoopmuxError] = {}
        self._add_all(progress)
        self._tasks: dict[Key, Task] = {}
        self._ready: list[Output] = []
        self._progress = 0
        self._todo: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()
        progress("warming", "one token")
        self._warm_up()

    # --- the interface; see ``Engine`` --------------------------------------------------------------------------------

    def describe(self) -> Description:
        """What is loaded."""
        served = tuple(self._served(model) for model in self._models.values())
        left_out = tuple(LeftOut(name, error.message) for name, error in self._left_out.items())
        return Description("plain", served, 1, tuple(self._adapters.loaded), self._report(), left_out)

    def submit(self, job: Job) -> None:
        """Take a request in; one at a time runs, others wait."""
        task = self._task(job)
        for token in job.prefix:
            task.sampler.note(token)
            task.reader.push(token)
            if task.reader.reason is not None:
                break
        task.reported = task.reader.total
        self._tasks[job.key] = task
        if task.reader.reason is None:
            self._todo.put(task)
        else:  # the lost attempt had produced the last token already
            self._ready.append(self._finished(task))

    def cancel(self, key: Key) -> Usage | None:
        """Forget a request; ``generate()`` returns before its next token."""
        task = self._tasks.pop(key, None)
        if task is None:
            return None
        task.cancelled.set()
        return task.usage(task.reported)

    def step(self) -> list[Output]:
        """What the helper thread has made since the last call; waits a moment for something."""
        outputs, self._ready = self._ready, []
        try:
            if not outputs and self._tasks:
                outputs.append(self._done.get(timeout=_WAIT))
            while True:
                outputs.append(self._done.get_nowait())
        except queue.Empty:
            pass  # that is all for now
        return [output for output in outputs if self._note(output)]

    def due(self) -> float | None:
        """Now, while anything runs."""
        return 0.0 if self._tasks else None

    def load(self) -> Load:
        """Load and progress."""
        running = min(1, len(self._tasks))
        return Load(running, len(self._tasks) - running, self._progress)

    def load_adapter(self, name: str, directory: str) -> ServedModel:
        """Load an adapter; waits for the request that runs."""
        if name in self._models:
            raise BadRequestError(f"adapter {name!r}: a model or adapter of that name is served already")
        self._add(ModelSpec(name, adapter_dir=directory))
        self._left_out.pop(name, None)
        return self._served(self._models[name])

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter that no request uses."""
        users = sum(task.adapter == name for task in self._tasks.values())
        if users:
            raise EngineError(
                f"adapter {name!r} is used by {users} requests: unload it when they ended", retryable=True
            )
        with self._model_lock:
            self._adapters.unload(name)
        del self._models[name], self._loaded.tokenizers[name]

    def close(self) -> None:
        """End the helper thread; a running request ends before its next token."""
        for task in self._tasks.values():
            task.cancelled.set()
        self._todo.put(None)
        self._thread.join()

    # --- models -------------------------------------------------------------------------------------------------------

    def _add_all(self, progress: Progress) -> None:
        """Take in all models of the specification; one whose adapter cannot be used is left out with the reason.

        Raises:
            LoopmuxError: what is wrong is not one adapter's alone, or no model is left.
        """
        for model in self._spec.models:
            if model.adapter_dir:
                progress("loading", f"adapter {model.id}")
            try:
                self._add(self._without_merged(model))
            except Exception as error:
                if model.adapter_dir is None or memory.ran_out(error):
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
        tokenizer, notes = tokenizer_of(model, self._loaded, self._spec)
        if model.adapter_dir:
            with self._model_lock:
                adapter = self._adapters.load(model.id, model.adapter_dir)
            base = self._spec.base_model or str(self._loaded.folder)
            if note := other_base(adapter.made_for, base, adapter.folder):
                _log.warning("adapter of another base", model=model.id, note=note)
                notes.append(f"{model.id}: {note}")
        self._models[model.id] = model
        self._loaded.add(model, tokenizer, notes)

    def _without_merged(self, model: ModelSpec) -> ModelSpec:
        """A merged model in ``adapter_dir`` was loaded as the base: there is no adapter to put on it."""
        merged = model.adapter_dir and files.adapter_folder(model.adapter_dir) == self._loaded.folder
        return replace(model, adapter_dir=None) if merged else model

    # --- taking requests in -------------------------------------------------------------------------------------------

    def _task(self, job: Job) -> Task:
        generate, loaded = job.generate, self._loaded
        admission.check(generate)
        model = admission.model_of(job.run, self._models)
        adapter = admission.adapter_of(job.run, self._models)
        if (generate.deterministic or job.run.deterministic) and loaded.dtype != torch.float32:
            raise BadRequestError(
                f"deterministic: the model runs in {str(loaded.dtype).removeprefix('torch.')}, where a resumed request "
                "may differ; set dtype: float32 for it"
            )
        prompt = self._prompt(generate, model)
        limit = admission.room_for(len(prompt), len(job.prefix), generate.max_new_tokens, loaded.context)
        sampler = Sampler(
            generate.sampling,
            seed=seed_of(generate.sampling, job.key.request),
            vocabulary=loaded.head,
            prompt=prompt,
            logprobs=generate.logprobs,
            device=loaded.device,
        )
        reader = Reader(self._reading(job, model, limit))
        return Task(job, prompt, adapter, limit, reader, sampler, time.monotonic())

    def _prompt(self, generate: Generate, model: ModelSpec) -> list[int]:
        prompt = templates.render(generate, model, self._loaded.tokenizers[model.id])
        if not prompt:
            raise BadRequestError("prompt: found no tokens, expected at least one")
        if max(prompt) >= self._loaded.vocabulary:
            raise BadRequestError(
                f"prompt_token_ids: found {max(prompt)}, this model's ids are below {self._loaded.vocabulary}"
            )
        return prompt

    def _reading(self, job: Job, model: ModelSpec, limit: int) -> Reading:
        generate, tokenizer = job.generate, self._loaded.tokenizers[model.id]
        calls = admission.parses_calls(generate)
        ends = frozenset(generate.stop_token_ids) | (frozenset() if generate.ignore_eos else self._loaded.ends)
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

    # --- the helper thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self._spec.torch_threads is not None:
            torch.set_num_threads(self._spec.torch_threads)
        while (task := self._todo.get()) is not None:
            if task.cancelled.is_set():
                continue
            task.started = time.monotonic()
            try:
                self._generate(task)
                if not task.cancelled.is_set():
                    self._done.put(self._finished(task))
            except Exception as error:  # noqa: BLE001 - it ends this request; the next one may well run
                self._done.put(Failed(task.job.key, task.reader.total, _as_ours(error), task.usage(task.reader.total)))

    def _generate(self, task: Task) -> None:
        ids = torch.tensor([[*task.prompt, *task.job.prefix]], device=self._loaded.device)
        config = GenerationConfig(
            max_new_tokens=task.limit - len(task.job.prefix),
            do_sample=False,
            pad_token_id=next(iter(self._loaded.ends), 0),  # never seen: there is one row
            use_cache=True,
        )
        with self._model_lock, self._adapters.using(task.adapter), torch.inference_mode():
            self._loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([Choose(task)]),
                stopping_criteria=StoppingCriteriaList([Read(task, self._done)]),
            )

    def _finished(self, task: Task) -> Finished:
        total, reason = task.reader.total, task.reader.reason
        if reason is None:
            raise EngineError(f"generate() returned after {total} of {task.limit} tokens without a reason")
        return Finished(task.job.key, total, reason, task.usage(total), task.timing(time.monotonic()))

    def _note(self, output: Output) -> bool:
        """Keep the books on an output; False for one of a request that was cancelled meanwhile."""
        task = self._tasks.get(output.key)
        if task is None:
            return False
        if isinstance(output, Produced):
            task.reported += len(output.ids)
            self._progress += len(output.ids)
        else:
            del self._tasks[output.key]
        return True

    # --- about itself -------------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """One token through the whole path, so that READY means ready."""
        model = next(iter(self._models))
        generate = Generate(prompt_token_ids=pack_tokens([0]), max_new_tokens=1, sampling=Sampling(temperature=0))
        self.submit(Job(Key(new_id(), 0), Run(model), generate))
        while self._tasks:
            for output in self.step():
                if isinstance(output, Failed):
                    self.close()
                    raise output.error
        self._progress = 0

    def _served(self, model: ModelSpec) -> ServedModel:
        adapter = self._adapters.loaded.get(model.id)
        parts = {
            "base": self._loaded.fingerprint,
            "adapter": adapter.fingerprint if adapter else "",
            "prompt": f"{model.model_type} {model.system_prompt or ''}",
        }
        return ServedModel(model.id, files.combined(parts), model.id if adapter else None)

    def _report(self) -> dict[str, Any]:
        loaded = self._loaded
        parameters = sum(p.numel() for p in loaded.model.parameters())
        size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        return {
            "engine": "plain",
            "why": self._why,
            "base_model": str(loaded.folder),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "context": loaded.context,
            "parameters": parameters,
            "weights_bytes": size,
            "threads": torch.get_num_threads(),
            "adapters": {name: adapter.fingerprint for name, adapter in self._adapters.loaded.items()},
            "notes": list(loaded.notes),
        }


def _special(tokenizer: Any, keep: tuple[str, ...]) -> frozenset[int]:
    """Ids of special tokens, which have no text; ``keep`` are those that mean something to a parser."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    kept = {tokenizer.added_tokens_encoder[text] for text in keep if text in tokenizer.added_tokens_encoder}
    return frozenset((marked | set(tokenizer.all_special_ids)) - kept)


def _as_ours(error: Exception) -> LoopmuxError:
    if isinstance(error, LoopmuxError):
        return error
    return EngineError(f"generate() failed: {type(error).__name__}: {error}")
