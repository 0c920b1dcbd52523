"""The end of requests: by the worker's word or the broker's own, kept until the client has it, then forgotten."""

from __future__ import annotations

from loopmux import codec, wire
from loopmux.errors import CancelledError, DeadlineExceededError, LoopmuxError
from loopmux.messages import Failure, Submit
from loopmux.results import Usage
from loopmux.wire import Header, Kind, Message, StopReason
from loopmux_broker.clients import Client
from loopmux_broker.events import Peer, Send, say
from loopmux_broker.leases import Leases
from loopmux_broker.output import Output
from loopmux_broker.pool import Lease
from loopmux_broker.requests import Request, State, Step
from loopmux_broker.streams import Streams
from loopmux_broker.tables import PAUSE, SLICE, Alarm, Tables

_COUNTED = {Kind.END: "finished", Kind.ERROR: "failed", Kind.CANCELLED: "cancelled", Kind.EXPIRED: "expired"}


class Ends:
    """Every way out of a request's life."""

    def __init__(self, tables: Tables, streams: Streams, leases: Leases) -> None:
        self._t, self._streams, self._leases = tables, streams, leases

    def worker_ended(self, lease: Lease, kind: Kind, data: bytes, now: float) -> None:
        """A worker's own terminal for a request that still wants it."""
        lease.request.lease, lease.request.origin = None, lease
        self._finish(lease.request, kind, data, now)
        if kind is Kind.END:
            self._t.queues.answered(lease.request)

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
        if request.state is State.QUEUED and not request.output.total:
            error = DeadlineExceededError(f"the request was still queued at its deadline, after {after}")
            self.end(request, Kind.EXPIRED, error, now)
            return
        did = "ran" if request.lease else "waited to go on"
        error = DeadlineExceededError(f"the deadline passed while the request {did}, after {after}")
        self._halt(request, Kind.ERROR, error, StopReason.DEADLINE, now)

    def _halt(self, request: Request, kind: Kind, error: LoopmuxError, reason: StopReason, now: float) -> None:
        """End a request at once, with what the client may already have of it."""
        worker = request.lease.worker.name if request.lease else None
        self._discard(request)
        if request.lease is not None:
            self._leases.stop(request.lease, reason, now)
            request.lease = None
        self.end(request, kind, error, now, worker=worker, usage=Usage(0, request.output.total))

    def _discard(self, request: Request) -> None:
        """Drop output that the client does not have yet, and is not going to get."""
        held = request.output.held
        request.output.truncate()
        self._t.admission.output -= held - request.output.held

    def end(
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
        body = packed(error, model=request.submit.model, worker=worker, usage=usage)
        header = Header(kind, request.id, seq=request.output.total, attempt=request.attempt)
        self._finish(request, kind, wire.to_bytes(Message(header, body=body)), now)

    def _finish(self, request: Request, kind: Kind, data: bytes, now: float) -> None:
        t = self._t
        if request.state is State.QUEUED:
            t.dequeue(request)
        elif request.state is State.RECOVERING:
            t.timers.cancel((Alarm.RECOVERY, request.id, 0))
        request.move(Step.ENDED)
        t.counters[_COUNTED[kind]] += 1
        if t.traced:
            seconds = round(now - request.arrived, 3)
            t.trace(f"request {_COUNTED[kind]}", request.id, tokens=request.output.total, seconds=seconds)
        t.admission.ended(request.client.principal, request.size, now)
        request.body, request.brought = b"", 0
        request.output.ids.clear()
        t.timers.cancel((Alarm.DEADLINE, request.id, 0))
        self._bury(request, data, now)

    def _bury(self, request: Request, data: bytes, now: float) -> None:
        """Keep a request's terminal until the client acknowledges it."""
        request.terminal = data
        self._t.timers.set((Alarm.TOMBSTONE, request.id, 0), now + self._t.config.tombstone)
        self._streams.push(request, now)
        if not request.told:
            self._t.timers.set((Alarm.TERMINAL, request.id, 0), now + self._t.config.resend)

    def cancel_unknown(self, client: Client, request_id: bytes, now: float) -> None:
        """A client cancels what is not here: say so, and refuse the SUBMIT if it comes after all."""
        error = CancelledError("the client cancelled the request before the broker had it")
        data = wire.to_bytes(Message(Header(Kind.CANCELLED, request_id), body=packed(error)))
        request = Request(request_id, client, Submit(""), b"", now, now, Output(0), State.DONE)
        self._t.requests[request_id] = request
        client.add(request)
        self._bury(request, data, now)

    def acknowledged(self, request: Request, now: float) -> None:
        """The client has the terminal: tell the worker whose word it was, and forget the request."""
        origin = request.origin
        if origin is not None and self._t.pool.workers.get(origin.worker.peer) is origin.worker:
            ack = say(Kind.ENDACK, request.id, attempt=origin.attempt)
            self._t.out.append(Send(origin.worker.peer, ack))
        if not request.submit.model and not self._t.settled:
            # Cancelled before anything was known of it: a worker of the former broker may still come with it.
            self._t.timers.cancel((Alarm.TERMINAL, request.id, 0))
            self._t.timers.set((Alarm.TOMBSTONE, request.id, 0), now + self._t.config.settle)
        else:
            self.forget(request)

    def forget(self, request: Request) -> None:
        """Nothing is left of an ended request."""
        self._t.timers.cancel((Alarm.TERMINAL, request.id, 0))
        self._t.timers.cancel((Alarm.TOMBSTONE, request.id, 0))
        self._t.admission.output -= request.output.held
        request.client.waiting.pop(request.id, None)
        request.client.drop(request)
        self._t.requests.pop(request.id, None)
        request.origin = None  # a request and its lease name each other: let go without waiting for the collector

    def disown(self, request: Request, now: float) -> None:
        """Nobody claims a request that only its worker knows: stop it there and forget it."""
        if request.lease is not None:
            self._leases.stop(request.lease, StopReason.CANCELLED, now)
            request.lease = None
        self._t.timers.cancel((Alarm.RECOVERY, request.id, 0))
        self._t.counters["disowned"] += 1
        self.forget(request)

    def abandon(self, client: Client, now: float) -> None:
        """A client is gone for good: end what it has here and tell nobody, some now and the rest soon.

        If it comes back meanwhile, what is left lives on.
        """
        self._t.clients.part(client)
        self._give_up(list(client.requests.values()), now)
        if client.requests:
            self._t.timers.set((Alarm.CLIENT_GRACE, client.instance, 0), now + PAUSE)
        else:
            self._t.clients.forget(client)
            if not client.principal.name:
                self._t.queues.forget(client.principal)

    def detach(self, client: Client, now: float) -> None:
        """A client is lost: end likewise what was not to outlive that; what has ended waits for it as all else does."""
        hasty = [r for r in client.requests.values() if r.submit.cancel_on_disconnect and r.state is not State.DONE]
        self._give_up(hasty, now)
        if len(hasty) > SLICE:
            self._t.timers.set((Alarm.CLIENT_LOST, client.instance, 0), now + PAUSE)

    def _give_up(self, requests: list[Request], now: float) -> None:
        """The newest ones go first: of many most wait, and would else get the slots of those that run."""
        for request in reversed(requests[-SLICE:]):
            if request.state is not State.DONE:
                self.cancel(request, now, "the client went away")
            self._t.abandon(request)
            self.forget(request)


def error_to(peer: Peer, error: LoopmuxError, request_id: bytes = wire.NO_ID) -> Send:
    """ERROR, to a peer whose message is none, or says what cannot be done for it."""
    return Send(peer, Message(Header(Kind.ERROR, request_id), body=packed(error)))


def packed(
    error: LoopmuxError, *, model: str | None = None, worker: str | None = None, usage: Usage | None = None
) -> bytes:
    """An error as BODY."""
    return codec.pack(Failure.of(error, model=model, worker=worker, usage=usage))
