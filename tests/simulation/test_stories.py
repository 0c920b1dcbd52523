"""Client, broker, worker and launcher cores together: one story each. ``promise`` watches what holds in all."""

from __future__ import annotations

import pytest

from loopmux import wire
from loopmux.errors import (
    CancelledError,
    DeadlineExceededError,
    EngineError,
    LoopmuxError,
    WorkerLostError,
)
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux.results import Result
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import ClientSent, Event
from loopmux_launcher.groups import Group
from simulation.client import Call, plain_call, scripted_call
from simulation.clock import Clock
from simulation.lines import Pipe
from simulation.profile import Profile
from simulation.worker import WorkerProcess
from simulation.world import World


def settled_world(processes: int = 2, slots: int = 4, **echo: float) -> World:
    echo = {"tokens": 100_000, **echo}  # let max_new_tokens decide
    spec = WorkerSpec("", "sim://", (ModelSpec("echo"),), engine="echo", slots=slots, echo=echo)
    world = World(0, Profile(groups=(Group("echo", None, spec, processes, 60.0),)))
    world.run(2.0)
    assert len(world.workers) == processes
    return world


def ask(world: World, tokens: int, client: int = 0, timeout: float = 30.0, **options: object) -> Call:
    name = f"r{len(world.calls) + 1}"
    return world.clients[client].ask(plain_call(world.clients[client], name, tokens, timeout, **options))


def outcome(call: Call, kind: type[Result] | type[LoopmuxError] = Result) -> Result | LoopmuxError:
    assert isinstance(call.outcome, kind), call.outcome
    return call.outcome


def at_rest(world: World) -> None:
    world.run(5.0)
    world.promise.at_rest()


def harm(world: World, *kinds: str) -> None:
    """Tell the promise what is about to be done."""
    for kind in kinds:
        world.promise.journal.note(kind, world.clock.now, 4.0)


def the_busy_one(world: World) -> WorkerProcess:
    (busy,) = [w for w in world.workers if w.engine.load().running]
    return busy


def test_a_generation_comes_whole() -> None:
    world = settled_world()
    call = ask(world, 40)
    world.run(5.0)
    result = outcome(call)
    assert (result.finish_reason, result.attempts, len(call.tokens)) == ("length", 1, 40)
    at_rest(world)


def test_a_turn_with_tool_calls() -> None:
    world = settled_world()
    call = world.clients[0].ask(scripted_call(world.clients[0], "r1", 2, 10.0, session="s"))
    world.run(5.0)
    result = outcome(call)
    assert (result.finish_reason, len(call.calls)) == ("tool_calls", 2)
    at_rest(world)


def test_more_requests_than_slots_all_finish() -> None:
    world = settled_world()
    calls = [ask(world, 50, client) for client in range(2) for _ in range(20)]
    world.run(20.0)
    assert all(outcome(call) for call in calls)
    assert all(w.engine.load().progress for w in world.workers)
    at_rest(world)


def test_a_request_longer_than_the_credit_window_flows_on() -> None:
    world = settled_world()
    call = ask(world, 5_000)
    world.run(25.0)
    assert outcome(call)
    assert len(call.tokens) == 5_000


def test_a_worker_lost_before_the_first_token_is_replaced_unseen() -> None:
    world = settled_world(first_delay=0.5)
    call = ask(world, 10)
    world.run(0.2)
    the_busy_one(world).die()
    world.run(5.0)
    assert outcome(call).attempts == 2
    at_rest(world)


def test_a_worker_lost_later_is_replaced_unseen_too() -> None:
    world = settled_world(rate=50)
    call = ask(world, 150)
    world.run(2.0)
    assert call.tokens
    the_busy_one(world).die()
    world.run(8.0)
    assert (outcome(call).attempts, len(call.tokens)) == (2, 150)
    assert len(world.workers) == 2
    at_rest(world)


def test_a_request_that_kills_its_workers_is_found_out() -> None:
    world = settled_world(processes=4, rate=50)
    call = ask(world, 400)
    for _ in range(3):
        world.run(0.5)
        harm(world, "kill worker")
        the_busy_one(world).die()
    world.run(5.0)
    error = outcome(call, WorkerLostError)
    assert "poison" in error.message
    assert not error.retryable
    at_rest(world)


def test_a_worker_that_is_stopped_in_good_order_is_not_noticed() -> None:
    world = settled_world(rate=50)
    calls = [ask(world, 400, client) for client in range(2)]
    world.run(2.0)
    busy = next(w for w in world.workers if w.engine.load().running)
    busy.stop()
    world.run(3.0)
    assert not busy.alive
    world.run(8.0)
    assert all(outcome(call) for call in calls)
    assert world.broker.core.tables.counters["migrated"] == 1
    at_rest(world)


def test_nor_is_one_that_an_administrator_drains() -> None:
    world = settled_world(rate=50)
    calls = [ask(world, 400, client) for client in range(2)]
    world.run(2.0)
    busy = next(w for w in world.workers if w.engine.load().running)
    world.broker.evict(busy.name, 4.0)
    world.run(1.5)
    assert busy.alive
    world.run(1.5)
    assert not busy.alive
    world.run(8.0)
    assert all(outcome(call) for call in calls)
    assert world.broker.core.tables.counters["migrated"] == 1
    at_rest(world)


def test_a_client_whose_connection_breaks_goes_on_where_it_was() -> None:
    world = settled_world(rate=50)
    call = ask(world, 100)
    world.run(1.0)
    world.broker.snap(world.clients[0].line, 0.0, 0.0)
    world.run(9.0)
    assert outcome(call)
    at_rest(world)


def test_a_worker_whose_connection_breaks_is_a_lost_worker_to_its_requests_and_serves_on() -> None:
    world = settled_world(rate=50)
    call = ask(world, 100)
    world.run(1.0)
    world.broker.snap(the_busy_one(world).line, 0.0, 0.0)
    world.run(9.0)
    assert outcome(call).attempts == 2
    again = [ask(world, 4) for _ in range(8)]
    world.run(5.0)
    assert all(outcome(call) for call in again)
    at_rest(world)


def test_a_worker_that_slept_through_run_and_stop_takes_the_request_up_afterwards() -> None:
    world = settled_world(processes=1, slots=1, rate=50)
    harm(world, "freeze worker")
    world.workers[0].freeze(3.5)
    call = ask(world, 60)
    world.run(10.0)
    assert outcome(call).attempts == 2
    at_rest(world)


def restart_broker(world: World, away: float) -> None:
    harm(world, "kill broker")
    world.broker.die()
    world.clock.after(away, world.broker.start)


@pytest.mark.parametrize("away", [0.02, 0.3, 4.0])
def test_a_restarted_broker_is_not_noticed(away: float) -> None:
    world = settled_world(rate=50)
    begun = [ask(world, 400, client) for client in range(2) for _ in range(3)]
    world.run(1.5)
    assert all(call.tokens for call in begun)
    fresh = ask(world, 10, client=1)
    world.run(0.1)
    restart_broker(world, away)
    world.run(20.0)
    assert outcome(fresh)
    assert [outcome(call).attempts for call in begun] == [1] * 6, "their workers went on meanwhile"
    at_rest(world)


def test_a_restart_of_the_broker_is_a_short_pause() -> None:
    world = settled_world(rate=50)
    call = ask(world, 400)
    world.run(2.0)
    restart_broker(world, 0.02)
    have, begun = len(call.tokens), world.clock.now
    while len(call.tokens) <= have + 8 and world.clock.now < begun + 5:  # what was under way does not count
        world.run(0.005)
    assert world.clock.now - begun <= 0.25 + 8 / 50


def test_a_restart_with_a_full_queue_loses_nobody() -> None:
    world = settled_world(rate=200)
    calls = [ask(world, 50, client) for client in range(2) for _ in range(30)]
    world.run(0.3)
    restart_broker(world, 0.1)
    world.run(20.0)
    assert all(outcome(call) for call in calls)
    at_rest(world)


def test_broker_and_worker_killed_together_lose_only_what_the_client_has_not_received() -> None:
    world = settled_world(rate=50)
    call = ask(world, 150)
    world.run(2.0)
    busy = the_busy_one(world)
    restart_broker(world, 0.1)
    busy.die()
    world.run(9.0)
    assert outcome(call).attempts == 2
    at_rest(world)


def test_what_nobody_claims_after_a_restart_is_stopped() -> None:
    world = settled_world(rate=50)
    ask(world, 100_000, timeout=300.0)
    world.run(1.0)
    restart_broker(world, 0.1)
    world.clients[0].die()
    world.run(3.0)
    harm(world, "kill broker")  # until then nobody knows that it is nobody's
    world.promise.journal.note("kill broker", world.clock.now, 35.0)
    world.run(26.0)
    assert sum(w.engine.load().running for w in world.workers) == 1
    world.run(5.0)
    at_rest(world)


def test_a_cancel_reaches_the_worker_through_a_new_broker() -> None:
    world = settled_world(rate=50)
    call = ask(world, 10_000, timeout=300.0)
    world.run(1.0)
    restart_broker(world, 0.1)
    world.clients[0].cancel(call)
    world.run(3.0)
    outcome(call, CancelledError)
    assert sum(w.engine.load().running for w in world.workers) == 0


def test_a_cancelled_request_stops_in_the_engine() -> None:
    world = settled_world(rate=50)
    call = ask(world, 10_000, timeout=300.0)
    world.run(1.0)
    world.clients[0].cancel(call)
    world.run(0.2)
    outcome(call, CancelledError)
    assert sum(w.engine.load().running for w in world.workers) == 0


def test_a_request_that_ended_unread_is_let_go_when_it_is_cancelled() -> None:
    world = settled_world(rate=500)
    call = ask(world, 2_000, read_in=float("inf"))
    world.run(6.0)
    assert call.outcome is None
    assert 1_000 < len(call.tokens) <= 1_024  # a window, chunks being whole
    world.clients[0].cancel(call)
    world.run(0.1)
    outcome(call, CancelledError)
    at_rest(world)


def test_deadlines_hold_in_the_queue_and_in_mid_stream() -> None:
    world = settled_world(processes=1, slots=1, rate=10)
    running = ask(world, 1_000, timeout=2.0)
    world.run(0.1)
    queued = ask(world, 10, client=1, timeout=1.0)
    world.run(5.0)
    outcome(running, DeadlineExceededError)
    outcome(queued, DeadlineExceededError)
    assert running.tokens
    assert not queued.tokens
    at_rest(world)


def test_an_engine_that_fails_one_request_goes_on_with_the_others() -> None:
    world = settled_world(fail_after=20)
    long, short = ask(world, 50, may_fail=frozenset({"engine"})), ask(world, 10)
    world.run(5.0)
    outcome(long, EngineError)
    outcome(short)


def test_a_client_that_dies_leaves_nothing_running() -> None:
    world = settled_world(rate=50)
    for _ in range(6):
        ask(world, 10_000, timeout=300.0)
    world.run(1.0)
    world.clients[0].die()
    at_rest(world)


# --- models that run when they are asked for --------------------------------------------------------------------------


def cold_world(most: int = 1, slots: int = 2, **echo: float) -> World:
    spec = WorkerSpec("", "sim://", (ModelSpec("echo"),), engine="echo", slots=slots, echo={"tokens": 100_000, **echo})
    world = World(0, Profile(groups=(Group("echo", None, spec, 0, 60.0, most=most, idle_timeout=2.0),)))
    world.run(2.0)
    assert world.workers == []
    return world


def test_a_model_starts_when_it_is_asked_for_and_goes_when_it_is_not() -> None:
    world = cold_world()
    for _ in range(2):
        call = ask(world, 20)
        world.run(2.0)
        assert outcome(call).attempts == 1
        assert len(world.workers) == 1
        at_rest(world)
        assert world.workers == []


def test_a_request_that_comes_as_the_worker_leaves_is_served_by_the_next() -> None:
    for after in range(40):
        world = cold_world()
        first = ask(world, 5)
        world.run(2.0)
        assert outcome(first)
        world.run(1.2 + 0.05 * after)  # some of these fall between the launcher's decision and the worker's goodbye
        call = ask(world, 5)
        world.run(4.0)
        assert outcome(call)
        at_rest(world)


def test_more_workers_come_for_many_requests_and_go_after_them() -> None:
    world = cold_world(most=3, slots=1, rate=20)
    calls = [ask(world, 100) for _ in range(5)]
    world.run(12.0)
    assert len(world.workers) == 3
    world.run(15.0)
    assert all(outcome(call) for call in calls)
    at_rest(world)
    assert world.workers == []


@pytest.mark.parametrize("after", [0.0, 0.05, 0.3, 1.0])
def test_a_cold_start_outlives_the_broker(after: float) -> None:
    world = cold_world()
    call = ask(world, 20)
    world.run(after)
    harm(world, "kill broker")
    world.broker.die()
    world.run(0.5)
    world.broker.start()
    world.run(10.0)
    assert outcome(call)
    at_rest(world)


@pytest.mark.parametrize("after", [0.0, 0.05, 0.3, 1.0])
def test_a_cold_start_outlives_the_launcher(after: float) -> None:
    world = cold_world(rate=20)
    call = ask(world, 40)
    world.run(after)
    harm(world, "kill launcher")
    world.launcher.die()
    world.run(0.5)
    world.launcher.start()
    world.run(10.0)
    assert outcome(call)
    at_rest(world)


def test_a_request_that_is_cancelled_before_its_model_is_there_leaves_nothing() -> None:
    world = cold_world()
    call = ask(world, 20)
    world.run(0.01)
    world.clients[0].cancel(call)
    world.run(1.0)
    outcome(call, CancelledError)
    at_rest(world)
    assert world.workers == []


def test_three_sleeps_of_the_broker_are_no_losses_of_its_workers() -> None:
    """Long enough for everybody to take it for dead; each time they come back, and the stream goes on where it was."""
    world = settled_world(rate=50)
    call = ask(world, 1_000, timeout=60.0)
    for _ in range(3):
        world.run(1.0)
        harm(world, "freeze broker")
        world.broker.freeze(4.5)
        for line in list(world.broker.lines.values()):
            world.broker.snap(line, 3.0, 3.2)
        world.run(7.0)
    world.run(20.0)
    assert outcome(call).attempts == 1
    counters = world.broker.core.tables.counters
    assert not {"workers_lost", "requeued", "mishaps", "clients_lost"} & set(counters), counters
    at_rest(world)


def test_a_socket_begins_its_next_connection_with_what_the_last_one_left_behind() -> None:
    world = settled_world(rate=50)
    ask(world, 200)
    world.run(1.0)
    client, handle, heard = world.clients[0], world.broker.handle, []
    others, client.watches = set(world.broker.lines), True

    def listen(event: Event) -> None:
        if isinstance(event, ClientSent) and event.peer not in others:
            heard.append(wire.from_bytes(event.data).kind)
        handle(event)

    world.broker.handle = listen
    client.line.up.left_behind = lambda: [wire.to_bytes(Message(Header(Kind.PING)))]
    world.broker.snap(client.line, 0.0, 0.0)
    world.run(0.5)
    assert heard[:2] == [Kind.PING, Kind.HELLO]


def test_what_is_left_behind_is_the_end_of_what_never_arrived() -> None:
    amounts = set()
    for seed in range(50):
        clock, sent, heard = Clock(seed), [bytes([n]) for n in range(10)], []
        pipe = Pipe(clock, (0.01, 0.05), lambda take: take(), heard.append)
        for data in sent:
            assert pipe.send(data)
        clock.run(0.03)
        pipe.cut()
        left = pipe.left_behind()
        clock.run(1.0)
        assert heard == sent[: len(heard)]
        assert left == sent[10 - len(left) :]
        assert len(heard) + len(left) <= 10
        amounts.add(len(left))
    assert len(amounts) > 3
