"""The life of requests: admitted, queued, dispatched, requeued, ended, forgotten."""

from __future__ import annotations

from loopmux import codec, wire
from loopmux.errors import (
    CancelledError,
    DeadlineExceededError,
    LoopmuxError,
    ModelNotFoundError,
    OverloadedError,
    WorkerLostError,
    failed_to_start,
    unknown_model,
)
from loopmux.messages import Failure, Phase, Run, Submit
from loopmux.results import Usage
from loopmux.wire import Header, Kind, Message, StopReason
from loopmux_broker.clients import Client
from loopmux_broker.dispatch import choose, session_of
from loopmux_broker.events import Peer, Send, say
from loopmux_broker.intake import exhausted, objection, unknown_adapter
from loopmux_broker.output import Output
from loopmux_broker.pool import Lease, Worker
from loopmux_broker.requests import Request, State, Step
from loopmux_broker.streams import Streams
from loopmux_broker.tables import Alarm, Tables

_COUNTED = {Kind.END: "finished", Kind.ERROR: "failed", Kind.CANCELLED: "cancelled", Kind.EXPIRED: "expired"}


class Life:
    """Moves requests through their states, and keeps queues, slots, limits and timers in step with that."""

    def __init__(self, tables: Tables, streams: Streams) -> None:
        self._t = tables
        self._streams = streams

    # --- the beginning

    def submit(self, client: Client, request_id: bytes, submit: Submit, body: bytes, now: float) -> None:
        """A new request: run it, queue it or refuse it."""
        t = self._t
        request = Request(request_id, client, submit, body, now, now + submit.timeout, Output(credit=t.config.window))
        worker = self._worker_for(request)
        error = objection(self._t.pool, request, settled=t.settled) or exhausted(self._t.admission, request, worker)
        if error is not None:
            self.refuse(client, request_id, error, model=submit.model)
            return
        t.counters["submitted"] += 1
        t.requests[request_id] = client.requests[request_id] = request
        t.admission.admit(client, len(body))
        t.timers.set((Alarm.DEADLINE, request_id, 0), request.deadline)
        self._place(request, worker, now)
        self.accept(request)
        self._review(request, now)

    def accept(self, request: Request) -> None:
        """Tell the client that the broker has its request, and its place in the queue (0: with a worker)."""
        if request.client.peer is None:
            return
        position = self._t.queues.position(request) if request.state is State.QUEUED else 0
        self._t.out.append(Send(request.client.peer, say(Kind.ACCEPTED, request.id, arg=position)))

    def refuse(self, client: Client, request_id: bytes, error: LoopmuxError, *, model: str, received: int = 0) -> None:
        """Answer with an error and remember nothing: a repeated SUBMIT is judged anew."""
        self._t.counters["overloaded" if isinstance(error, OverloadedError) else "refused"] += 1
        if client.peer is not None:
            header = Header(Kind.ERROR, request_id, seq=received)
            self._t.out.append(Send(client.peer, Message(header, body=_failure(error, model=model or None))))

    # --- queue and slots

    def _worker_for(self, request: Request) -> Worker | None:
        return choose(self._t.pool.serving(request.submit.model), request, self._t.affinity.last(request))

    def _place(self, request: Request, worker: Worker | None, now: float) -> None:
        """To the free worker if there is one (then nobody else waits for it), else into the queue."""
        if worker is not None:
            self._dispatch(request, worker, now)
        else:
            self._t.queues.push(request)
            self._t.admission.queue(request.client, 1)

    def fill(self, worker: Worker, now: float) -> None:
        """A worker has, or may have, free slots: give them to who waits."""
        while worker.free > 0 and (request := self._t.queues.next_for(worker)) is not None:
            self._dequeue(request)
            self._dispatch(request, worker, now)

    def _dequeue(self, request: Request) -> None:
        self._t.queues.remove(request)
        self._t.admission.queue(request.client, -1)

    def _dispatch(self, request: Request, worker: Worker, now: float) -> None:
        request.attempt += 1
        request.move(Step.DISPATCHED)
        request.lease = self._t.pool.lease(request, worker, now)
        self._t.affinity.ran(request, worker.name)
        self._run(request.lease, now)

    def _run(self, lease: Lease, now: float) -> None:
        request, submit = lease.request, lease.request.submit
        run = Run(
            submit.model,
            submit.adapter,
            None if submit.session is None else session_of(request.client.instance, submit.session),
            max(request.deadline - now, 0.0),
            submit.deterministic,
            submit.trace,
        )
        header = Header(Kind.RUN, request.id, attempt=lease.attempt)
        message = Message(header, codec.pack(run), request.body, bytes(request.output.ids))
        self._t.out.append(Send(lease.worker.peer, message))
        self._t.timers.set((Alarm.RUN, *lease.key), now + self._t.config.resend)

    def started(self, lease: Lease) -> None:
        """The worker has the request: RUNACK, or output came."""
        if not lease.acknowledged:
            lease.acknowledged = True
            self._t.timers.cancel((Alarm.RUN, *lease.key))
            if not lease.stopping:
                lease.request.move(Step.STARTED)

    def run_unanswered(self, lease: Lease, now: float) -> None:
        """RUN was not answered for a while: say it again, or give the attempt up."""
        if now - lease.since < self._t.config.run_timeout:
            self._run(lease, now)
            return
        self.stop(lease, StopReason.SUPERSEDED, now)
        self._attempt_lost(lease, f"did not answer within {self._t.config.run_timeout:g} s", now)

    def stop(self, lease: Lease, reason: StopReason, now: float) -> None:
        """Tell a worker to stop; its slot stays taken until it says that it has."""
        lease.stopping = reason
        self._t.timers.cancel((Alarm.RUN, *lease.key))
        self._t.timers.set((Alarm.STOP, *lease.key), now + self._t.config.resend)
        self._t.out.append(Send(lease.worker.peer, say(Kind.STOP, lease.key[0], arg=reason, attempt=lease.attempt)))

    def release(self, lease: Lease, now: float) -> None:
        """A worker's slot is free again."""
        self._t.timers.cancel((Alarm.RUN, *lease.key))
        self._t.timers.cancel((Alarm.STOP, *lease.key))
        self._t.pool.release(lease)
        lease.worker.served += 1
        self.fill(lease.worker, now)

    def worker_lost(self, worker: Worker, why: str, now: float) -> None:
        """A worker is gone: its requests run elsewhere if the client has seen nothing of them yet, else they fail."""
        leases = list(worker.leases.values())
        for lease in leases:
            self._t.timers.cancel((Alarm.RUN, *lease.key))
            self._t.timers.cancel((Alarm.STOP, *lease.key))
            self._t.pool.release(lease)
        for lease in leases:
            if not lease.stopping:
                self._attempt_lost(lease, why, now)

    def output_broken(self, lease: Lease, why: str, now: float) -> None:
        """A worker's output for a request has a hole: nothing after it can be used."""
        self.stop(lease, StopReason.SUPERSEDED, now)
        self._attempt_lost(lease, why, now)

    def _attempt_lost(self, lease: Lease, why: str, now: float) -> None:
        request, worker = lease.request, lease.worker.name
        request.lease, request.avoid = None, worker
        produced, limit = request.output.total, self._t.config.max_attempts
        if produced:
            error = f"worker {worker!r} {why} after {produced} tokens"
        elif request.attempt >= limit:
            error = f"worker {worker!r} {why}; {request.attempt} workers were tried, the most allowed"
        else:
            self._t.counters["requeued"] += 1
            request.move(Step.REQUEUED)
            self._place(request, self._worker_for(request), now)
            self._review(request, now)
            return
        self._end(request, Kind.ERROR, WorkerLostError(error), now, worker=worker, usage=Usage(0, produced))

    # --- the model's state

    def model_changed(self, model: str, now: float) -> None:
        """A model's phase or its workers changed: tell who waits for it, or fail them where waiting is in vain."""
        for request in self._t.queues.of_model(model):
            self._review(request, now)

    def _review(self, request: Request, now: float) -> None:
        """If the request waits: for what, and whether that can come."""
        if request.state is not State.QUEUED:
            return
        pool, model = self._t.pool, request.submit.model
        declared = pool.declared(model)
        if pool.serving(model):
            if (error := unknown_adapter(pool, request)) is not None:
                self._end(request, Kind.ERROR, error, now)
        elif declared is not None and declared.entry.phase == "failed":
            self._end(request, Kind.ERROR, failed_to_start(model, declared.entry.detail), now)
        else:
            self._tell_phase(request, now)

    def settled(self, now: float) -> None:
        """Whoever belongs to this broker has joined by now: a model that is still unknown will stay so."""
        self._t.settled = True
        for model in self._t.queues.models():
            if not self._t.pool.knows(model):
                for request in self._t.queues.of_model(model):
                    self._end(request, Kind.ERROR, unknown_model(model, self._t.pool.known()), now)

    def model_withdrawn(self, model: str, now: float) -> None:
        """A launcher no longer answers for a model."""
        if self._t.pool.knows(model):
            self.model_changed(model, now)
            return
        for request in self._t.queues.of_model(model):
            error = ModelNotFoundError(f"model {model!r} is gone: its launcher left, and no worker serves it")
            self._end(request, Kind.ERROR, error, now)

    def _tell_phase(self, request: Request, now: float) -> None:
        pool, model, peer = self._t.pool, request.submit.model, request.client.peer
        if peer is None:
            return
        how = pool.standing(model, now)
        phase = Phase(how.phase, self._t.queues.position(request), round(how.elapsed, 3), how.detail)
        self._t.out.append(Send(peer, Message(Header(Kind.PHASE, request.id), route=codec.pack(phase))))

    # --- the end

    def worker_ended(self, lease: Lease, message: Message, frames: list[bytes], now: float) -> None:
        """A worker's own terminal for a request that still wants it."""
        request = lease.request
        if message.header.seq != request.output.total:
            why = f"ended at {message.header.seq} tokens of which {request.output.total} arrived"
            self._t.counters["gaps"] += 1
            self._attempt_lost(lease, why, now)
        else:
            request.lease, request.origin = None, lease
            self._finish(request, message.header.kind, frames, now)
        self.release(lease, now)

    def cancel(self, request: Request, now: float, why: str = "the client cancelled the request") -> None:
        """End a request on somebody's wish, whatever its state; one that has ended says so again."""
        if request.state is State.DONE:
            self._discard(request)  # else the terminal would wait for credit that nobody grants any more
            self._streams.repeat_terminal(request, now)
            return
        self._halt(request, Kind.CANCELLED, CancelledError(why), StopReason.CANCELLED, now)

    def slow_client(self, request: Request, now: float) -> None:
        """End a request whose client does not read."""
        self._t.counters["slow_clients"] += 1
        why = f"slow_client: {request.output.held} bytes of output wait to be read, more than are kept for one request"
        self.cancel(request, now, why)

    def deadline(self, request: Request, now: float) -> None:
        """A request's time is over."""
        after = f"{request.submit.timeout:g} s"
        if request.state is State.QUEUED:
            error = DeadlineExceededError(f"the request was still queued at its deadline, after {after}")
            self._end(request, Kind.EXPIRED, error, now)
            return
        error = DeadlineExceededError(f"the deadline passed while the request ran, after {after}")
        self._halt(request, Kind.ERROR, error, StopReason.DEADLINE, now)

    def _halt(self, request: Request, kind: Kind, error: LoopmuxError, reason: StopReason, now: float) -> None:
        """End a request at once, with what the client may already have of it."""
        worker = request.lease.worker.name if request.lease else None
        self._discard(request)
        if request.lease is not None:
            self.stop(request.lease, reason, now)
            request.lease = None
        self._end(request, kind, error, now, worker=worker, usage=Usage(0, request.output.total))

    def _discard(self, request: Request) -> None:
        """Drop output that the client does not have yet, and is not going to get."""
        held = request.output.held
        request.output.truncate()
        self._t.admission.output -= held - request.output.held

    def _end(
        self,
        request: Request,
        kind: Kind,
        error: LoopmuxError,
        now: float,
        *,
        worker: str | None = None,
        usage: Usage | None = None,
    ) -> None:
        """End a request with the broker's own word."""
        body = _failure(error, model=request.submit.model, worker=worker, usage=usage)
        header = Header(kind, request.id, seq=request.output.total, attempt=request.attempt)
        self._finish(request, kind, wire.to_frames(Message(header, body=body)), now)

    def _finish(self, request: Request, kind: Kind, frames: list[bytes], now: float) -> None:
        t = self._t
        if request.state is State.QUEUED:
            self._dequeue(request)
        request.move(Step.ENDED)
        t.counters[_COUNTED[kind]] += 1
        t.admission.ended(request.client, len(request.body), now)
        request.body = b""
        request.output.ids.clear()
        t.timers.cancel((Alarm.DEADLINE, request.id, 0))
        self._bury(request, frames, now)

    def _bury(self, request: Request, frames: list[bytes], now: float) -> None:
        """Keep a request's terminal until the client acknowledges it."""
        request.terminal = frames
        self._t.timers.set((Alarm.TERMINAL, request.id, 0), now + self._t.config.resend)
        self._t.timers.set((Alarm.TOMBSTONE, request.id, 0), now + self._t.config.tombstone)
        self._streams.push(request, now)

    def cancel_unknown(self, client: Client, request_id: bytes, now: float) -> None:
        """A client cancels what is not here: say so, and refuse the SUBMIT if it comes after all."""
        error = CancelledError("the client cancelled the request before the broker had it")
        frames = wire.to_frames(Message(Header(Kind.CANCELLED, request_id), body=_failure(error)))
        request = Request(request_id, client, Submit(""), b"", now, now, Output(0), State.DONE)
        self._t.requests[request_id] = client.requests[request_id] = request
        self._bury(request, frames, now)

    def acknowledged(self, request: Request) -> None:
        """The client has the terminal: tell the worker whose word it was, and forget the request."""
        origin = request.origin
        if origin is not None and self._t.pool.workers.get(origin.worker.peer) is origin.worker:
            ack = say(Kind.ENDACK, request.id, attempt=origin.attempt)
            self._t.out.append(Send(origin.worker.peer, ack))
        self.forget(request)

    def forget(self, request: Request) -> None:
        """Nothing is left of an ended request."""
        self._t.timers.cancel((Alarm.TERMINAL, request.id, 0))
        self._t.timers.cancel((Alarm.TOMBSTONE, request.id, 0))
        self._t.admission.output -= request.output.held
        request.client.waiting.pop(request.id, None)
        request.client.requests.pop(request.id, None)
        self._t.requests.pop(request.id, None)
        request.origin = None  # a request and its lease name each other: let go without waiting for the collector

    def abandon(self, client: Client, now: float) -> None:
        """A client is gone for good: end what it has here and tell nobody."""
        self._t.clients.part(client)
        for request in list(client.requests.values()):
            if request.state is not State.DONE:
                self.cancel(request, now, "the client went away")
            self.forget(request)
        self._t.clients.forget(client)


def protocol_failure(peer: Peer, error: LoopmuxError, request_id: bytes = wire.NO_ID) -> Send:
    """The answer to what is no message, or none that this peer may send."""
    return Send(peer, Message(Header(Kind.ERROR, request_id), body=_failure(error)))


def _failure(
    error: LoopmuxError, *, model: str | None = None, worker: str | None = None, usage: Usage | None = None
) -> bytes:
    return codec.pack(Failure(error.code, error.message, error.retryable, model, worker, error.retry_after, usage))
