"""Who runs next: fair between clients by the tokens they were served, then by rank within each client.

All clients with one key are one here. Each client has an account of the tokens it was served, which count less the
more its key weighs. There is one account for all workers that serve the same models, and another for those that serve
others: nobody waits for one model because of what was had of another one elsewhere. A request's head start (its
priority, or that it continues a tool loop) counts as that many tokens less. The client with the lowest account comes
next, and of its requests the one with the best rank: the time it arrived less its head start in seconds, so that
waiting ages a request by itself.

An account moves when one of its client's requests gets a slot (by what it is expected to cost, which is an answer as
long as that client's last ones were), when it becomes longer than that, and when it gives the slot back (by what it did
cost). A client that comes, or comes back with nothing queued, starts level with the next of those that wait for the
same, or with the ones being served: time away is no credit. What these are only expected to cost is left out: nobody
who comes waits for what others may never get.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from loopmux_broker.clients import Principal
from loopmux_broker.ledger import Account, Ledger, Ledgers, Line, Turn
from loopmux_broker.pool import Worker
from loopmux_broker.requests import Lane, Request

Rank = tuple[float, int]

_SIZE_PER_TOKEN = 4
"""Characters of a prompt that count as one token: an estimate, the broker reads no prompts."""
_RECENT = 0.1
"""Weight of the latest answer in how long a client's are: about the last ten count."""
_SLACK = 64
"""Turns that no longer count and may lie in a heap before it is swept."""

_PASSED = 2.0
"""Seconds: a turn whose session is with another worker lets others pass that came up to so much later. In a full house
its own worker will have a slot in about that time, and it need not be computed anew by this one.
"""
_LOOK = 64
"""How far behind the first such a one is looked for."""


@dataclass(frozen=True, slots=True)
class HeadStart:
    """How much sooner a request's turn comes.

    Attributes:
        priority: seconds earlier that it counts as arrived among its client's requests, per step.
        continuing: the same for a request that continues a tool loop.
        tokens: how many tokens less its client counts as served, for each of these seconds.
    """

    priority: float = 30.0
    continuing: float = 10.0
    tokens: float = 50.0

    def of(self, request: Request) -> float:
        """Seconds."""
        submit = request.submit
        return submit.priority * self.priority + (self.continuing if submit.continues else 0.0)


@dataclass(slots=True, eq=False)
class _Queue:
    """One lane: its principals' lines, and a heap of their turns in which outdated ones may lie."""

    lines: dict[Principal, Line] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    length: int = 0

    def next(self) -> Turn:
        """The turn that comes first. There is one: a queue without lines is removed."""
        while self.turns[0][-1].turn is not self.turns[0]:
            heapq.heappop(self.turns)
        return self.turns[0]

    def put(self, turn: Turn) -> None:
        """A line's turn changed."""
        turn[-1].turn = turn
        heapq.heappush(self.turns, turn)
        if len(self.turns) > 2 * len(self.lines) + _SLACK:
            self.turns = [line.turn for line in self.lines.values() if line.turn is not None]
            heapq.heapify(self.turns)


class Queues:
    """Everybody who waits. Each operation takes O(log n) comparisons, and one per lane that the worker serves.

    Two kinds wait apart: requests that are to run alone need a worker that is emptied for them, not just a slot; and
    some wait for a moment for the worker of their session, though others have free slots.
    """

    def __init__(self, head_start: HeadStart, known: Callable[[str], bool]) -> None:
        """``known`` says whether anybody serves or declares a model."""
        self._head_start = head_start
        self._models: dict[str, dict[Lane, _Queue]] = {}
        self._ledgers = Ledgers(lambda model: model in self._waiting or known(model))
        self._alone: dict[bytes, Request] = {}
        self._awaiting: dict[str, dict[bytes, Request]] = {}  # by the name of the worker that they wait for
        self._waiting: dict[str, int] = {}  # how many wait for each model
        self._count = self._turns = 0
        self.length = 0

    # --- who waits

    def push(self, request: Request) -> None:
        """Queue a request; one that was queued before gets its old place."""
        if request.rank == (0.0, 0):
            self._count += 1
            request.rank = (self._head_start.of(request) - request.arrived, -self._count)
        if request.alone:
            self._alone[request.id] = request
        elif request.awaits:
            self._awaiting.setdefault(request.awaits, {})[request.id] = request
        else:
            self._line_up(request)
        self._note(request.submit.model, 1)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands."""
        if request.alone:
            del self._alone[request.id]
        elif request.awaits:
            _take_out(self._awaiting, request.awaits, request.id)
        else:
            self._step_out(request)
        self._note(request.submit.model, -1)

    def _note(self, model: str, by: int) -> None:
        self.length += by
        waiting = self._waiting.get(model, 0) + by
        if waiting:
            self._waiting[model] = waiting
        else:
            del self._waiting[model]

    def _line_up(self, request: Request) -> None:
        principal, lane = request.client.principal, request.lane
        queue = self._models.setdefault(lane[0], {}).setdefault(lane, _Queue())
        ledger = self._ledgers.of(lane[0])
        account = ledger.lift(principal, _start(queue, ledger))
        line = queue.lines.get(principal)
        if line is None:
            line = queue.lines[principal] = account.lines[lane] = Line(account)
        bisect.insort(line.entries, (*request.rank, request))
        queue.length += 1
        if line.entries[-1][2] is request:
            self._set_turn(queue, line)

    def _step_out(self, request: Request) -> None:
        principal, lane = request.client.principal, request.lane
        queue = self._models[lane[0]][lane]
        line = queue.lines[principal]
        at = bisect.bisect_left(line.entries, request.rank, key=_rank)
        del line.entries[at]
        queue.length -= 1
        if line.entries:
            if at == len(line.entries):
                self._set_turn(queue, line)
            return
        line.turn = None
        del line.account.lines[lane], queue.lines[principal]
        if not queue.lines:
            _take_out(self._models, lane[0], lane)

    def _set_turn(self, queue: _Queue, line: Line) -> None:
        ahead, number, request = line.entries[-1]
        served = line.account.served - self._head_start.tokens * self._head_start.of(request)
        self._turns += 1
        queue.put((served, -ahead, -number, self._turns, line))

    def _set_turns(self, account: Account) -> None:
        for lane, line in account.lines.items():
            self._set_turn(self._models[lane[0]][lane], line)

    # --- who is next

    def next_for(self, worker: Worker) -> Request | None:
        """Who runs next on a worker with a free slot, over all the lanes it serves. It is left in the queue.

        Who waits for this worker alone goes first: free slots of others were left for it.
        Who comes next by rank, with a session at another worker, may be passed by one whose is not, if that came little
        later.
        """
        for request in self._awaiting.get(worker.name, {}).values():
            if worker.serves(*request.lane):
                return request
        turns = [
            queue.next()
            for model in worker.models
            for lane, queue in self._models.get(model, {}).items()
            if worker.serves(*lane)
        ]
        if not turns:
            return None
        account = min(turns)[-1].account
        lines = [line.entries for lane, line in account.lines.items() if worker.serves(*lane)]
        first = max((line[-1] for line in lines), key=_rank)
        if first[2].home in ("", worker.name):
            return first[2]
        close = (e for line in lines for e in line[-_LOOK:] if e[0] >= first[0] - _PASSED)
        return max((e for e in close if e[2].home in ("", worker.name)), key=_rank, default=first)[2]

    def awaiting(self, worker: Worker) -> list[Request]:
        """Who waits for this worker alone."""
        return list(self._awaiting.get(worker.name, {}).values())

    def next_alone(self, worker: Worker) -> Request | None:
        """Who waits to run alone and could do so on this worker, with no other worker being emptied for it."""
        waiting = (r for r in self._alone.values() if r.held_by is None and worker.serves(*r.lane))
        return max(waiting, key=lambda r: r.rank, default=None)

    # --- accounts

    def unite(self, models: Iterable[str]) -> None:
        """A worker serves these: who takes of one of them takes of all."""
        for account in self._ledgers.unite(models):
            self._set_turns(account)

    def forget(self, principal: Principal) -> None:
        """Drop the accounts of a client without a key that is gone for good."""
        self._ledgers.forget(principal)

    def charge(self, request: Request) -> None:
        """A request gets a slot: its client is charged for an answer as long as its last ones, until more is known.

        Not for all that it may cost, which few use up: who allows for long answers and gets short ones would have fewer
        slots than others. What it was charged for an attempt before is part of that: nobody pays twice because a worker
        was lost.
        """
        ledger, allowed = self._ledgers.of(request.submit.model), request.submit.max_new_tokens
        account = ledger.lift(request.client.principal, ledger.level)
        ledger.level = max(ledger.level, account.settled)
        expected = allowed if account.usual is None else min(allowed, math.ceil(account.usual))
        self._bill(request, account, max(expected, request.output.total))

    def outgrown(self, request: Request) -> None:
        """It has more tokens than it was charged for: it will become twice as long, if it may."""
        account, total = self._account(request), request.output.total
        if account is not None:
            self._bill(request, account, max(total, min(2 * total, request.submit.max_new_tokens)))

    def settle(self, request: Request) -> None:
        """It gives the slot back with the tokens that it has."""
        account = self._account(request)
        if account is not None and request.charged:
            self._bill(request, account, request.output.total)

    def answered(self, request: Request) -> None:
        """It has ended well: that is how long its client's answers are."""
        account, total = self._account(request), request.output.total
        if account is not None:
            usual = total if account.usual is None else account.usual
            account.usual = usual + _RECENT * (total - usual)

    def _account(self, request: Request) -> Account | None:
        """That of its client, if that is still there."""
        ledger = self._ledgers.get(request.submit.model)
        return None if ledger is None else ledger.accounts.get(request.client.principal)

    def _bill(self, request: Request, account: Account, tokens: int) -> None:
        """Let a request have cost so much: at least 1, so that a thousand that produce nothing are not one turn."""
        weight, cost = request.client.principal.weight, max(request.submit.prompt_size // _SIZE_PER_TOKEN + tokens, 1)
        expected = tokens - request.output.total
        account.expected += (expected - request.expected) / weight
        request.expected, request.foreseen = expected, tokens
        if cost == request.charged:
            return
        account.served += (cost - request.charged) / weight
        request.charged = cost
        self._set_turns(account)

    # --- what people see

    def position(self, request: Request) -> int:
        """About how many get a slot before it does, itself included: clients take turns."""
        if request.alone:
            return 1
        if request.awaits:
            return len(self._awaiting[request.awaits])
        queue = self._models[request.lane[0]][request.lane]
        entries = queue.lines[request.client.principal].entries
        own = len(entries) - bisect.bisect_left(entries, request.rank, key=_rank)
        return min(own * len(queue.lines), queue.length)

    def waiting(self, model: str) -> int:
        """How many wait for a model."""
        return self._waiting.get(model, 0)

    def of_model(self, model: str) -> list[Request]:
        """Everybody who waits for a model, the next one first in each line."""
        lines = [line for queue in self._models.get(model, {}).values() for line in queue.lines.values()]
        found = [entry[2] for line in lines for entry in reversed(line.entries)]
        apart = [*self._alone.values(), *(r for waiting in self._awaiting.values() for r in waiting.values())]
        return found + [request for request in apart if request.submit.model == model]

    def lanes(self, model: str) -> int:
        """How many lanes of a model anybody waits in."""
        return len(self._models.get(model, {}))

    def models(self) -> Iterator[str]:
        """The models that anybody waits for."""
        return iter(list(self._waiting))


def _start(queue: _Queue, ledger: Ledger) -> float:
    """The account from which a client that comes takes turns with those that wait, if any do.

    That of the next of these, unless it is that by its head start alone: others wait that were served less.
    """
    if not queue.lines:
        return ledger.level
    served, *_, line = queue.next()
    return min(line.account.settled, max(ledger.level, served - line.account.expected))


def _rank(entry: tuple[float, int, Request]) -> Rank:
    return entry[0], entry[1]


def _take_out(table: dict[Any, dict[Any, Any]], key: object, inner: object) -> None:
    """Remove an entry, and the table it was in with its last."""
    entries = table[key]
    del entries[inner]
    if not entries:
        del table[key]
