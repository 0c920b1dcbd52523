"""Stories of workers that are lost in mid-stream: the request goes on elsewhere, or is found to be what kills them."""

from __future__ import annotations

import pytest

from brokerkit import (
    CLIENT,
    EPOCH,
    FOUR,
    ONE,
    SECOND,
    THIRD,
    THREE,
    TWO,
    WORKER,
    Core,
    accepted,
    end,
    failure,
    held,
    instance,
    kinds,
    pushed,
    run,
    runs,
    stop,
    stopped,
    tok,
)
from loopmux import codec, wire
from loopmux.messages import Phase
from loopmux.wire import Kind, Message
from loopmux_broker.events import Send, say
from loopmux_broker.requests import State

FOURTH = b"w4"


@pytest.fixture
def core() -> Core:
    """One client, two workers with one slot each for model m."""
    core = Core()
    core.hello()
    core.register()
    core.register(SECOND)
    return core


# --- a stream goes on


def test_a_request_goes_on_behind_its_tokens(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    assert core.lose(WORKER) == [run(ONE, SECOND, attempt=2, prefix=2)]
    assert core.worker(tok(ONE, 2, attempt=2), SECOND) == [pushed(tok(ONE, 2, attempt=2))]
    assert core.worker(end(ONE, 3, attempt=2), SECOND) == [pushed(end(ONE, 3, attempt=2))]
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()
    assert core.counted == {"submitted": 1, "workers_lost": 1, "requeued": 1, "finished": 1}


def test_the_prefix_is_what_the_broker_has_and_not_what_the_client_has(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 1024))
    assert core.worker(tok(ONE, 1024)) == []  # beyond the credit
    assert core.lose(WORKER) == [run(ONE, SECOND, attempt=2, prefix=1025)]
    assert core.worker(tok(ONE, 1025, attempt=2), SECOND) == []
    actions = core.client(say(Kind.CREDIT, ONE, seq=2048, arg=1024))
    assert [a for a in actions if not isinstance(a, Send)] == [
        pushed(tok(ONE, 1024)),
        pushed(tok(ONE, 1025, attempt=2)),
    ]


def test_it_waits_for_a_worker_and_says_so(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.lose(SECOND)
    assert kinds(core.lose(WORKER)) == [(CLIENT, Kind.PHASE)]
    core.now += 1
    assert core.register(THIRD)[1:] == [run(ONE, THIRD, attempt=2, prefix=1, timeout=599.0)]


def test_its_deadline_holds_while_it_waits(core: Core) -> None:
    core.running(timeout=5)
    core.worker(tok(ONE, 0))
    core.lose(SECOND)
    core.lose(WORKER)
    [answer] = core.wait(5)
    assert failure(answer)[:3] == (CLIENT, Kind.ERROR, 1)
    assert failure(answer)[3].code == "deadline"
    assert "while the request waited to go on" in failure(answer)[3].message


def test_it_goes_on_only_where_the_same_weights_are_loaded(core: Core) -> None:
    core.lose(SECOND)
    core.running()
    core.worker(tok(ONE, 0))
    core.register(THIRD, fingerprint="other")
    [phase] = core.lose(WORKER)
    assert isinstance(phase, Send)
    assert "same weights" in codec.unpack(Phase, phase.message.route).detail
    core.submit(TWO)
    assert runs(core.register(SECOND)) == [(SECOND, ONE, 2)]
    assert core.tables.requests[TWO].lease.worker.peer == THIRD  # type: ignore[union-attr]


def test_one_that_has_produced_nothing_goes_anywhere(core: Core) -> None:
    core.lose(SECOND)
    core.running()
    core.register(THIRD, fingerprint="other")
    assert runs(core.lose(WORKER)) == [(THIRD, ONE, 2)]


def test_a_slot_is_free_whichever_of_two_attempts_at_one_worker_ends_last() -> None:
    core = Core()
    core.hello()
    core.register(slots=2)
    core.submit(ONE)
    assert runs(core.worker(tok(ONE, 5))) == [(WORKER, ONE, 2)]
    core.worker(end(ONE, 0, attempt=2))
    assert core.worker(stopped(ONE)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    assert not core.tables.pool.leases


def test_a_hole_in_the_output_is_filled_by_another_worker(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    assert core.worker(tok(ONE, 5)) == [stop(ONE, 3), run(ONE, SECOND, attempt=2, prefix=1)]
    assert core.worker(tok(ONE, 6)) == []
    assert core.counted["gaps"] == 1


def test_an_end_that_does_not_fit_what_arrived(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    assert core.worker(end(ONE, 4)) == [run(ONE, SECOND, attempt=2, prefix=1)]
    assert core.submit(TWO)[0] == run(TWO)  # the first one's slot is free


def test_a_worker_that_does_not_have_what_it_was_given(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    assert runs(core.worker(say(Kind.RESET, ONE, attempt=1))) == [(SECOND, ONE, 2)]


def test_what_comes_to_nothing_with_no_worker_lost_does_not_look_like_a_request_that_kills(core: Core) -> None:
    """It does not run alone for it; but it does not go on for ever either."""
    core.running()
    core.worker(tok(ONE, 0))
    there = WORKER
    for attempt in range(1, 10):
        [(there, _, _)] = runs(core.worker(say(Kind.RESET, ONE, attempt=attempt), there))
    request = core.tables.requests[ONE]
    assert (len(request.lost), request.mishaps, request.alone) == (0, 9, False)
    [answer] = core.worker(say(Kind.RESET, ONE, attempt=10), there)
    assert failure(answer)[:3] == (CLIENT, Kind.ERROR, 1)
    assert (failure(answer)[3].code, failure(answer)[3].retryable) == ("engine", True)
    assert core.counted["mishaps"] == 9
    assert "poisoned" not in core.counted


@pytest.mark.parametrize("wrong", [tok(ONE, 5), end(ONE, 4), say(Kind.RESET, ONE, attempt=1)])
def test_nothing_that_its_worker_survives_is_a_loss(core: Core, wrong: Message) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.worker(wrong)
    assert (len(core.tables.requests[ONE].lost), core.tables.requests[ONE].mishaps) == (0, 1)


def test_whatever_a_lost_worker_says_later_is_fenced(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.wait(3.25, silent=(WORKER,))
    assert core.worker(tok(ONE, 1)) == [Send(WORKER, say(Kind.WHO))]
    core.register(WORKER)
    reset = Send(WORKER, say(Kind.RESET, ONE, attempt=1))
    assert core.worker(tok(ONE, 1)) == [reset]
    assert core.worker(end(ONE, 2)) == [reset]
    assert core.counted["fenced"] == 2


# --- a request that kills


def killed_twice(core: Core, request: bytes = ONE) -> None:
    core.running(request)
    core.worker(tok(request, 0))
    core.lose(WORKER)
    core.worker(say(Kind.RUNACK, request, attempt=2), SECOND)
    core.lose(SECOND)


def test_after_two_losses_it_runs_alone() -> None:
    core = Core()
    core.hello()
    core.register(slots=4)
    core.running(ONE)
    core.register(SECOND, slots=1)
    core.lose(WORKER)
    core.worker(say(Kind.RUNACK, ONE, attempt=2), SECOND)
    core.register(THIRD, slots=4)
    for request in (TWO, THREE):
        core.submit(request)
    on_third = [x.request.id for x in core.tables.pool.workers[THIRD].leases.values()]
    assert on_third == [TWO, THREE]
    core.lose(SECOND)
    assert core.submit(FOUR)[-1] == accepted(FOUR, 1)  # nothing new where it is to run
    assert runs(core.worker(end(TWO, 0), THIRD)) == []
    assert runs(core.worker(end(THREE, 0), THIRD)) == [(THIRD, ONE, 3)]
    core.worker(tok(ONE, 0, attempt=3), THIRD)
    assert core.tables.requests[FOUR].lease is None  # nor beside it
    assert runs(core.worker(end(ONE, 1, attempt=3), THIRD)) == [(THIRD, FOUR, 1)]


def test_a_third_loss_alone_is_its_fault(core: Core) -> None:
    core.register(THIRD)
    killed_twice(core)
    core.worker(say(Kind.RUNACK, ONE, attempt=3), THIRD)
    [answer] = core.lose(THIRD)
    peer, kind, seq, body = failure(answer)
    assert (peer, kind, seq, body.code, body.retryable) == (CLIENT, Kind.ERROR, 1, "worker_lost", False)
    assert "poison" in body.message
    assert core.counted["poisoned"] == 1
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()


def test_workers_that_go_together_are_not_lost_by_the_request(core: Core) -> None:
    """Their launcher was killed: one after the other is found gone, with what was just given to it."""
    core.register(SECOND)
    core.register(THIRD)
    core.running(ONE)
    core.worker(tok(ONE, 0))
    assert runs(core.lose(WORKER)) == [(SECOND, ONE, 2)]
    assert runs(core.lose(SECOND)) == [(THIRD, ONE, 3)]
    assert runs(core.lose(THIRD)) == []
    assert (core.counted["requeued"], core.counted["mishaps"]) == (1, 2)
    assert runs(core.register(FOURTH)) == [(FOURTH, ONE, 4)]
    core.worker(tok(ONE, 1, attempt=4), FOURTH)
    core.worker(end(ONE, 2, attempt=4), FOURTH)
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()


def test_a_worker_that_never_answers_a_second_attempt_is_not_lost_by_it(core: Core) -> None:
    core.running(ONE)
    core.lose(WORKER)
    core.register(THIRD)
    core.register(FOURTH)
    core.wait(5.0)
    assert core.tables.requests[ONE].attempt == 4
    assert len(core.tables.requests[ONE].lost) == 1
    assert not core.tables.requests[ONE].alone


def test_workers_whose_connections_break_again_and_again_are_not_lost_by_what_they_run(core: Core) -> None:
    """Each goes on with what it has, over another connection, and by then another one has it."""
    core.running(ONE)
    names = {WORKER: WORKER, SECOND: SECOND}  # by connection, whose it is
    core.worker(tok(ONE, 0))
    for attempt in range(1, 15):
        [broken] = [peer for peer, worker in core.tables.pool.workers.items() if worker.leases]
        [(other, _, number)] = runs(core.lose(broken))
        assert number == attempt + 1
        core.worker(tok(ONE, attempt, attempt=number), other)
        name = names.pop(broken)
        again = bytes([attempt]) + name
        names[again] = name
        core.register(again, name=name.decode(), boot=instance(name), held=1, introduction=attempt)
        [answer] = held(core, ONE, 0, 5, attempt, again, epoch=EPOCH)
        assert answer == Send(again, say(Kind.RESET, ONE, attempt=attempt))
    request = core.tables.requests[ONE]
    assert (len(request.lost), request.fruitless, request.alone) == (0, 1, False)
    core.worker(end(ONE, 15, attempt=15), other)
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()


def test_a_loss_is_taken_back_once(core: Core) -> None:
    """What it names does not fit, and before it hears of that its connection breaks again; then what it names does."""
    core.lose(SECOND)
    core.running(ONE)
    core.worker(tok(ONE, 0, 5))
    core.lose(WORKER)
    for introduction, produced in ((1, 3), (2, 5)):
        again = bytes([introduction]) + WORKER
        core.register(again, name="w1", boot=instance(WORKER), held=2, introduction=introduction)
        held(core, ONE, 0, produced, worker=again, epoch=EPOCH)
        assert len(core.tables.requests[ONE].lost) == 0
    assert core.tables.requests[ONE].state is State.RUNNING


def test_one_that_comes_back_by_the_same_connection_hung_and_is_lost_by_it(core: Core) -> None:
    core.running(ONE)
    [(_, _, number)] = runs(core.wait(3.0, silent=(WORKER,)))
    core.worker(say(Kind.RUNACK, ONE, attempt=number), SECOND)
    core.register(held=1, introduction=1)
    held(core, ONE, 0, 5, epoch=EPOCH)
    assert len(core.tables.requests[ONE].lost) == 1


def test_who_names_the_number_of_another_one_was_not_lost_with_it(core: Core) -> None:
    """A former broker gave it to another worker, which is here for the first time."""
    core.running(ONE)
    core.lose(WORKER)
    core.register(THIRD, held=1)
    held(core, ONE, 0, 5, worker=THIRD)
    assert len(core.tables.requests[ONE].lost) == 1


def test_its_neighbours_are_not_blamed() -> None:
    """A request that kills every worker it is on takes two others' attempts along, and none of their lives."""
    core = Core()
    core.hello()
    core.register(slots=4)
    for request in (ONE, TWO, THREE):
        core.running(request)
    core.register(SECOND, slots=4)
    core.lose(WORKER)
    core.register(THIRD, slots=4)
    core.register(FOURTH, slots=4)
    for request in (ONE, TWO, THREE):
        core.worker(say(Kind.RUNACK, request, attempt=2), SECOND)
    core.lose(SECOND)  # all three have lost two workers now: each gets one for itself
    alone = [[x.request.id for x in core.tables.pool.workers[w].leases.values()] for w in (THIRD, FOURTH)]
    assert sorted(map(len, alone)) == [1, 1]
    culprit = next(w for w, ids in zip((THIRD, FOURTH), alone, strict=True) if ONE in ids)
    core.worker(say(Kind.RUNACK, ONE, attempt=3), culprit)
    [answer, *_] = core.lose(culprit)
    assert failure(answer)[3].code == "worker_lost"
    other = THIRD if culprit == FOURTH else FOURTH
    for _ in range(2):
        [lease] = core.tables.pool.workers[other].leases.values()
        core.worker(end(lease.request.id, 0, attempt=lease.attempt), other)
    assert core.counted["finished"] == 2
    assert core.counted["poisoned"] == 1


def test_cancelled_while_a_worker_is_emptied_for_it(core: Core) -> None:
    core.register(THIRD)
    core.running(TWO)
    core.submit(THREE)  # on SECOND
    core.submit(FOUR)  # on THIRD
    request = core.tables.requests[TWO]
    request.lost[0] = b"gone"
    core.lose(WORKER)
    assert request.alone
    assert request.held_by is not None
    emptied = request.held_by.peer
    core.submit(ONE)
    core.client(say(Kind.CANCEL, TWO))
    running = THREE if emptied == SECOND else FOUR
    assert runs(core.worker(end(running, 0), emptied)) == [(emptied, ONE, 1)]


def test_the_worker_that_is_emptied_for_it_dies(core: Core) -> None:
    core.running(TWO)
    core.submit(THREE)  # on SECOND
    core.tables.requests[TWO].lost[0] = b"gone"
    core.lose(WORKER)
    core.tables.requests[THREE].lost[0] = b"gone"
    core.lose(SECOND)
    first = runs(core.register(THIRD))
    assert [x[1] for x in first] == [TWO]
    assert [x[1] for x in runs(core.worker(end(TWO, 0, attempt=2), THIRD))] == [THREE]


# --- leaving in good order


def test_a_worker_that_is_about_to_leave_gets_nothing_new(core: Core) -> None:
    core.lose(SECOND)
    core.worker(say(Kind.DRAIN, arg=2000))
    assert core.submit(ONE)[0] == accepted(ONE, 1)
    assert runs(core.register(SECOND)) == [(SECOND, ONE, 1)]


def test_what_ends_in_time_ends_there(core: Core) -> None:
    core.running()
    core.worker(say(Kind.DRAIN, arg=2000))
    core.worker(tok(ONE, 0))
    assert core.worker(end(ONE, 1)) == [pushed(end(ONE, 1))]
    assert core.wait(2) == [pushed(end(ONE, 1))] * 2


def test_what_does_not_end_in_time_goes_on_elsewhere_and_that_is_no_loss(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.worker(say(Kind.DRAIN, arg=2000))
    assert core.wait(0.75) == []
    core.worker(tok(ONE, 1))
    assert core.wait(0.25) == [stop(ONE, 3), run(ONE, SECOND, attempt=2, prefix=2, timeout=599.0)]
    assert core.worker(stopped(ONE, 3)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    assert len(core.tables.requests[ONE].lost) == 0
    assert core.counted["migrated"] == 1
    assert "requeued" not in core.counted


def test_a_leaving_worker_that_took_its_time_may_be_hurried(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.worker(say(Kind.DRAIN, arg=240_000))
    assert core.wait(5) == []
    core.worker(say(Kind.DRAIN, arg=2000))
    assert core.wait(0.75) == []
    assert core.wait(0.25) == [stop(ONE, 3), run(ONE, SECOND, attempt=2, prefix=1, timeout=594.0)]


def test_a_leaving_worker_that_comes_over_a_new_connection_is_still_leaving(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.worker(say(Kind.DRAIN, arg=2000))
    core.register(THIRD, name=WORKER.decode(), boot=instance(WORKER), held=1)
    held(core, ONE, 0, 1, worker=THIRD)
    core.worker(say(Kind.DRAIN, arg=2000), THIRD)
    core.lose(WORKER)
    assert core.wait(0.75) == []
    assert core.wait(0.25) == [
        stop(ONE, 3, peer=THIRD),
        run(ONE, SECOND, attempt=2, prefix=1, timeout=599.0),
    ]


def test_a_worker_that_leaves_with_work_hands_it_over(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    assert core.worker(say(Kind.BYE)) == [run(ONE, SECOND, attempt=2, prefix=1)]
    assert len(core.tables.requests[ONE].lost) == 0


def test_migrations_are_not_counted_however_many(core: Core) -> None:
    core.running()
    peers = [SECOND]
    core.worker(say(Kind.BYE))
    for n in range(6):
        fresh = f"x{n}".encode()
        core.register(fresh)
        core.worker(say(Kind.RUNACK, ONE, attempt=n + 2), peers[-1])
        assert runs(core.worker(say(Kind.BYE), peers[-1])) == [(fresh, ONE, n + 3)]
        peers.append(fresh)


def test_draining_is_shown(core: Core) -> None:
    core.worker(say(Kind.DRAIN, arg=2000))
    [report] = core.client(Message(wire.Header(Kind.STATUS, TWO)))
    assert b"draining" in report.message.body  # type: ignore[union-attr]


def test_models_that_their_launcher_took_back_go_with_the_last_worker(core: Core) -> None:
    core.launcher()
    core.declare("m", "ready")
    core.running()
    core.worker(tok(ONE, 0))
    core.worker(say(Kind.BYE), SECOND)
    core.worker(say(Kind.BYE), b"l1")
    actions = core.worker(say(Kind.BYE))
    assert failure(actions[-1])[:3] == (CLIENT, Kind.ERROR, 1)
    assert failure(actions[-1])[3].code == "model_not_found"


# --- the broker's own absence


def test_three_sleeps_of_the_broker_do_not_look_like_a_request_that_kills(core: Core) -> None:
    """Each time its worker took the broker for dead, closed the connection and came back over another one."""
    core.running()
    peer = WORKER
    for n in range(3):
        core.worker(tok(ONE, n), peer)
        core.sleep()
        assert core.lose(peer) == []
        peer = b"w1" + b"'" * (n + 1)
        core.register(peer, name="w1", boot=instance(WORKER), held=1, introduction=n + 1)
        assert kinds(held(core, ONE, 0, n + 1, worker=peer)) == [(peer, Kind.REPLAY)]
    core.worker(end(ONE, 3), peer)
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()
    assert core.counted == {"submitted": 1, "stalls": 3, "finished": 1}


def test_who_took_the_broker_for_dead_gets_nothing_new_before_it_is_back(core: Core) -> None:
    core.lose(SECOND)
    core.sleep()
    core.lose(WORKER)
    assert runs(core.submit(ONE)) == []
    assert runs(core.register(b"w1'", name="w1", boot=instance(WORKER), introduction=1)) == [(b"w1'", ONE, 1)]


def test_who_does_not_come_back_is_lost_and_not_by_its_request(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.sleep()
    core.lose(WORKER)
    assert core.wait(2.75, silent=(WORKER,)) == []
    assert core.wait(0.5, silent=(WORKER,)) == [run(ONE, SECOND, attempt=2, prefix=1, timeout=592.0)]
    assert core.counted == {"submitted": 1, "stalls": 1, "workers_lost": 1, "mishaps": 1}


def test_run_is_not_given_up_while_its_worker_is_on_the_way_back(core: Core) -> None:
    core.submit(ONE)
    core.sleep()
    core.lose(WORKER)
    assert {attempt for _, _, attempt in runs(core.wait(2.5, silent=(WORKER,)))} == {1}
    core.register(b"w1'", name="w1", boot=instance(WORKER), introduction=1)
    assert runs(core.wait(1)) == [(b"w1'", ONE, 1)]
    core.worker(say(Kind.RUNACK, ONE, attempt=1), b"w1'")
    assert core.wait(5) == []


def test_a_worker_that_is_emptied_for_a_request_may_take_the_broker_for_dead(core: Core) -> None:
    core.running(ONE)
    core.lose(WORKER)
    core.worker(say(Kind.RUNACK, ONE, attempt=2), SECOND)
    core.register(THIRD)
    core.running(TWO, worker=THIRD)
    core.lose(SECOND)
    assert core.tables.requests[ONE].alone
    core.sleep()
    core.lose(THIRD)
    assert core.register(b"w3'", name="w3", boot=instance(THIRD), introduction=1, held=1)[1:] == []
    held(core, TWO, 0, 0, worker=b"w3'")
    assert runs(core.worker(end(TWO, 0), b"w3'")) == [(b"w3'", ONE, 3)]


def test_a_connection_that_is_closed_later_is_a_loss_as_ever(core: Core) -> None:
    core.running()
    core.sleep()
    core.wait(3.25)
    assert runs(core.lose(WORKER)) == [(SECOND, ONE, 2)]


def test_a_connection_that_was_made_after_the_sleep_counts_at_once(core: Core) -> None:
    core.running(ONE)
    core.running(TWO, worker=SECOND)
    core.sleep()
    core.register(THIRD)
    core.running(THREE, worker=THIRD)
    core.lose(THIRD)
    assert core.counted["requeued"] == 1


def test_a_worker_that_has_answered_since_is_lost_as_ever(core: Core) -> None:
    core.sleep()
    core.now += 0.1
    core.running()
    assert runs(core.lose(WORKER)) == [(SECOND, ONE, 2)]
    assert core.counted["requeued"] == 1


def test_a_client_that_took_the_broker_for_dead_has_the_time_to_come_back(core: Core) -> None:
    core.running()
    core.sleep()
    assert core.lose(CLIENT) == []
    assert core.wait(2.75, silent=(CLIENT,)) == []  # longer than who is lost has
    core.hello(b"c1'", instance(CLIENT), introduction=1)
    core.client(say(Kind.CREDIT, ONE, seq=8), b"c1'")
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0), b"c1'")]
    core.sleep()
    core.lose(b"c1'")
    assert "clients_lost" not in core.counted
    core.wait(3.5, silent=(b"c1'",))
    assert core.counted["clients_lost"] == 1
