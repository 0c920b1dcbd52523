"""The slots engine: one packed forward per step for all requests but exact ones, over KV rows that outlive them.

Who takes part in a step is the scheduler's decision, what a row holds the book's; this module performs: copy, forward,
sample, hand out.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopmux.errors import EngineError, LoopmuxError
from loopmux.messages import ServedModel, SessionHint
from loopmux.results import Usage
from loopmux_worker import logs
from loopmux_worker.causes import ran_out
from loopmux_worker.engine.base import (
    Description,
    Engine,
    Failed,
    Finished,
    Job,
    Key,
    Load,
    Output,
    engine_error,
)
from loopmux_worker.engine.failures import Failures
from loopmux_worker.engine.models import Models
from loopmux_worker.engine.requests import Prepared, Request, Requests
from loopmux_worker.engine.sampling import Pick, choose_rows
from loopmux_worker.engine.slots.forward import Forward
from loopmux_worker.engine.slots.pace import Pace
from loopmux_worker.engine.slots.rows import Copy, Rows
from loopmux_worker.engine.slots.schedule import Plan, Scheduler, Segment, Sequence


@dataclass(slots=True)
class Task:
    """A request on its way; it starts when its first prompt token is computed."""

    request: Request
    sequence: Sequence

    def usage(self) -> Usage:
        """Token counts so far."""
        return self.request.usage(self.request.reader.total, self.sequence.cached or 0)


class SlotsEngine(Engine):
    """Continuous batching over KV rows.

    Args:
        models: what is served.
        forward: runs the model over its KV rows.
        most: requests that run at once.
    """

    slow_to_prepare = True

    def __init__(self, models: Models, forward: Forward, most: int) -> None:
        self._models, self._forward, self._memory, self._most = models, forward, forward.memory, most
        self._requests = Requests(models)
        self._owner = 0  # the thread that steps, once there is one
        self._scheduler = Scheduler(Rows(forward.memory.rows), most)
        self._pace = Pace()
        self._failures = Failures(forward.memory.device)
        self._tasks: dict[Key, Task] = {}
        self._ready: list[Output] = []
        self._progress = self._cached = self._computed = 0

    @property
    def model(self) -> Any:
        """What it computes with, for measurements."""
        return self._models.loaded.model

    # --- the interface; see ``Engine`` --------------------------------------------------------------------------------

    def describe(self) -> Description:
        """What is loaded."""
        memory = self._memory
        state = {"kv_rows": memory.rows, "kv_context": memory.context, "kv_bytes": memory.size}
        more = {**state, "attention": memory.attention}
        return self._models.describe("slots", self._most, more)

    def prepare(self, job: Job) -> Prepared:
        """Check a request and read its prompt."""
        return self._requests.prepare(job)

    def add(self, prepared: Prepared) -> None:
        """Take a request in; it joins the next step, or waits for a row."""
        job, request = prepared.job, self._requests.begin(prepared)
        sequence = Sequence(
            job.key,
            [*request.prompt, *job.prefix],
            self._models.identity(request.adapter),
            request.adapter,
            job.run.session,
            len(request.prompt) if request.exact else None,
        )
        task = self._tasks[job.key] = Task(request, sequence)
        if request.reader.reason is None:
            self._scheduler.add(sequence)
        else:  # the lost attempt had produced the last token already
            self._ready.append(self._end(task))

    def cancel(self, key: Key) -> Usage | None:
        """Forget a request; its row is parked."""
        task = self._tasks.pop(key, None)
        if task is None:
            return None
        self._scheduler.remove(key, time.monotonic())
        self._let_go()
        return task.usage()

    def hint(self, hint: SessionHint) -> None:
        """A session's parked rows count more and do not age until it is expected back, or count next to nothing."""
        rows, now = self._scheduler.rows, time.monotonic()
        if hint.state == "done":
            rows.leave(hint.session)
        else:
            rows.expect(hint.session, now + (hint.expected or 0.0), now)

    def step(self) -> list[Output]:
        """One step for everything that runs, and what came of it."""
        outputs, self._ready = self._ready, []
        if len(self._scheduler):
            outputs += self._advance()
            self._let_go()
        return outputs

    def due(self) -> float | None:
        """Now, while anything runs."""
        return 0.0 if self._tasks or self._ready else None

    def load(self) -> Load:
        """Load and progress."""
        core = self._scheduler
        return Load(core.running, core.waiting, self._progress, cached=self._cached, computed=self._computed)

    def load_adapter(self, name: str, directory: str, like: str = "") -> ServedModel:
        """Load an adapter between two steps."""
        return self._models.load_adapter(name, directory, like)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter as soon as no request uses it."""
        self._models.leave(name)
        self._let_go()

    def _let_go(self) -> None:
        """Unload what is to go and has no users left, and drop the state that was computed under it."""
        if leaving := self._models.leaving:
            for name in leaving - {task.request.adapter for task in self._tasks.values()}:
                self._scheduler.rows.forget(self._models.identity(name))
                self._models.unload(name)

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _advance(self) -> list[Output]:
        if self._owner != threading.get_ident():
            self._owner = threading.get_ident()
            torch.set_num_threads(self._models.loaded.threads)  # which holds for the thread that says it
        began = time.monotonic()
        decoding, beginning = self._scheduler.decoding, self._scheduler.beginning
        copies = self._scheduler.admit(self._pace.budget(decoding, beginning), began)
        try:
            self._memory.copy(copies)
        except Exception as error:  # noqa: BLE001 - what cannot be copied can be computed
            self._not_copied(copies, error)
            return []
        plan = self._scheduler.plan(self._pace.budget(decoding, beginning, self._scheduler.reached))
        assert plan.segments, "somebody runs: a step for nobody would fail, or come to nothing, for ever"
        try:
            picks = self._compute(plan)
        except Exception as error:  # noqa: BLE001 - somebody's fault, or nobody's: see there
            return self._failed(plan, error)
        self._failures.succeeded()
        now = time.monotonic()
        if self._progress:  # the very first step warms everything, and says nothing of those to come
            self._pace.note(decoding, plan.tokens - decoding, plan.keys, now - began)
        self._scheduler.done(plan)
        for segment in plan.segments:
            self._note(self._tasks[segment.key], segment, began)
        self._progress += plan.tokens
        sampled = [segment.key for segment in plan.segments if segment.samples]
        return [out for key, pick in zip(sampled, picks, strict=True) for out in self._take(key, pick, now)]

    def _note(self, task: Task, segment: Segment, began: float) -> None:
        """Keep the books on a computed segment."""
        prompt = len(task.request.prompt)
        if task.request.started is None:
            task.request.started = began
            self._cached += task.usage().cached_tokens
        self._computed += max(0, min(segment.start + segment.count, prompt) - segment.start)

    def _compute(self, plan: Plan) -> list[Pick | EngineError]:
        """The next token of every segment that reaches the end of its sequence."""
        return [pick for segments in plan.forwards for pick in self._picks(segments)]

    def _picks(self, segments: tuple[Segment, ...]) -> list[Pick | EngineError]:
        """One forward, and what is sampled of it."""
        logits = self._logits(segments)
        requests = [self._tasks[segment.key].request for segment in segments if segment.samples]
        return choose_rows(logits, [r.sampler for r in requests], [r.reader.total for r in requests])

    def _logits(self, segments: tuple[Segment, ...]) -> Tensor:
        """Logits (sampled, vocabulary) of one forward."""
        ids: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        for segment in segments:
            stop = segment.start + segment.count
            ids += self._tasks[segment.key].sequence.tokens[segment.start : stop]
            positions += range(segment.start, stop)
            if segment.samples:
                ends.append(len(ids) - 1)
        logits = self._forward(segments, ids, positions, ends)
        if not ends and logits.is_cuda:  # nothing else waits: its time and its errors would be those of the next step
            torch.cuda.current_stream(logits.device).synchronize()
        return logits

    def _take(self, key: Key, pick: Pick | EngineError, now: float) -> list[Output]:
        """What a sampled token means for its request."""
        task = self._tasks[key]
        if isinstance(pick, EngineError):
            return [self._fail(task, pick)]
        try:
            out: list[Output] = [task.request.produced(pick, now)]
        except Exception as error:  # noqa: BLE001 - reading a token is that request's alone
            logs.exception("reading a token failed", request=key.request.hex())
            return [self._fail(task, engine_error("the engine", error))]
        if task.request.reader.reason is None:
            self._scheduler.append(key, pick.token)
        else:
            out.append(self._end(task))
        return out

    def _end(self, task: Task) -> Finished:
        now = time.monotonic()
        self._scheduler.remove(task.sequence.key, now)
        del self._tasks[task.sequence.key]
        return task.request.finished(task.usage(), now)

    def _fail(self, task: Task, error: LoopmuxError) -> Failed:
        key = task.sequence.key
        self._scheduler.remove(key, time.monotonic(), park=False)
        del self._tasks[key]
        return Failed(key, error, task.usage())

    def _not_copied(self, copies: list[Copy], error: Exception) -> None:
        """Rows could not be copied: who was to get them waits again, and computes its beginning itself."""
        short = self._ran_out(error)
        self._scheduler.undo(copies, short=short)
        logs.warning("copying attention state failed, it is computed", copies=len(copies), exc_info=error)

    def _failed(self, plan: Plan, error: Exception) -> list[Output]:
        """The step raised: short memory costs the youngest its row, anything else is put down to who was alone.

        Raises:
            DeviceLostError: no step will ever succeed.
        """
        if self._ran_out(error):
            preempted = self._scheduler.preempt()
            if preempted is not None:
                logs.warning("out of memory, a request waits again", request=preempted.request.hex())
                return []
        guilty = self._scheduler.failed(plan)
        logs.exception("step failed", requests=len(plan.segments), tokens=plan.tokens, alone=guilty is not None)
        return [] if guilty is None else [self._fail(self._tasks[guilty], engine_error("the engine", error))]

    def _ran_out(self, error: Exception) -> bool:
        """Whether a step raised for want of memory; then what is kept for the next one is given back.

        Raises:
            DeviceLostError: no step will ever succeed.
        """
        self._failures.note(error)
        short = ran_out(error) is not None
        if short and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return short
