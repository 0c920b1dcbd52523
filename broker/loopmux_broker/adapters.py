"""Adapters at run time: LOAD and UNLOAD, carried out by all workers of a model and remembered by its launchers.

LOAD goes to the workers first and to the launchers when all have it, UNLOAD the other way round: so nothing is
remembered that a worker could not do, and no worker is started with what is being unloaded. A LOAD that fails anywhere
is taken back where it was done. What launchers declare is the rule from then on: a worker that comes without an adapter
that they remember (CATALOGUE's ``onto``), because it was being started meanwhile, is sent LOAD by the broker itself,
and one that comes with an adapter that none of them knows, because it was away meanwhile, UNLOAD.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from loopmux import codec, wire
from loopmux.errors import (
    AdapterNotFoundError,
    LoopmuxError,
    OverloadedError,
    ProtocolError,
)
from loopmux.messages import AdapterOrder, Catalogue, Done, Failure
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import Log, Peer, Send
from loopmux_broker.operation import Operation, Role
from loopmux_broker.orders import RETRY, loadable, unloadable
from loopmux_broker.pool import Launcher, Worker
from loopmux_broker.tables import Alarm, Tables
from loopmux_broker.waiting import Waiting

_MOST = 64
"""Operations at once. Each holds up the engines of its workers, so more of them would only wait for each other."""
_KEPT = 256
"""Ended operations whose outcome is kept for who asks again, and for workers that answer late."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """What is kept of an operation: its answer, and who must not have the adapter because of it."""

    answer: Done
    undone: bool
    had: frozenset[bytes]


class Adapters:
    """Operations on adapters, from the order to the answer."""

    def __init__(self, tables: Tables, waiting: Waiting) -> None:
        self._t, self._waiting = tables, waiting
        self._operations: dict[bytes, Operation] = {}
        self._ended: OrderedDict[bytes, _Ended] = OrderedDict()
        self._made = 0

    # --- what clients ask ---------------------------------------------------------------------------------------------

    def asked(self, peer: Peer, message: Message, now: float) -> None:
        """LOAD or UNLOAD from a client; said again, it is answered again.

        Raises:
            ProtocolError: malformed.
        """
        order, id_ = codec.unpack(AdapterOrder, message.route), message.header.request
        if id_ == wire.NO_ID:
            raise ProtocolError(f"{message.kind.name}: found an id of zeros, expected 16 random bytes")
        if id_ in self._operations:
            self._operations[id_].asker = peer
            return
        if id_ in self._ended:
            self._answer(peer, id_, self._ended[id_].answer)
            return
        load = message.kind is Kind.LOAD
        try:
            self._check_free(order)
            workers = loadable(self._t, order) if load else unloadable(self._t, order)
        except LoopmuxError as error:
            self._answer(peer, id_, Done(Failure.of(error, model=order.model)))
            return
        declared = self._t.pool.launchers_of(order.model if load else order.name)
        stages: list[tuple[Role, set[str]]] = [("worker", workers), ("launcher", set(declared))]
        had = frozenset(w.register.boot for w in self._t.pool.serving(order.name))
        self._begin(Operation(id_, load, order, peer, stages if load else stages[::-1], now, had), now)

    def _check_free(self, order: AdapterOrder) -> None:
        if any(op.order.name == order.name for op in self._operations.values()):
            raise OverloadedError(
                f"adapter {order.name!r} is being loaded or unloaded: try again when that is done", retry_after=RETRY
            )
        if len(self._operations) >= _MOST:
            raise OverloadedError(f"{_MOST} adapters are being loaded or unloaded: try again", retry_after=RETRY)

    # --- what workers and launchers answer ----------------------------------------------------------------------------

    def done(self, member: Worker | Launcher, message: Message, now: float) -> None:
        """DONE: one of those who were told has done it, or could not.

        Raises:
            ProtocolError: malformed.
        """
        done, id_ = codec.unpack(Done, message.body), message.header.request
        if isinstance(member, Worker):
            member.moved, member.loading = now, member.loading - {id_}
        op = self._operations.get(id_)
        if op is not None and op.waits_for(member.register.role, member.name):
            loaded = op.load and isinstance(member, Worker) and done.failure is None
            if loaded and (done.served is None or done.served.id != op.order.name):
                raise ProtocolError(f"DONE: expected what is served since, {op.order.name!r}, found {done.served}")
            self._note(op, member, done, now)
            self._go_on(op, now)
        elif isinstance(member, Worker) and done.served is not None:
            self._late(member, id_, done, now)

    def _note(self, op: Operation, member: Worker | Launcher, done: Done, now: float) -> None:
        op.awaited.discard(member.name)
        gone_already = not op.load and done.failure is not None and done.failure.code == AdapterNotFoundError.code
        if done.failure is not None and not gone_already:
            op.failures[member.name] = done.failure
        elif isinstance(member, Launcher):
            op.remembered.add(member.name)
        else:
            op.done[member.name] = done
            if not op.load:
                self._gone_from(member, op.order.name, now)

    def _late(self, worker: Worker, id_: bytes, done: Done, now: float) -> None:
        """A worker has loaded an adapter that nobody waits for any more; what was taken back goes from there, too."""
        assert done.served is not None
        ended, name = self._ended.get(id_), done.served.id
        if any(op.counts_on(worker, name) for op in self._operations.values()):
            return  # that will tell whether it stays
        if ended is not None and ended.undone and worker.register.boot not in ended.had:
            self._one(Kind.UNLOAD, AdapterOrder("", name), worker, now)
        else:
            self._serves(worker, done, now)
            self._sweep(worker, now)

    def declared(self, entry: Catalogue, now: float) -> None:
        """A launcher remembers an adapter: workers of its model that do not have it are to load it.

        Or it forgets one: then nobody needs to know any more that a worker could not load it.
        """
        if entry.removed:
            if not self._t.pool.launchers_of(entry.model):
                for worker in self._t.pool.left_out_by(entry.model):
                    self._gone_from(worker, entry.model, now)
        elif entry.onto is not None:
            for worker in self._t.pool.serving(entry.onto):
                self._complete(worker, entry, now)

    def joined(self, worker: Worker, now: float) -> None:
        """A worker registered: what is under way is its business too, and it may lack, or have, what it should not."""
        for op in list(self._operations.values()):
            if op.waits_for("worker", worker.name):
                self._tell(op, [worker])
            elif op.takes_in(worker):
                op.awaited.add(worker.name)
                self._tell(op, [worker])
        for entry in self._t.pool.run_time_adapters():
            self._complete(worker, entry, now)
        self._sweep(worker, now)

    def settled(self, now: float) -> None:
        """Launchers have had the time to declare what they remember."""
        for worker in list(self._t.pool.workers.values()):
            self._sweep(worker, now)

    def _complete(self, worker: Worker, entry: Catalogue, now: float) -> None:
        """A worker of its model loads an adapter, unless it has tried to."""
        name, onto = entry.model, entry.onto
        lacks = onto in worker.models and name not in worker.models and not worker.draining
        if lacks and name not in {one.id for one in worker.register.left_out} and not self._under_way(name, worker):
            self._one(Kind.LOAD, AdapterOrder(onto or "", name, entry.folder), worker, now)

    def _sweep(self, worker: Worker, now: float) -> None:
        """What a worker has and no launcher knows goes, where some launcher knows its other models.

        Not without its own launcher, the one of its host, nor while that declares its models, one after the other: what
        it comes to last is unknown until then.
        """
        pool, host = self._t.pool, worker.register.host
        heard_out = any(one.declared for one in pool.launchers.values() if one.register.host == host)
        if not (self._t.settled and heard_out) or worker.draining or not any(map(pool.launchers_of, worker.models)):
            return
        for name in worker.register.adapters:
            if not pool.launchers_of(name) and not self._under_way(name, worker):
                self._one(Kind.UNLOAD, AdapterOrder("", name), worker, now)
        for left_out in worker.register.left_out:
            if not pool.launchers_of(left_out.id):
                self._gone_from(worker, left_out.id, now)

    def _under_way(self, name: str, worker: Worker) -> bool:
        """Whether an operation will decide about an adapter of a worker."""
        return any(
            op.order.name == name and (not op.single or op.waits_for("worker", worker.name))
            for op in self._operations.values()
        )

    def lost(self, worker: Worker, why: str, now: float) -> None:
        """A worker is gone. (A launcher that is gone may come back, and is waited for.)"""
        for op in list(self._operations.values()):
            op.done.pop(worker.name, None)
            if op.waits_for("worker", worker.name):
                op.awaited.discard(worker.name)
                if op.load:
                    op.failures[worker.name] = Failure("engine", f"it {why} while it loaded it", retryable=True)
                self._go_on(op, now)

    def delay(self, gap: float) -> None:
        """The broker itself was away for so many seconds, in which nobody could answer."""
        for op in self._operations.values():
            op.since += gap

    def ring(self, id_: bytes, now: float) -> None:
        """Who has not answered is told again, or not waited for any longer."""
        op = self._operations.get(id_)
        if op is None:
            return
        if now - op.since < self._t.config.stall.adapter:
            self._tell_all(op, now)
            return
        why = f"the {op.role} did not answer within {self._t.config.stall.adapter:g} s"
        op.failures |= dict.fromkeys(op.awaited, Failure("engine", why, retryable=True))
        op.awaited.clear()
        self._go_on(op, now)

    # --- the course of an operation -----------------------------------------------------------------------------------

    def _one(self, kind: Kind, order: AdapterOrder, worker: Worker, now: float) -> None:
        """One worker is to do what the rule is."""
        self._by_itself(kind, order, [("worker", {worker.name})], now, single=True)

    def _by_itself(
        self, kind: Kind, order: AdapterOrder, stages: list[tuple[Role, set[str]]], now: float, *, single: bool
    ) -> None:
        """An operation that no client asked for."""
        self._made += 1
        id_ = hashlib.blake2b(self._t.identity.epoch + self._made.to_bytes(8), digest_size=wire.ID_SIZE).digest()
        self._begin(Operation(id_, kind is Kind.LOAD, order, None, stages, now, single=single), now)

    def _begin(self, op: Operation, now: float) -> None:
        self._operations[op.id] = op
        verb = "loading" if op.load else "unloading"
        self._t.out.append(Log("info", f"{verb} an adapter", {"name": op.order.name, "model": op.order.model}))
        self._tell_all(op, now)
        self._go_on(op, now)

    def _tell_all(self, op: Operation, now: float) -> None:
        """Tell whoever has not answered, and again in a while."""
        pool = self._t.pool
        members = pool.workers if op.role == "worker" else pool.launchers
        self._tell(op, [member for member in members.values() if member.name in op.awaited])
        self._t.timers.set((Alarm.ADAPTER, op.id, 0), now + self._t.config.resend)

    def _workers(self, names: Collection[str]) -> list[Worker]:
        return [worker for worker in self._t.pool.workers.values() if worker.name in names]

    def _tell(self, op: Operation, members: Iterable[Worker | Launcher]) -> None:
        kind, route = Kind.LOAD if op.load else Kind.UNLOAD, codec.pack(op.order)
        for member in members:
            if isinstance(member, Worker) and op.load:
                member.loading |= {op.id}
            self._t.out.append(Send(member.peer, Message(Header(kind, op.id), route)))

    def _go_on(self, op: Operation, now: float) -> None:
        """To the next stage that anybody has a part in, when all of this one have answered; then to the end."""
        while not op.awaited:
            if op.failures and (op.load or op.role == "launcher"):
                self._fail(op, now)
                self._catch_up(op, now)
                return
            op.stages.pop(0)
            if not op.stages:
                self._conclude(op, now)
                self._catch_up(op, now)
                return
            op.since = now
            self._tell_all(op, now)

    def _conclude(self, op: Operation, now: float) -> None:
        if op.load:
            for worker in self._workers(op.done):
                self._serves(worker, op.done[worker.name], now)
        content = next((done.content for done in op.done.values() if done.content), "")
        failure = op.failure("was not unloaded everywhere") if op.failures else None
        self._end(op, Done(failure, content, None, tuple(sorted(op.done)), bool(op.remembered)), now)

    def _fail(self, op: Operation, now: float) -> None:
        """Take back what was done, and say why."""
        if not op.load:
            self._end(op, Done(op.failure("was not unloaded")), now)
            return
        fresh = {worker.name for worker in self._workers(op.done) if worker.register.boot not in op.had}
        self._end(op, Done(op.failure("was loaded nowhere", fresh)), now, undone=True)
        if op.asker is None:
            for worker in self._workers(op.failures if self._t.pool.launchers_of(op.order.name) else ()):
                self._t.pool.leave_out(worker, op.order.name, op.failures[worker.name].message)
                self._waiting.model_changed(op.order.name, now)
            return
        remembered = set() if op.had else op.remembered
        stages: list[tuple[Role, set[str]]] = [("launcher", remembered), ("worker", fresh)]
        if back := [stage for stage in stages if stage[1]]:
            self._by_itself(Kind.UNLOAD, op.order, back, now, single=False)

    def _end(self, op: Operation, answer: Done, now: float, *, undone: bool = False) -> None:
        del self._operations[op.id]
        self._t.timers.cancel((Alarm.ADAPTER, op.id, 0))
        for worker in self._t.pool.workers.values():
            if op.id in worker.loading:
                worker.loading -= {op.id}
                self._look_at(worker, now)
        self._ended[op.id] = _Ended(answer, undone, op.had)
        while len(self._ended) > _KEPT:
            self._ended.popitem(last=False)
        if op.asker is not None:
            self._answer(op.asker, op.id, answer)
        if answer.failure is not None:
            self._t.out.append(Log("warning", answer.failure.message))

    def _look_at(self, worker: Worker, now: float) -> None:
        """A worker that was to load an adapter may not stand still for as long any more."""
        alarm = (Alarm.STALL, worker.peer, 0)
        if alarm in self._t.timers:
            self._t.timers.set(alarm, now)

    def _catch_up(self, op: Operation, now: float) -> None:
        """Workers that came when it was too late to take part are held to what is remembered."""
        name = op.order.name
        for entry in self._t.pool.run_time_adapters():
            if entry.model == name:
                self.declared(entry, now)
        if not op.single:  # else one that cannot unload it would be told for ever
            for worker in self._t.pool.serving(name):
                self._sweep(worker, now)

    def _answer(self, peer: Peer, id_: bytes, answer: Done) -> None:
        self._t.out.append(Send(peer, Message(Header(Kind.DONE, id_), body=codec.pack(answer))))

    # --- what it means for requests -----------------------------------------------------------------------------------

    def _serves(self, worker: Worker, done: Done, now: float) -> None:
        assert done.served is not None
        self._t.pool.adapt(worker, done.served, done.content)
        self._t.queues.unite(worker.models)
        self._t.vacant[worker] = None
        self._waiting.model_changed(done.served.id, now)

    def _gone_from(self, worker: Worker, name: str, now: float) -> None:
        """A worker has an adapter no more, or no failure to load it: what waits for it may wait in vain.

        What runs there with it goes on to its end.
        """
        self._t.pool.strip(worker, name)
        if not self._t.pool.knows(name):
            self._waiting.model_withdrawn(name, now, "it was unloaded")
        for model in worker.models:
            self._waiting.model_changed(model, now)
