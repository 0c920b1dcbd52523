"""The interface between a worker's wire side and whatever generates.

One thread owns the engine and calls everything here but ``prepare``. An engine is a step machine: requests are added
and cancelled between steps, and each ``step`` returns what came of it. Text work (incremental detokenising, stop
strings, tool-call parsing) is the engine's, because stopping depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from loopmux.errors import BadRequestError, EngineError, LoopmuxError
from loopmux.messages import Generate, LeftOut, Run, ServedModel, SessionHint
from loopmux.results import FinishReason, Timing, TokenLogprob, ToolCall, Usage
from loopmux_worker.causes import in_words, ran_out

_MOST_TEXTS = 250
_BESIDE_TEXT = 3
"""Bytes that MessagePack puts before a text, at most."""


@dataclass(frozen=True, slots=True)
class Key:
    """A request in one of its attempts: a superseded attempt and its successor may meet in one engine."""

    request: bytes
    attempt: int


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the engine gets it.

    Attributes:
        prefix: tokens already produced by an earlier attempt.
        arrived: when the worker got it, on the engine's clock; None: when it is prepared.
    """

    key: Key
    run: Run
    generate: Generate
    prefix: tuple[int, ...] = ()
    arrived: float | None = None


@dataclass(frozen=True, slots=True)
class Produced:
    """Tokens that a step produced for one request.

    ``position`` is the absolute index of the first token of ``ids``, which is never empty: receivers tell a repeated
    message from a new one by token positions, so held-back text is released together with the request's last token.
    """

    key: Key
    position: int
    ids: tuple[int, ...]
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """A request ended by itself. ``total`` is the number of tokens, prefix included."""

    key: Key
    total: int
    reason: FinishReason
    usage: Usage
    timing: Timing


@dataclass(frozen=True, slots=True)
class Failed:
    """A request could not be run or continued; the engine goes on without it."""

    key: Key
    error: LoopmuxError
    usage: Usage = field(default_factory=Usage)


Output = Produced | Finished | Failed


@dataclass(frozen=True, slots=True)
class Description:
    """What an engine is. ``report`` is shown by ``status``: versions, device, dtype, memory, why this engine.

    ``left_out`` are the models that it was to serve too and could not load.
    """

    engine: str
    models: tuple[ServedModel, ...]
    slots: int
    adapters: tuple[str, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()


def fitting(texts: Iterable[str], size: int) -> list[str]:
    """The first of some texts for the report that take at most ``size`` bytes together.

    The broker takes 32 KiB of all that is reported, and 256 entries of a list. What is no UTF-8, as paths may be, is
    replaced.
    """
    taken = []
    for text in islice(texts, _MOST_TEXTS):
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        size -= len(clean.encode()) + _BESIDE_TEXT
        if size < 0:
            break
        taken.append(clean)
    return taken


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, for heartbeats. ``progress`` moves whenever the engine does.

    ``cached`` and ``computed`` are prompt tokens since the start whose attention state was reused, and that were
    computed.
    """

    running: int
    queued: int
    progress: int
    cached: int = 0
    computed: int = 0


class Engine(Protocol):
    """What the worker drives. Not thread-safe, but for ``prepare``: one thread owns it.

    ``submit``, ``hint``, ``can_load`` and ``close`` are as most engines have them.

    Attributes:
        slow_to_prepare: whether ``prepare`` may take long enough to be worth a thread of its own.
    """

    slow_to_prepare: bool

    def describe(self) -> Description:
        """What is loaded; stable between ``load_adapter`` and ``unload_adapter``."""
        ...

    def prepare(self, job: Job) -> Any:
        """Check a request and read its prompt, for ``add``. In any thread, one request at a time; changes nothing.

        Raises:
            LoopmuxError: it cannot be run here (bad field, unknown model or adapter, prompt longer than the context).
        """
        ...

    def add(self, prepared: Any) -> None:
        """Take a prepared request in.

        Raises:
            LoopmuxError: it cannot be run any more: its adapter was unloaded since.
        """
        ...

    def submit(self, job: Job) -> None:
        """Both at once, where no stream has to wait for it.

        Raises:
            LoopmuxError: it cannot be run here.
        """
        self.add(self.prepare(job))

    def cancel(self, key: Key) -> Usage | None:
        """Forget a request before the next token; None if it is not here (any more)."""
        ...

    def hint(self, hint: SessionHint) -> None:  # noqa: ARG002 - most engines keep nothing of sessions
        """Take note of whether a session comes back, where an engine keeps something of sessions."""
        return

    def step(self) -> list[Output]:
        """Advance everything by one step and return what came of it; ``[]`` at once when there is nothing to do."""
        ...

    def due(self) -> float | None:
        """Seconds until ``step`` has something to do: 0 now, None when nothing runs.

        A step that depends on work elsewhere (another thread, a device) may wait for it, a few milliseconds at most.
        """
        ...

    def load(self) -> Load:
        """Load and progress; cheap."""
        ...

    def can_load(self) -> bool:
        """Whether ``load_adapter`` can begin at once, as where nothing runs between two steps.

        If not, it can soon: what runs may end, nothing else begins.
        """
        return True

    def load_adapter(self, name: str, directory: str, like: str = "") -> ServedModel:
        """Load an adapter beside the others and serve it as a model id of that name.

        It is asked as the model ``like`` is (type, system prompt); as an instruct model without a system prompt where
        there is none. One that is loaded already, under this name and with these contents, stays as it is.

        Raises:
            LoopmuxError: it does not fit, the name is taken or is that of one which is being unloaded, or this engine
                cannot load at run time.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter: from now on requests for it are refused; it goes when the last that uses it has ended.

        Raises:
            AdapterNotFoundError: no such adapter, or it is being unloaded already.
        """
        ...

    def close(self) -> None:
        """Release threads and memory of its own."""
        return


def taken(name: str) -> LoopmuxError:
    """The error for an adapter whose name something else has."""
    return BadRequestError(
        f"adapter {name!r}: a model or adapter of that name, with other contents, is served already: unload that one "
        "first, or choose another name"
    )


def timing_of(arrived: float, started: float | None, first: float | None, now: float, tokens: int) -> Timing:
    """Where the time of a request went that ends now, after ``tokens`` of its own; None for what never happened."""
    started = now if started is None else started
    first = now if first is None else first
    per_token = (now - first) / (tokens - 1) if tokens > 1 else 0.0
    return Timing(
        queued=started - arrived,
        first_token=first - arrived,
        total=now - arrived,
        prefill=first - started,
        per_token=per_token,
    )


def engine_error(what: str, error: Exception) -> LoopmuxError:
    """An exception that requests met in `what`, as their error; one of ours stays as it is."""
    if isinstance(error, LoopmuxError):
        return error
    cause = ran_out(error)
    if cause is None:
        made = EngineError(f"{what} failed: {in_words(error)}")
    else:
        made = EngineError(
            f"{what} ran out of memory ({in_words(cause)}): send fewer or shorter requests at once, or give its model "
            "a smaller kv_cache_gib, slots or context",
            retryable=True,
        )
    made.__cause__ = error  # where it is raised (by ``warm_up``, say), ``memory.explained`` looks for what ran out
    return made
