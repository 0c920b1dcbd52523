"""Stories of the two clocks of a worker: whether it answers, and whether its engine gets on."""

from __future__ import annotations

import random

import pytest

from brokerkit import (
    BODY,
    CLIENT,
    LAUNCHER,
    ONE,
    OTHER,
    SECOND,
    TWO,
    WORKER,
    Core,
    end,
    held,
    instance,
    kinds,
    pushed,
    run,
    stop,
    tok,
)
from loopmux import codec, messages
from loopmux.messages import Heartbeat, Held
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import LoopStalled, Send, TimerDue, say
from loopmux_broker.pool import Lease
from loopmux_broker.stalls import Stall


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    core.register()
    core.register(SECOND)
    return core


def beat(progress: int) -> Message:
    return Message(Header(Kind.HB, seq=progress), route=codec.pack(Heartbeat(running=1)))


def test_an_engine_that_stands_still_while_its_worker_answers(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    assert core.wait(14.75) == []
    assert core.wait(0.25) == [Send(WORKER, say(Kind.DIE)), run(ONE, SECOND, attempt=2, prefix=1, timeout=585.0)]
    assert core.worker(tok(ONE, 1)) == [Send(WORKER, say(Kind.WHO))]
    assert core.counted["stalled"] == 1


def test_a_prefill_may_take_longer_than_a_token(core: Core) -> None:
    core.running()
    assert core.wait(59.75) == []
    assert core.wait(0.25)[0] == Send(WORKER, say(Kind.DIE))


def test_a_long_prompt_longer_still(core: Core) -> None:
    core.running(prompt_size=10_000)
    assert core.wait(199.75) == []
    assert core.wait(0.25)[0] == Send(WORKER, say(Kind.DIE))


def test_and_so_is_what_another_worker_produced(core: Core) -> None:
    core.running(max_new_tokens=5_000)
    core.worker(tok(ONE, 0, 4_000))
    core.lose(WORKER)
    core.worker(say(Kind.RUNACK, ONE, attempt=2), SECOND)
    assert core.wait(319.75) == []
    assert core.wait(0.25)[0] == Send(SECOND, say(Kind.DIE))


def test_slow_but_moving_is_not_hung(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    for progress in range(1, 40):
        core.wait(14)
        assert core.worker(beat(progress)) == [Send(WORKER, say(Kind.PONG))]
    assert "stalled" not in core.counted


def prefilling_beside_a_stream() -> Core:
    """One worker decodes ONE and has just been given TWO."""
    core = Core()
    core.hello()
    core.register(slots=2)
    core.running()
    core.worker(tok(ONE, 0))
    core.running(TWO)
    return core


def test_another_request_s_prefill_is_waited_for_too() -> None:
    core = prefilling_beside_a_stream()
    assert core.wait(59.75) == []
    assert core.wait(0.25)[0] == Send(WORKER, say(Kind.DIE))


def test_and_with_its_end_the_time_of_the_others_begins() -> None:
    core = prefilling_beside_a_stream()
    assert core.wait(50) == []
    core.worker(end(TWO, 0))
    assert Send(WORKER, say(Kind.DIE)) not in core.wait(14.75)
    assert Send(WORKER, say(Kind.DIE)) in core.wait(0.25)


def test_what_a_dispatch_costs_does_not_grow_with_what_the_worker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    core.hello()
    core.register(slots=100)
    looked: list[Lease] = []
    budget = Stall.budget
    monkeypatch.setattr(Stall, "budget", lambda stall, lease: looked.append(lease) or budget(stall, lease))
    for number in range(100):
        core.running(bytes([number]) * 16)
        core.worker(tok(bytes([number]) * 16, 0))
    assert looked == []


def test_an_idle_engine_moves_nothing_and_is_not_hung(core: Core) -> None:
    core.lose(SECOND)
    core.running()
    core.worker(end(ONE, 0))
    core.client(say(Kind.ENDACK, ONE))
    core.wait(3600)
    core.running(TWO)
    assert core.wait(59.75) == []
    assert core.worker(tok(TWO, 0)) == [pushed(tok(TWO, 0))]


def test_the_broker_s_own_absence_is_no_stall(core: Core) -> None:
    core.running(timeout=1e4)
    core.worker(tok(ONE, 0))
    core.wait(10)
    core.now += 600 - 12
    core.handle(LoopStalled(600 - 12))
    core.keep_alive(())
    core.handle(TimerDue())
    assert core.wait(4.75) == []
    assert core.wait(0.25)[0] == Send(WORKER, say(Kind.DIE))


def prefill_ends_well(seed: int) -> None:
    """One long prefill: the engine stands still for as long as a slow machine needs, heartbeats come when they can."""
    dice = random.Random(seed)
    core = Core()
    core.hello()
    core.register()
    size = int(10 ** dice.uniform(1, 5.2))
    needs = dice.uniform(0.1, 0.98) * max(60.0, 0.02 * size)
    core.running(ONE, prompt_size=size, timeout=1e6)
    over, hears, pings = core.now + needs, core.now, core.now
    while core.now < over:
        due = core.broker.next_timer()
        core.now = min(over, hears, pings, *([due] if due is not None else []))
        if dice.random() < 0.02:  # the broker itself is stopped, or its machine sleeps
            gap = dice.uniform(2.1, 120)
            core.now += gap
            over, hears, pings = over + gap * dice.random(), core.now, core.now
            core.handle(LoopStalled(gap))
        if core.now >= hears:
            core.worker(beat(7))
            hears = core.now + dice.uniform(0.2, 2.9)  # a computing process answers late
        if core.now >= pings:
            core.client(say(Kind.PING))
            pings = core.now + 1.0
        core.handle(TimerDue())
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]
    assert core.worker(end(ONE, 1)) == [pushed(end(ONE, 1))]
    assert not {"workers_lost", "stalled", "requeued"} & set(core.counted), (seed, core.counted)


@pytest.mark.parametrize("block", range(10))
def test_no_false_death_in_a_thousand_long_prefills(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        prefill_ends_well(seed)


def test_nobody_is_found_dead_for_a_gap_and_everybody_for_silence_after_it(core: Core) -> None:
    core.launcher()
    core.now += 500
    core.handle(LoopStalled(500.0))
    assert core.handle(TimerDue()) == []
    assert set(core.tables.pool.workers) == {WORKER, SECOND}
    assert set(core.tables.pool.launchers) == {LAUNCHER}
    assert core.tables.clients.by_peer[CLIENT].peer == CLIENT
    core.now += 3.01
    core.handle(TimerDue())
    assert core.tables.pool.workers == {}


def test_a_stalled_worker_s_restart_gets_work_again(core: Core) -> None:
    core.lose(SECOND)
    core.running()
    core.worker(tok(ONE, 0))
    core.wait(15)
    assert core.register(WORKER, boot=b"n" * 16)[-1] == run(ONE, attempt=2, prefix=1, timeout=585.0)
    assert codec.unpack(messages.Generate, BODY, codec.BODY_LIMITS).prompt == "hello"


def test_what_a_restarted_broker_does_not_know_yet_is_no_stall_of_who_has_it() -> None:
    core = Core()
    core.hello()
    core.register(slots=2, held=1)
    core.worker(Message(Header(Kind.HELD, ONE, 0, 5, 1), codec.pack(Held(instance(OTHER), "m"))))
    core.running(TWO)
    assert core.handle(TimerDue()) == []
    assert core.worker(tok(TWO, 0)) == [pushed(tok(TWO, 0))]


def test_a_worker_that_hangs_with_what_nobody_claims_is_lost(core: Core) -> None:
    core.register(held=1)
    core.worker(Message(Header(Kind.HELD, ONE, 0, 5, 1), codec.pack(Held(instance(OTHER), "m"))))
    assert core.wait(30)[-1] == stop(ONE, 1)
    said = [action for action in core.wait(60.5) if action != stop(ONE, 1)]
    assert said == [Send(WORKER, say(Kind.DIE))]


def test_what_a_worker_is_still_to_stop_is_waited_for_as_before() -> None:
    """Its request has gone on elsewhere; what it produces there says nothing about the prompt that is read here."""
    core = Core()
    core.hello()
    core.register(slots=2)
    core.running(ONE)
    core.running(TWO)
    core.register(SECOND)
    core.worker(tok(ONE, 5))  # output with a hole
    core.worker(tok(ONE, 0, attempt=2), SECOND)
    core.worker(end(ONE, 1, attempt=2), SECOND)
    core.client(say(Kind.ENDACK, ONE))
    core.worker(tok(TWO, 0))
    assert Send(WORKER, say(Kind.DIE)) not in core.wait(59.75)
    assert Send(WORKER, say(Kind.DIE)) in core.wait(0.25)


def test_registering_again_gives_a_hung_engine_no_more_time(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    for n in range(1, 15):  # over a connection that breaks every second
        core.wait(1)
        peer = b"w1 again %d" % n
        core.register(peer, name="w1", boot=instance(WORKER), held=1)
        held(core, ONE, 0, 1, worker=peer)
    assert (peer, Kind.DIE) in kinds(core.wait(1.25))
