"""What the broker tells about itself when asked (STATUS), and launchers about the demand for their models (SCALE)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from loopmux import codec
from loopmux.messages import AdapterStatus, Demand, ModelStatus, Status, WorkerLoad, WorkerStatus
from loopmux.wire import CLIENT_BODY_LIMIT, Header, Kind, Message
from loopmux_broker.events import Peer, Send
from loopmux_broker.pool import Pool, Worker, contents
from loopmux_broker.tables import Tables

_LATE = 1.5
"""Heartbeats of silence after which a worker is shown as silent: one is missing."""


def reported(tables: Tables, peer: Peer, question: bytes, now: float) -> Send:
    """The answer to a question. What workers say of themselves is left out where not all of it can be sent."""
    status = report(tables, now)
    body = codec.pack(status)
    if len(body) > CLIENT_BODY_LIMIT:
        body = codec.pack(replace(status, workers=tuple(replace(worker, report={}) for worker in status.workers)))
    return Send(peer, Message(Header(Kind.REPORT, question), body=body))


def report(tables: Tables, now: float) -> Status:
    """Everything that ``status`` shows."""
    identity, pool = tables.identity, tables.pool
    running = Counter(lease.request.submit.model for lease in pool.leases.values() if not lease.stopping)
    return Status(
        epoch=identity.epoch,
        uptime=round(now - identity.started, 3),
        software=identity.software,
        pid=identity.pid,
        clients=len(tables.clients.by_peer),
        queued=tables.queues.length,
        running=running.total(),
        models=tuple(_model(tables, m, tables.queues.waiting(m), running[m], now) for m in pool.known()),
        workers=tuple(_worker(tables, w, now) for w in sorted(pool.workers.values(), key=lambda w: w.name)),
        launchers=tuple(sorted(x.name for x in pool.launchers.values())),
        counters=dict(sorted(tables.counters.items())),
        settled=tables.settled,
        tables=_sizes(tables),
        notes={x.name: x.note for x in pool.launchers.values() if x.note},
        adapters=_adapters(pool),
    )


def demand(tables: Tables, models: Sequence[str], now: float) -> Demand:
    """Who waits for these models, and what their workers have to do."""
    queued = {model: count for model in models if (count := tables.queues.waiting(model))}
    workers = {worker.name: worker for model in models for worker in tables.pool.serving(model) if not worker.draining}
    return Demand(queued, tuple(_load(workers[name], now) for name in sorted(workers)))


def _load(worker: Worker, now: float) -> WorkerLoad:
    idle = 0.0 if worker.leases else now - max(worker.moved, worker.since)
    return WorkerLoad(worker.name, worker.slots, len(worker.leases), round(idle, 3))


def _sizes(tables: Tables) -> dict[str, int]:
    return {
        "clients": len(tables.clients.by_instance),
        "requests": len(tables.requests),
        "leases": len(tables.pool.leases),
        "queued": tables.queues.length,
        "held": tables.admission.held,
        "output": tables.admission.output,
        "strikes": len(tables.strikes.records),
        "rivals": len(tables.rivals),
    }


def _adapters(pool: Pool) -> tuple[AdapterStatus, ...]:
    """Those that workers have, and those that they should have."""
    loaded_for = {entry.model: entry for entry in pool.run_time_adapters()}
    having: dict[str, list[Worker]] = {name: [] for name in loaded_for}
    for worker in pool.workers.values():
        for name in worker.register.adapters:
            having.setdefault(name, []).append(worker)
    return tuple(
        AdapterStatus(
            name,
            len(workers),
            tuple(sorted({content for w in workers if (content := contents(w).get(name))})),
            loaded_for[name].onto if name in loaded_for else None,
            loaded_for[name].folder if name in loaded_for else "",
        )
        for name, workers in sorted(having.items())
    )


def _model(tables: Tables, model: str, queued: int, running: int, now: float) -> ModelStatus:
    pool = tables.pool
    how, workers = pool.standing(model, now), len(pool.serving(model))
    return ModelStatus(model, how.phase, workers, queued, running, how.detail, round(how.elapsed, 3))


def _state(tables: Tables, worker: Worker, now: float) -> Literal["ready", "draining", "silent"]:
    if now - worker.heard > _LATE * tables.config.heartbeat:
        return "silent"
    return "draining" if worker.draining else "ready"


def _worker(tables: Tables, worker: Worker, now: float) -> WorkerStatus:
    register = worker.register
    return WorkerStatus(
        name=worker.name,
        models=tuple(worker.models),
        slots=worker.slots,
        running=len(worker.leases),
        engine=register.engine,
        pid=register.pid,
        host=register.host,
        state=_state(tables, worker, now),
        served=worker.served,
        tokens=worker.tokens,
        tokens_per_second=worker.load.tokens_per_second,
        uptime=round(now - worker.since, 3),
        report=worker.report,
        cached_tokens=worker.load.cached_tokens,
        computed_tokens=worker.load.computed_tokens,
    )
