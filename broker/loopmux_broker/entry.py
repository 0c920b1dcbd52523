"""How requests come in: let in and placed, or refused."""

from __future__ import annotations

from loopmux.errors import LoopmuxError, OverloadedError
from loopmux.messages import Submit
from loopmux.wire import Header, Kind, Message
from loopmux_broker.attempts import Attempts
from loopmux_broker.clients import Client
from loopmux_broker.ends import packed
from loopmux_broker.events import Send, say
from loopmux_broker.intake import exhausted, objection
from loopmux_broker.output import Output
from loopmux_broker.requests import Request, State
from loopmux_broker.tables import Alarm, Tables
from loopmux_broker.waiting import Waiting


class Entry:
    """The door for requests, new and returning."""

    def __init__(self, tables: Tables, attempts: Attempts, waiting: Waiting) -> None:
        self._t, self._attempts, self._waiting = tables, attempts, waiting

    def submit(self, client: Client, request_id: bytes, submit: Submit, body: bytes, now: float) -> None:
        """A new request: run it, queue it or refuse it."""
        t = self._t
        request = Request(request_id, client, submit, body, now, now + submit.timeout, Output(credit=t.config.window))
        worker = self._attempts.worker_for(request)
        error = objection(t.pool, request, settled=t.joined(submit.model))
        error = error or exhausted(t.admission, request, queues=worker is None)
        if error is not None:
            self.refuse(client, request_id, error, model=submit.model)
            return
        self.admit(request)
        request.attempt = request.given = t.abandoned.pop(request_id, 0)
        self._attempts.place(request, worker, now)
        if request.state is State.QUEUED:  # else the client hears from the worker: output, or that it has the request
            self.accept(request)
            self._waiting.review(request, now)

    def admit(self, request: Request) -> None:
        """It is in: count what it holds, and note when its time is over."""
        t = self._t
        t.counters["submitted"] += 1
        t.requests[request.id] = request
        request.client.add(request)
        t.admission.admit(request.client.principal, request.size)
        t.timers.set((Alarm.DEADLINE, request.id, 0), request.deadline)
        if t.traced:
            client, submit = request.client, request.submit
            t.trace(
                "request accepted", request.id, client=client.key or client.instance.hex(), model=submit.model,
                adapter=submit.adapter, session=submit.session, trace=submit.trace,
            )  # fmt: skip

    def accept(self, request: Request) -> None:
        """Tell the client that the broker has its request, and its place in the queue (0: with a worker)."""
        if request.client.peer is None:
            return
        position = self._t.queues.position(request) if request.state is State.QUEUED else 0
        self._t.out.append(Send(request.client.peer, say(Kind.ACCEPTED, request.id, arg=position)))

    def refuse(self, client: Client, request_id: bytes, error: LoopmuxError, *, model: str, received: int = 0) -> None:
        """Answer with an error and remember nothing: a repeated SUBMIT is judged anew."""
        self._t.counters["overloaded" if isinstance(error, OverloadedError) else "refused"] += 1
        if self._t.traced:
            self._t.trace("request refused", request_id, model=model, code=error.code)
        if client.peer is not None:
            header = Header(Kind.ERROR, request_id, seq=received)
            self._t.out.append(Send(client.peer, Message(header, body=packed(error, model=model or None))))
