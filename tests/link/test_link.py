"""Client, broker, worker and launcher cores together, on pretend links."""

from __future__ import annotations

import random

import pytest

from link.world import Story, World
from loopmux.errors import (
    CancelledError,
    DeadlineExceededError,
    EngineError,
    LoopmuxError,
    OverloadedError,
    WorkerLostError,
)
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux.results import Result
from loopmux_broker.config import BrokerConfig
from loopmux_launcher.groups import Group
from loopmux_worker.engine.echo import echo_text, echo_token

SEEDS = range(60)
"""Storms in a test run; each takes about a third of a second."""


def echo_group(processes: int = 2, slots: int = 4, **echo: float) -> Group:
    echo = {"tokens": 10_000, **echo}  # let max_new_tokens decide
    spec = WorkerSpec("", "sim://", (ModelSpec("echo"),), engine="echo", slots=slots, echo=echo)
    return Group("echo", None, spec, processes, start_timeout=60.0)


def settled_world(seed: int = 0, clients: int = 2, **echo: float) -> World:
    world = World(seed, [echo_group(**echo)], clients)
    world.run(1.0)
    assert len(world.workers) == 2
    return world


def check(story: Story) -> LoopmuxError | Result:
    """What is promised of every request: exact tokens, or a prefix of them and one error, one end, in time."""
    assert len(story.outcomes) == 1
    (outcome,) = story.outcomes
    assert story.tokens == [echo_token(story.id, i) for i in range(len(story.tokens))]
    assert story.text == "".join(map(echo_text, story.tokens))
    assert story.ended <= story.deadline + 2.0
    if isinstance(outcome, Result):
        assert list(outcome.token_ids) == story.tokens
        assert outcome.usage.completion_tokens == len(story.tokens)
    else:
        assert outcome.partial_text == story.text
    return outcome


def assert_nothing_is_left(world: World) -> None:
    tables = world.broker.core.tables
    assert not tables.requests
    assert not tables.pool.leases
    assert tables.queues.length == 0
    assert tables.admission.output == 0
    for worker in world.workers:
        assert worker.core.requests == 0
        assert worker.engine.load().running == 0


def test_a_generation_comes_whole() -> None:
    world = settled_world()
    story = world.clients[0].submit(max_new_tokens=40)
    world.run(5.0)
    outcome = check(story)
    assert isinstance(outcome, Result)
    assert (outcome.finish_reason, outcome.attempts, len(story.tokens)) == ("length", 1, 40)
    assert_nothing_is_left(world)


def test_more_requests_than_slots_all_finish() -> None:
    world = settled_world()
    stories = [client.submit(max_new_tokens=50) for client in world.clients for _ in range(20)]
    world.run(20.0)
    assert all(isinstance(check(s), Result) for s in stories)
    assert {w.engine.load().progress for w in world.workers} != {0}
    assert_nothing_is_left(world)


def test_a_request_longer_than_the_credit_window_flows_on() -> None:
    world = settled_world()
    story = world.clients[0].submit(max_new_tokens=5_000)
    world.run(25.0)
    assert isinstance(check(story), Result)
    assert len(story.tokens) == 5_000


def test_a_worker_lost_before_the_first_token_is_replaced_unseen() -> None:
    world = settled_world(first_delay=0.5)
    story = world.clients[0].submit(max_new_tokens=10)
    world.run(0.2)
    (busy,) = [w for w in world.workers if w.engine.load().running]
    world.launcher.kill(busy)
    world.run(5.0)
    outcome = check(story)
    assert isinstance(outcome, Result)
    assert outcome.attempts == 2
    assert_nothing_is_left(world)


def test_a_worker_lost_later_is_replaced_unseen_too() -> None:
    world = settled_world(rate=50)
    story = world.clients[0].submit(max_new_tokens=150)
    world.run(2.0)
    (busy,) = [w for w in world.workers if w.engine.load().running]
    begun = len(story.tokens)
    assert begun
    world.launcher.kill(busy)
    world.run(8.0)
    outcome = check(story)
    assert isinstance(outcome, Result)
    assert (outcome.attempts, len(story.tokens)) == (2, 150)
    assert len(world.workers) == 2
    assert_nothing_is_left(world)


def test_a_request_that_kills_its_workers_is_found_out() -> None:
    world = World(0, [echo_group(processes=4, rate=50)])
    world.run(1.0)
    story = world.clients[0].submit(max_new_tokens=400)
    for _ in range(3):
        world.run(0.5)
        (busy,) = [w for w in world.workers if w.engine.load().running]
        world.launcher.kill(busy)
    world.run(2.0)
    outcome = check(story)
    assert isinstance(outcome, WorkerLostError)
    assert "poison" in outcome.message
    assert not outcome.retryable
    assert story.tokens
    world.run(5.0)
    assert_nothing_is_left(world)


def test_a_worker_that_is_stopped_in_good_order_is_not_noticed() -> None:
    world = settled_world(rate=50)
    stories = [client.submit(max_new_tokens=400) for client in world.clients]
    world.run(2.0)
    (busy, *_) = [w for w in world.workers if w.engine.load().running]
    busy.stop()
    world.run(3.0)
    assert not busy.alive
    world.run(8.0)
    assert all(isinstance(check(s), Result) for s in stories)
    assert world.broker.core.tables.counters["migrated"] == 1
    assert_nothing_is_left(world)


def test_a_client_whose_connection_breaks_goes_on_where_it_was() -> None:
    world = settled_world(rate=50)
    story = world.clients[0].submit(max_new_tokens=100)
    world.run(1.0)
    world.clients[0].break_line()
    world.run(9.0)
    assert isinstance(check(story), Result)
    assert_nothing_is_left(world)


def test_a_worker_whose_connection_breaks_is_a_lost_worker_to_its_requests_and_serves_on() -> None:
    world = settled_world(rate=50)
    story = world.clients[0].submit(max_new_tokens=100)
    world.run(1.0)
    (busy,) = [w for w in world.workers if w.engine.load().running]
    busy.break_line()
    world.run(9.0)
    outcome = check(story)
    assert isinstance(outcome, Result)
    assert outcome.attempts == 2
    again = [world.clients[0].submit(max_new_tokens=4) for _ in range(8)]
    world.run(5.0)
    assert all(isinstance(check(s), Result) for s in again)
    assert_nothing_is_left(world)


@pytest.mark.parametrize("away", [0.02, 0.3, 4.0])
def test_a_restarted_broker_is_not_noticed(away: float) -> None:
    world = settled_world(rate=50, first_delay=0.5)
    begun = [client.submit(max_new_tokens=400) for client in world.clients for _ in range(3)]
    world.run(1.5)
    fresh = world.clients[1].submit(max_new_tokens=10)
    assert all(s.tokens for s in begun)
    world.run(0.1)
    world.restart_broker(away)
    world.run(15.0)
    outcomes = [check(s) for s in (*begun, fresh)]
    assert all(isinstance(o, Result) for o in outcomes)
    assert [o.attempts for o in outcomes[:6]] == [1] * 6, "their workers went on meanwhile"
    assert world.broker.core.tables.counters["recovered"] == 7
    assert_nothing_is_left(world)


def test_a_restart_with_a_full_queue_loses_nobody() -> None:
    world = settled_world(rate=200)
    stories = [client.submit(max_new_tokens=50) for client in world.clients for _ in range(30)]
    world.run(0.3)
    world.restart_broker(0.1)
    world.run(10.0)
    assert all(isinstance(check(s), Result) for s in stories)
    assert_nothing_is_left(world)


def test_broker_and_worker_killed_together_lose_only_what_the_client_has_not_received() -> None:
    world = settled_world(rate=50)
    story = world.clients[0].submit(max_new_tokens=150)
    world.run(2.0)
    (busy,) = [w for w in world.workers if w.engine.load().running]
    world.broker.kill()
    world.launcher.kill(busy)
    world.restart_broker(0.1)
    world.run(9.0)
    outcome = check(story)
    assert isinstance(outcome, Result)
    assert outcome.attempts == 2
    assert_nothing_is_left(world)


def test_what_nobody_claims_after_a_restart_is_stopped() -> None:
    world = settled_world(rate=50)
    world.clients[0].submit(max_new_tokens=100_000, timeout=300.0)
    world.run(1.0)
    world.broker.kill()
    world.clients[0].alive = False
    world.restart_broker(0.1)
    world.run(29.0)
    assert sum(w.engine.load().running for w in world.workers) == 1
    world.run(3.0)
    assert_nothing_is_left(world)


def test_a_cancel_reaches_the_worker_through_a_new_broker() -> None:
    world = settled_world(rate=50)
    story = world.clients[0].submit(max_new_tokens=10_000, timeout=300.0)
    world.run(1.0)
    world.broker.kill()
    world.clients[0].cancel(story)
    world.restart_broker(0.1)
    world.run(3.0)
    assert isinstance(check(story), CancelledError)
    assert sum(w.engine.load().running for w in world.workers) == 0
    world.run(60.0)
    assert_nothing_is_left(world)


def test_a_cancelled_request_stops_in_the_engine() -> None:
    world = settled_world(rate=50)
    story = world.clients[0].submit(max_new_tokens=10_000, timeout=300.0)
    world.run(1.0)
    world.clients[0].cancel(story)
    world.run(0.2)
    assert isinstance(check(story), CancelledError)
    assert sum(w.engine.load().running for w in world.workers) == 0


def test_deadlines_hold_in_the_queue_and_in_mid_stream() -> None:
    world = World(0, [echo_group(processes=1, slots=1, rate=10)])
    world.run(1.0)
    running = world.clients[0].submit(max_new_tokens=1_000, timeout=2.0)
    world.run(0.1)
    queued = world.clients[1].submit(timeout=1.0)
    world.run(5.0)
    assert isinstance(check(running), DeadlineExceededError)
    assert isinstance(check(queued), DeadlineExceededError)
    assert running.tokens
    assert not queued.tokens
    assert_nothing_is_left(world)


def test_an_engine_that_fails_one_request_goes_on_with_the_others() -> None:
    world = settled_world(fail_after=20)
    long, short = world.clients[0].submit(max_new_tokens=50), world.clients[0].submit(max_new_tokens=10)
    world.run(5.0)
    assert isinstance(check(long), EngineError)
    assert isinstance(check(short), Result)


def test_a_client_that_dies_leaves_nothing_running() -> None:
    world = settled_world(rate=50)
    for _ in range(6):
        world.clients[0].submit(max_new_tokens=10_000, timeout=300.0)
    world.run(1.0)
    client = world.clients[0]
    client.alive = False
    world.broker.lose(client.line)
    world.run(5.0)
    assert_nothing_is_left(world)


@pytest.mark.parametrize("seed", SEEDS)
def test_storm(seed: int) -> None:
    """Everything at once, at random: whatever happens, each request ends once, exact and in time."""
    config = BrokerConfig(window=64)
    world = World(seed, [echo_group(processes=3, rate=100)], clients=3, config=config)
    dice = random.Random(seed)
    stories: list[Story] = []
    for _ in range(60):
        world.run(dice.uniform(0.0, 0.4))
        client = dice.choice(world.clients)
        match dice.choices(
            ("submit", "cancel", "kill", "break client", "break worker", "restart"), (20, 3, 2, 2, 2, 1)
        )[0]:
            case "submit":
                stories.append(client.submit(timeout=dice.uniform(1, 20), max_new_tokens=dice.randint(1, 300)))
            case "cancel" if client.stories:
                client.cancel(dice.choice(list(client.stories.values())))
            case "kill" if world.workers:
                world.launcher.kill(dice.choice(world.workers))
            case "break client":
                client.break_line()
            case "break worker" if world.workers:
                dice.choice(world.workers).break_line()
            case "restart" if world.broker.alive:
                world.restart_broker(dice.uniform(0.01, 0.3))
    world.run(90.0)
    outcomes = [check(story) for story in stories]
    assert all(not isinstance(o, OverloadedError) for o in outcomes)
    assert any(isinstance(o, Result) for o in outcomes)
    assert_nothing_is_left(world)
