"""Requests that wait, and the state of the model that they wait for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

from loopmux import codec
from loopmux.errors import ModelNotFoundError, failed_to_start, unknown_model
from loopmux.messages import Phase
from loopmux.wire import ROUTE_LIMIT, Header, Kind, Message
from loopmux_broker.ends import Ends
from loopmux_broker.events import Send
from loopmux_broker.intake import TAKEN_BACK, gone, unknown_adapter
from loopmux_broker.pool import Standing
from loopmux_broker.requests import Request, State
from loopmux_broker.tables import PAUSE, PLENTY, SLICE, Alarm, Tables

_ASKED_FOR = "it is started because of this request"
_LONGEST_DETAIL = ROUTE_LIMIT - 128
"""Bytes: CATALOGUE may have more than PHASE has room for beside the rest."""
_UNLIKE = "the request goes on where the same weights are loaded that began it"


class Waiting:
    """Tells who waits what for, and ends the wait where it is in vain."""

    def __init__(self, tables: Tables, ends: Ends) -> None:
        self._t, self._ends = tables, ends
        self._rounds: dict[str, Callable[[float], bool]] = {}  # by model: goes on with a round, and says if it is over
        self._unsettled: Iterator[str] = iter(())  # models

    def _each(self, model: str, look: Callable[[Request, float], None], now: float) -> None:
        """Look at everybody who waits for a model, some now and the rest soon, instead of whatever was under way."""
        waiting = iter(self._t.queues.of_model(model))

        def some(now: float) -> bool:
            part = list(islice(waiting, SLICE))
            for request in part:
                if request.state is State.QUEUED:
                    look(request, now)
            return len(part) < SLICE

        self._rounds[model] = some
        if len(self._t.out) < PLENTY:
            self.go_on(model, now)
        else:  # a worker may have 64 models
            self._t.timers.set((Alarm.ROUND, model, 0), now)

    def go_on(self, model: str, now: float) -> None:
        """Look at the next of those who wait for a model."""
        if self._rounds[model](now):
            del self._rounds[model]
            self._t.timers.cancel((Alarm.ROUND, model, 0))
        else:
            self._t.timers.set((Alarm.ROUND, model, 0), now + PAUSE)

    def model_changed(self, model: str, now: float) -> None:
        """A model's phase or its workers changed: tell who waits for it, or fail them where waiting is in vain."""
        self._each(model, self.review, now)

    def review(self, request: Request, now: float) -> None:
        """If the request waits: for what, and whether that can come."""
        if request.state is not State.QUEUED:
            return
        pool, model = self._t.pool, request.submit.model
        declared = pool.declared(model)
        if pool.serves(model) and pool.leaves(model):
            self._ends.end(request, Kind.ERROR, gone(model, TAKEN_BACK), now)
        elif pool.serves(model) and not self._unlike(request):
            if self._t.joined(model) and (error := unknown_adapter(pool, request)) is not None:
                self._ends.end(request, Kind.ERROR, error, now)
        elif declared is not None and declared.entry.phase == "failed":
            self._ends.end(request, Kind.ERROR, failed_to_start(model, declared.entry.detail), now)
        else:
            self._tell_phase(request, now)

    def settled(self, now: float) -> None:
        """Whoever belongs to this broker has joined by now: a model that is still unknown will stay so.

        Requests may wait for as many models as they are, so one model is looked at now and the next one soon.
        """
        if not self._t.settled:
            self._t.settled, self._unsettled = True, self._t.queues.models()
        model = next(self._unsettled, None)
        if model is None:
            return
        self._look_for(model, now)
        self._t.timers.set((Alarm.SETTLED, b"", 0), now + PAUSE)

    def worker_lost(self, model: str, now: float) -> None:
        """A worker is lost, or only its connection: where nobody else knows its model it has the time to join again."""
        pool = self._t.pool
        if not pool.knows(model) and model not in pool.withdrawn and self._t.config.settle > 0:
            self._t.missed[model] = now
            self._t.timers.set((Alarm.MISSED, model, 0), now + self._t.config.settle)

    def missed(self, model: str, now: float) -> None:
        """It has had that time. Who waited before goes on waiting: the model was there, and may be loading."""
        self._look_for(model, now, self._t.missed.pop(model))

    def _look_for(self, model: str, now: float, since: float = -math.inf) -> None:
        """Refuse who has come ``since`` for a model that nobody knows, if those who might have had the time to join."""
        pool = self._t.pool
        if pool.knows(model) or not self._t.joined(model):
            self.model_changed(model, now)
        else:
            self._each(model, partial(self._unknown, unknown_model(model, pool.known()), since), now)

    def _unknown(self, error: ModelNotFoundError, since: float, request: Request, now: float) -> None:
        if request.arrived >= since and not request.attempt:  # one that ran before waits for a worker to come back
            self._ends.end(request, Kind.ERROR, error, now)

    def model_left(self, model: str, now: float) -> None:
        """A worker leaves in good order: whoever waits for its model waits in vain if its launcher took it back too."""
        if self._t.pool.leaves(model):
            self.model_withdrawn(model, now)

    def model_withdrawn(self, model: str, now: float, why: str = TAKEN_BACK) -> None:
        """A launcher no longer answers for a model."""
        if self._t.pool.knows(model):
            self.model_changed(model, now)
            return
        error = gone(model, why)
        self._each(model, lambda request, now: self._ends.end(request, Kind.ERROR, error, now), now)

    def _tell_phase(self, request: Request, now: float) -> None:
        pool, model, peer = self._t.pool, request.submit.model, request.client.peer
        if peer is None:
            return
        how = pool.standing(model, now)
        declared = pool.declared(model)
        if how.phase == "idle" and declared is not None and declared.entry.scales:
            how = Standing("queued", now - request.arrived, _ASKED_FOR)
        if self._unlike(request):
            how = replace(how, phase="queued", detail=_UNLIKE)
        detail = codec.shorten(how.detail, _LONGEST_DETAIL)
        phase = Phase(how.phase, self._t.queues.position(request), round(how.elapsed, 3), detail)
        self._t.out.append(Send(peer, Message(Header(Kind.PHASE, request.id), route=codec.pack(phase))))

    def _unlike(self, request: Request) -> bool:
        """Whether the model has workers, but none that could go on with what the request has produced."""
        serving = self._t.pool.serving(request.submit.model)
        return request.fingerprint is not None and bool(serving) and not any(w.serves(*request.lane) for w in serving)
