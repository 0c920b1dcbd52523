"""One request inside transformers' ``generate()``: how it chooses and reads its tokens there."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from loopmux_worker.engine.base import Output
from loopmux_worker.engine.requests import Request
from loopmux_worker.engine.sampling import Pick


@dataclass(slots=True)
class Task:
    """A request on its way through ``generate()``.

    ``cancelled`` is the one field that two threads use: the engine's sets it, the helper's looks at it between tokens.
    ``again`` are known tokens that are to be computed one by one all the same, as they were at first.
    """

    request: Request
    cancelled: threading.Event = field(default_factory=threading.Event)
    again: deque[int] = field(default_factory=deque)
    pick: Pick | None = None
    reported: int = 0  # tokens that ``step`` has returned, prefix included


class Choose(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that is known or that the sampler chose, which greedy search then takes."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """Logits of shape (1, vocabulary) in and out; the signature is that of ``generate()``."""
        task, request = self._task, self._task.request
        if task.again:
            token = task.again.popleft()
        else:
            task.pick = request.sampler.choose(scores[0], request.reader.total)
            token = task.pick.token
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0
        return only


class Read(StoppingCriteria):  # type: ignore[misc]
    """Reads the chosen token, reports it, and says whether the output ends here."""

    def __init__(self, task: Task, report: queue.SimpleQueue[Output]) -> None:
        self._task, self._report = task, report

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        """Whether to stop, shape (1,)."""
        task = self._task
        if not task.cancelled.is_set() and task.pick is not None:
            self._report.put(task.request.produced(task.pick, time.monotonic()))
        ended = task.cancelled.is_set() or task.request.reader.reason is not None
        return torch.tensor([ended], device=input_ids.device)
