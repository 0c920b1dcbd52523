"""Whether a request is taken in, given who is there and how much is waiting; and if not, with which error."""

from __future__ import annotations

from loopmux.errors import (
    AdapterNotFoundError,
    BadRequestError,
    LoopmuxError,
    ModelNotFoundError,
    OverloadedError,
    failed_to_start,
    listed,
    unknown_model,
)
from loopmux_broker.admission import Admission
from loopmux_broker.pool import Pool
from loopmux_broker.requests import Request

TAKEN_BACK = "its launcher left, or has it no more"
_COLD_RETRY = 1.0
"""``retry_after`` where a model has no worker yet, seconds: nobody knows how long loading takes, asking is cheap."""


def objection(pool: Pool, request: Request, *, settled: bool, returning: bool = False) -> LoopmuxError | None:
    """Why the request cannot run as things are, None if it can or may wait.

    Before the broker has ``settled``, a model or adapter that nobody has named may still come, and after that one whose
    worker has had the request. One that is ``returning`` was let in before, so it waits whether it was asked to or not.
    """
    submit = request.submit
    try:
        submit.check()
    except BadRequestError as error:
        return error
    if pool.serves(submit.model):
        if pool.leaves(submit.model):
            return gone(submit.model, TAKEN_BACK)
        return unknown_adapter(pool, request) if settled else None
    declared = pool.declared(submit.model)
    if declared is None and settled and not request.attempt:
        return unknown_model(submit.model, pool.known())
    if declared is not None and declared.entry.phase == "failed":
        return failed_to_start(submit.model, declared.entry.detail)
    if not submit.wait and not returning:
        how = pool.standing(submit.model, request.arrived)
        text = (
            f"model {submit.model!r} has no worker now (it is {how}) and the request does not wait: submit it again "
            "later, or with wait=True"
        )
        return OverloadedError(text, retry_after=_COLD_RETRY)
    return None


def gone(model: str, why: str) -> ModelNotFoundError:
    """The error for a model that was there, and takes no new requests any more."""
    return ModelNotFoundError(f"model {model!r} is gone: {why}, and no worker stays that serves it", model=model)


def unknown_adapter(pool: Pool, request: Request) -> LoopmuxError | None:
    """The model has workers, but the adapter that the request names is on none of them."""
    model, adapter = request.submit.model, request.submit.adapter
    if adapter is None or any(worker.serves(model, adapter) for worker in pool.serving(model)):
        return None
    known = listed(pool.adapters(model))
    declared = pool.declared(adapter)  # an adapter that was configured is a model id of its own too
    reason = f"; {adapter!r} failed: {declared.entry.detail}" if declared and declared.entry.phase == "failed" else ""
    return AdapterNotFoundError(f"model {model!r} has no adapter {adapter!r}, loaded are: {known}{reason}")


def exhausted(admission: Admission, request: Request, *, queues: bool, returning: bool = False) -> LoopmuxError | None:
    """There is no room for the request now; it ``queues`` where no worker has a free slot for it."""
    refusal = admission.refusal(request.client.principal, request.size, queues=queues, returning=returning)
    if refusal is None:
        return None
    return OverloadedError(f"{refusal.reason}: try again later", retry_after=refusal.retry_after)
