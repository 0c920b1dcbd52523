"""The error family.

::

    LoopmuxError
    ├── BadRequestError            (also ValueError)      bad_request
    │   └── ContextLengthError                            context_length
    ├── ModelNotFoundError         (also LookupError)     model_not_found
    ├── AdapterNotFoundError       (also LookupError)     adapter_not_found
    ├── PayloadTooLargeError                              payload_too_large
    ├── OverloadedError            .retry_after           overloaded
    ├── DeadlineExceededError      (also TimeoutError)    deadline
    ├── CancelledError                                    cancelled
    ├── WorkerLostError            .partial_text          worker_lost
    ├── EngineError                                       engine
    ├── AuthError                  (also PermissionError) auth
    ├── ConnectionLostError        (also ConnectionError) connection_lost
    ├── ProtocolError                                     protocol
    ├── ConfigError                                       config
    └── ToolLoopError                                     tool_loop
        ├── MaxTurnsError          .result                max_turns
        └── ToolNotFoundError                             tool_not_found

Every error carries the text so far where there is any (``partial_text``), and ``request_id``, ``model``, ``worker`` and
``retryable``. A message says what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from loopmux.nearest import did_you_mean


class LoopmuxError(Exception):
    """Root of everything Loopmux raises on purpose.

    Attributes:
        code: the error's name on the wire.
        retryable: whether the same request may succeed if it is submitted again.
        request_id: hexadecimal id of the request, or None.
        model: the model id the request named, or None.
        worker: the worker that ran it, or None.
        partial_text: text received before the error.
        messages: in an error that ended a tool loop, the transcript so far, fit for resuming; else empty.
    """

    code: ClassVar[str] = "error"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        request_id: str | None = None,
        model: str | None = None,
        worker: str | None = None,
        retryable: bool | None = None,
        partial_text: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.model = model
        self.worker = worker
        self.retryable = self.default_retryable if retryable is None else retryable
        self.partial_text = partial_text
        self.retry_after = retry_after
        self.messages: list[dict[str, Any]] = []


class BadRequestError(LoopmuxError, ValueError):
    """The request itself is wrong: a field is missing, of the wrong type or out of range."""

    code = "bad_request"


class ContextLengthError(BadRequestError):
    """The prompt leaves no room for an answer in the model's context."""

    code = "context_length"


class ModelNotFoundError(LoopmuxError, LookupError):
    """No launcher and no worker knows the model."""

    code = "model_not_found"


class AdapterNotFoundError(LoopmuxError, LookupError):
    """The model is there, the adapter is not."""

    code = "adapter_not_found"


class PayloadTooLargeError(LoopmuxError):
    """The request is larger than a message may be; it was not sent."""

    code = "payload_too_large"


class OverloadedError(LoopmuxError):
    """A queue is full, or no worker is there and the request does not wait.

    ``retry_after`` is the number of seconds after which another try is sensible.
    """

    code = "overloaded"
    default_retryable = True


class DeadlineExceededError(LoopmuxError, TimeoutError):
    """The total deadline passed, wherever the request was by then, or its stream paused for too long."""

    code = "deadline"


class CancelledError(LoopmuxError):
    """The request was cancelled: by its caller, because its client was closed or lost, or because it did not read."""

    code = "cancelled"


class WorkerLostError(LoopmuxError):
    """Worker after worker was lost with this request, the last while it ran alone; see ``partial_text``."""

    code = "worker_lost"
    default_retryable = True


class EngineError(LoopmuxError):
    """The engine failed while it ran the request, or the model or its adapter could not be loaded."""

    code = "engine"


class AuthError(LoopmuxError, PermissionError):
    """The keys of client and broker do not fit, or a tool server refused its token."""

    code = "auth"


class ConnectionLostError(LoopmuxError, ConnectionError):
    """No broker has ever answered, or the client is closed; or a tool server cannot be reached.

    A broker that was reached and went away is waited for, until the deadline.
    """

    code = "connection_lost"
    default_retryable = True


class ProtocolError(LoopmuxError):
    """A peer, or a tool server, sent something that its protocol does not allow, or speaks another version of it."""

    code = "protocol"


class ConfigError(LoopmuxError):
    """A configuration file, an endpoint, a key or an adapter's folder is wrong. Programs end with exit code 78."""

    code = "config"


class ToolLoopError(LoopmuxError):
    """A tool loop ended without an answer. ``messages`` is the transcript so far, fit for resuming."""

    code = "tool_loop"

    def __init__(self, message: str, *, messages: list[dict[str, Any]] | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.messages = messages or []


class MaxTurnsError(ToolLoopError):
    """The loop used up its turns or its calls, and the model still wants tools. ``result`` is the loop so far."""

    code = "max_turns"

    def __init__(self, message: str, *, result: Any = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.result = result


class ToolNotFoundError(ToolLoopError):
    """``tool_choice`` named a tool that was not handed over."""

    code = "tool_not_found"


def _by_code(root: type[LoopmuxError]) -> dict[str, type[LoopmuxError]]:
    found = {root.code: root}
    for sub in root.__subclasses__():
        found |= _by_code(sub)
    return found


BY_CODE: dict[str, type[LoopmuxError]] = _by_code(LoopmuxError)
"""Wire code to class, for the whole family."""


def from_code(code: str, message: str, **details: Any) -> LoopmuxError:
    """The error for a code that came over the wire; an unknown code (a newer peer) becomes a plain LoopmuxError."""
    return BY_CODE.get(code, LoopmuxError)(message, **details)


_LISTED = 50
"""Names that are told to who asked for another one."""


def listed(names: Iterable[str]) -> str:
    """The names that there are, for an error message, in order; some of very many."""
    there = sorted(names)
    more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
    return ", ".join(there[:_LISTED]) + more or "none"


def unknown_model(model: str, known: Iterable[str]) -> ModelNotFoundError:
    """The error for a model id that nobody serves, with those that there are, or some of very many."""
    there = sorted(known)
    if not there:
        text = f"model {model!r} is not known: no launcher and no worker is with the broker"
    else:
        hint = did_you_mean(model, there)
        text = f"model {model!r} is not known, expected one of {listed(there)}{hint and f'; {hint}'}"
    return ModelNotFoundError(text, model=model)


def failed_to_start(model: str, detail: str) -> EngineError:
    """The error for a model that its launcher has given up on, with the launcher's reason."""
    return EngineError(f"model {model!r} failed to start: {detail or 'its launcher gave no reason'}", model=model)
