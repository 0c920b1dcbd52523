"""Client, broker, worker and launcher cores together: one story each. What holds in all of them, ``promise`` watches."""

from __future__ import annotations

from loopmux.errors import (
    CancelledError,
    ConnectionLostError,
    DeadlineExceededError,
    EngineError,
    LoopmuxError,
    WorkerLostError,
)
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux.results import Result
from loopmux_launcher.groups import Group
from simulation.client import Call, plain_call, scripted_call
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


def test_a_worker_lost_later_gives_the_text_so_far() -> None:
    world = settled_world(rate=50)
    call = ask(world, 400)
    world.run(2.0)
    harm(world, "kill worker")
    the_busy_one(world).die()
    world.run(2.0)
    assert outcome(call, WorkerLostError).retryable
    assert call.tokens
    world.run(5.0)
    assert len(world.workers) == 2
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
    harm(world, "snap worker")
    world.broker.snap(the_busy_one(world).line, 0.0, 0.0)
    world.run(9.0)
    outcome(call, WorkerLostError)
    again = [ask(world, 4) for _ in range(8)]
    world.run(5.0)
    assert all(outcome(call) for call in again)
    at_rest(world)


def test_a_restarted_broker_is_noticed_by_all() -> None:
    world = settled_world(rate=50, first_delay=0.5)
    begun = ask(world, 400)
    world.run(1.5)
    fresh = ask(world, 10, client=1)
    world.run(0.1)
    harm(world, "kill broker")
    world.broker.die()
    world.clock.after(0.1, world.broker.start)
    world.run(10.0)
    outcome(begun, ConnectionLostError)
    outcome(fresh)
    at_rest(world)


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
