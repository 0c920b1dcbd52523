"""The plain engine: transformers' own ``generate()``, one request at a time. Slow, and right for every model.

``generate()`` runs in one helper thread, which alone touches the model while it runs. Each token is chosen by our
``Sampler`` (as a logits processor that leaves only the chosen token) and read by our ``Reader`` (as a stopping
criterion), so sampling, text and stopping are the same here as in any other engine.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from loopmux.errors import EngineError
from loopmux.messages import ServedModel
from loopmux.results import Usage
from loopmux_worker import logs
from loopmux_worker.causes import DeviceLostError
from loopmux_worker.engine.adapters import Adapters
from loopmux_worker.engine.base import (
    Description,
    Engine,
    Failed,
    Finished,
    Job,
    Key,
    Load,
    Output,
    Produced,
    engine_error,
)
from loopmux_worker.engine.failures import Failures
from loopmux_worker.engine.generating import Choose, Read, Task
from loopmux_worker.engine.models import Models
from loopmux_worker.engine.requests import Prepared, Requests

_WAIT = 0.01
"""Seconds that a step waits for the helper thread: shorter than a token, long enough not to spin."""


@dataclass(frozen=True, slots=True)
class _Leave:
    """An adapter that is to go: what was submitted before may use it, nothing behind does."""

    name: str
    done: threading.Event = field(default_factory=threading.Event)


class PlainEngine(Engine):
    """One model with its adapters behind ``generate()``.

    Args:
        models: what is served.
        adapters: the adapters among it, which ``generate()`` uses one at a time.
    """

    slow_to_prepare = True

    def __init__(self, models: Models, adapters: Adapters) -> None:
        self._models, self._adapters = models, adapters
        self._requests = Requests(models)
        self._model_lock = threading.Lock()
        self._may_begin = threading.Event()  # else the next request waits for an adapter to be loaded first
        self._may_begin.set()
        self._tasks: dict[Key, Task] = {}
        self._ready: list[Output] = []
        self._progress = self._computed = 0
        self._failures = Failures(models.loaded.device)
        self._lost: DeviceLostError | None = None
        self._todo: queue.SimpleQueue[Task | _Leave | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    # --- the interface; see ``Engine`` --------------------------------------------------------------------------------

    def describe(self) -> Description:
        """What is loaded."""
        return self._models.describe("plain", 1, {})

    def prepare(self, job: Job) -> Prepared:
        """Check a request and read its prompt."""
        return self._requests.prepare(job)

    def add(self, prepared: Prepared) -> None:
        """Take a request in; one at a time runs, others wait."""
        request = self._requests.begin(prepared)
        task = self._tasks[request.job.key] = Task(request, reported=request.reader.total)
        if request.reader.reason is None:
            self._todo.put(task)
        else:  # the lost attempt had produced the last token already
            self._ready.append(self._finished(task))

    def cancel(self, key: Key) -> Usage | None:
        """Forget a request; ``generate()`` returns before its next token."""
        task = self._tasks.pop(key, None)
        if task is None:
            return None
        task.cancelled.set()
        return task.request.usage(task.reported)

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
        if self._lost is not None:
            raise self._lost
        return [output for output in outputs if self._note(output)]

    def due(self) -> float | None:
        """Now, while anything runs."""
        return 0.0 if self._tasks else None

    def load(self) -> Load:
        """Load and progress."""
        running = min(1, len(self._tasks))
        return Load(running, len(self._tasks) - running, self._progress, computed=self._computed)

    def can_load(self) -> bool:
        """Not while a request runs; the next one waits then."""
        if not self._model_lock.locked():
            return True
        self._may_begin.clear()
        return False

    def load_adapter(self, name: str, directory: str, like: str = "") -> ServedModel:
        """Load an adapter; waits for the request that runs."""
        try:
            with self._model_lock:
                return self._models.load_adapter(name, directory, like)
        finally:
            self._may_begin.set()

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter when the helper thread has come to the end of what was submitted before.

        Waits for that where nothing runs, so that the name is free then.
        """
        self._models.leave(name)
        self._todo.put(leave := _Leave(name))
        if not self._tasks:
            leave.done.wait()

    def close(self) -> None:
        """End the helper thread; a running request ends before its next token."""
        for task in self._tasks.values():
            task.cancelled.set()
        self._may_begin.set()
        self._todo.put(None)
        self._thread.join()

    # --- the helper thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_num_threads(self._models.loaded.threads)  # which holds for the thread that says it
        while (task := self._todo.get()) is not None:
            if isinstance(task, _Leave):
                self._let_go(task)
                continue
            self._may_begin.wait()
            if task.cancelled.is_set():
                continue
            task.request.started = time.monotonic()
            self._computed += len(task.request.prompt)
            try:
                self._generate(task)
                self._failures.succeeded()
                if not task.cancelled.is_set():
                    self._done.put(self._finished(task))
            except Exception as error:  # noqa: BLE001 - it ends this request; the next one may well run
                self._note_failure(error)
                usage = task.request.usage(task.request.reader.total)
                self._done.put(Failed(task.request.job.key, engine_error("generate()", error), usage))

    def _let_go(self, leave: _Leave) -> None:
        try:
            with self._model_lock:
                self._models.unload(leave.name)
        except Exception:  # noqa: BLE001 - requests of others come behind it
            logs.exception("unloading an adapter failed", adapter=leave.name)
        finally:
            leave.done.set()

    def _note_failure(self, error: Exception) -> None:
        try:
            self._failures.note(error)
        except DeviceLostError as lost:
            self._lost = lost

    def _generate(self, task: Task) -> None:
        request, known = task.request, task.request.job.prefix
        if request.exact:  # in floating point the state of tokens computed together is another than one by one
            task.again.extend(known)
            known = ()
        ids = torch.tensor([[*request.prompt, *known]], device=self._models.loaded.device)
        config = GenerationConfig(
            max_new_tokens=request.limit - len(known),
            do_sample=False,
            pad_token_id=next(iter(self._models.loaded.ends), 0),  # never seen: there is one row
            use_cache=True,
        )
        with self._model_lock, self._adapters.using(request.adapter), torch.inference_mode():
            self._models.loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([Choose(task)]),
                stopping_criteria=StoppingCriteriaList([Read(task, self._done)]),
            )

    def _finished(self, task: Task) -> Finished:
        request, total = task.request, task.request.reader.total
        if request.reader.reason is None:
            raise EngineError(f"generate() returned after {total} of {request.limit} tokens without a reason")
        return request.finished(request.usage(total), time.monotonic())

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
