"""The broker's tables: they agree with each other at every moment, and are empty at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmux_broker.requests import State
from loopmux_broker.tables import Alarm
from simulation.broken import hold

if TYPE_CHECKING:
    from loopmux_broker.tables import Tables
    from simulation.world import World

_ENFORCED = 0.1
"""Seconds after a deadline by which the broker has acted on it."""
_CHUNK = 2_000
"""Bytes that the last chunk may exceed a limit by."""


def audit(world: World) -> None:
    """What must hold between any two events."""
    tables = world.broker.core.tables
    requests, admission, pool = tables.requests.values(), tables.admission, tables.pool
    queued = sum(r.state is State.QUEUED for r in requests)
    hold(
        admission.queued == tables.queues.length == queued,
        "the books agree: queued",
        lambda: f"{admission.queued}, {tables.queues.length}, {queued}",
    )
    output, held = sum(r.output.held for r in requests), sum(r.size for r in requests)
    hold(admission.output == output, "the books agree: output", lambda: f"{admission.output}, {output}")
    hold(admission.held == held, "the books agree: bodies", lambda: f"{admission.held}, {held}")
    leases = {key for worker in pool.workers.values() for key in worker.leases}
    hold(set(pool.leases) == leases, "the books agree: leases", lambda: f"{pool.leases.keys()}, {leases}")
    owned = [r for client in tables.clients.by_instance.values() for r in client.requests.values()]
    hold(
        len(owned) == len(requests) and all(tables.requests.get(r.id) is r for r in owned),
        "P7 a request is one client's",
        lambda: f"{len(requests)} requests, clients have {len(owned)}",
    )
    for client in tables.clients.by_instance.values():
        mine, account = client.requests.values(), client.principal
        waiting = sum(r.state is State.QUEUED for r in mine)
        hold(account.queued == waiting, "the books agree: a client's queue", lambda: f"{account.queued}, {waiting}")
        body = sum(r.size for r in mine)
        hold(account.held == body, "the books agree: a client's bodies", lambda: f"{account.held}, {body}")
        hold(
            account.known == len(mine), "the books agree: a client's requests", lambda: f"{account.known}, {len(mine)}"
        )
        kin = client.peer is not None or (Alarm.CLIENT_LOST, client.instance, 0) in tables.timers
        hold(
            kin or not any(r.submit.cancel_on_disconnect and r.state is not State.DONE for r in mine),
            "nothing outlives its client that is not to",
            lambda: f"{client.instance.hex()} is lost",
        )
    for request in requests:
        kept, total, ids = request.output.chunks, request.output.total, len(request.output.ids) // 4
        starts, ends = [chunk.seq for chunk in kept], [chunk.end for chunk in kept]
        in_order = [*starts, total][1:] == ends and (request.state is State.DONE or ids == total)
        hold(in_order, "the books agree: tokens", lambda: f"{starts}, {ends}, {ids} of {total} ids")
        hold(
            request.output.held <= world.profile.config.request_output + _CHUNK,
            "buffers are bounded",
            lambda: f"{request.output.held} bytes",
        )
    late = world.clock.now - _ENFORCED
    awake = world.broker.running and world.clock.now - world.broker.thawed_at > _ENFORCED
    if awake:
        _judges(tables, late)
    for request in requests if awake else ():
        in_time = request.state is State.DONE or request.deadline >= late
        hold(
            in_time,
            "a deadline is kept by the broker",
            lambda: f"{world.story.names.get(request.id)}, {request.state.name}",
        )
    limits = tables.config.limits
    calls = world.promise.calls  # those that ran before, or waited with another broker, were let in then
    new = sum(r.state is State.QUEUED and not (r.attempt or calls[r.id].attached) for r in requests)
    hold(new <= limits.queued, "limits are kept: queued", lambda: f"{new} of {admission.queued} never ran")
    hold(admission.held <= limits.held, "limits are kept: bodies", lambda: f"{admission.held} > {limits.held}")
    for worker in pool.workers.values():
        if worker.free > 0:
            waiting_one = tables.queues.next_for(worker)
            hold(
                waiting_one is None,
                "nobody waits beside a free slot",
                lambda: f"{world.story.names.get(waiting_one.id)} waits, {worker.name} has {worker.free} free",
            )


def _judges(tables: Tables, late: float) -> None:
    """Nobody who is lost is kept: silence and stalls are noticed in their time."""
    pool, clients = tables.pool, tables.clients.by_peer.values()
    for member in (*pool.workers.values(), *pool.launchers.values(), *clients):
        silent = lambda: f"{member}, for {late - member.heard:.1f} s"  # noqa: E731
        hold(member.heard + tables.patience >= late, "who is silent for three heartbeats is lost", silent)
    for worker in pool.workers.values():
        due = tables.config.stall.due(worker)
        hold(due is None or due >= late, "a worker whose engine hangs is lost", worker.name)


def at_rest(world: World) -> None:
    """Nothing is left of any request."""
    tables = world.broker.core.tables
    # Cancelled before this broker knew it: remembered for a while, because a worker may still come with it.
    kept = [
        r
        for r in tables.requests.values()
        if r.submit.model or not world.promise.journal.count(("kill broker",), 0, 1e9)
    ]
    left = [f"{world.story.names.get(r.id, '?')} {r.state.name}" for r in kept]
    hold(not left, "nothing is left in the broker", lambda: f"requests {left}")
    hold(not tables.pool.leases, "nothing is left in the broker", lambda: f"leases {tables.pool.leases}")
    admission = tables.admission
    counts = (tables.queues.length, admission.queued, admission.held, admission.output)
    hold(counts == (0, 0, 0, 0), "nothing is left in the broker", lambda: f"{counts}")
    known, alive = len(tables.clients.by_instance), len(world.living)
    hold(known <= alive, "who left is forgotten", lambda: f"{known} clients are known, {alive} live")
    strikes = 0 if world.strangers else tables.counters["strikes"]
    hold(strikes == 0, "no peer of ours breaks the protocol", lambda: f"{strikes} strikes")
