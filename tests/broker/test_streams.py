"""Stories of output on its way to clients: credit, full pipes, reconnections, clients that do not read or go away."""

from __future__ import annotations

from typing import Any

import pytest

from brokerkit import (
    BODY,
    CLIENT,
    EPOCH,
    ONE,
    OTHER,
    TWO,
    WORKER,
    Core,
    accepted,
    end,
    failure,
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
from loopmux.messages import Submit, Welcome
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import Action, Push, PushBlocked, Send, TimerDue, say

AGAIN = b"c1'"


@pytest.fixture
def core() -> Core:
    core = Core(window=8)
    core.hello()
    core.register(slots=4)
    return core


def credit(request: bytes, limit: int, received: int) -> Message:
    return say(Kind.CREDIT, request, seq=limit, arg=received)


def starts(actions: list[Action]) -> list[int]:
    return [a.seq for a in actions if isinstance(a, Push)]


# --- credit


def test_nothing_is_pushed_beyond_the_credit(core: Core) -> None:
    core.running()
    assert starts(core.worker(tok(ONE, 0, 6))) == [0]
    assert starts(core.worker(tok(ONE, 6, 2))) == [6]
    assert core.worker(tok(ONE, 8)) == []
    assert core.worker(tok(ONE, 9)) == []
    assert starts(core.client(credit(ONE, 9, 8))) == [8]
    assert starts(core.client(credit(ONE, 10, 9))) == [9]


def test_a_terminal_waits_for_the_tokens_before_it(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 8))
    core.worker(tok(ONE, 8))
    assert core.worker(end(ONE, 9)) == []
    assert core.wait(2) == []
    actions = core.client(credit(ONE, 16, 8))
    assert actions == [pushed(tok(ONE, 8)), pushed(end(ONE, 9))]


def test_a_repeated_credit_changes_nothing_but_asks_for_what_is_missing(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 4))
    core.worker(tok(ONE, 4, 2))
    assert core.client(credit(ONE, 12, 4)) == [Send(WORKER, say(Kind.TOKACK, ONE, seq=4, arg=4, attempt=1))]
    assert core.client(credit(ONE, 12, 4)) == [pushed(tok(ONE, 4, 2))]


def test_credit_never_shrinks(core: Core) -> None:
    core.running()
    core.client(credit(ONE, 100, 0))
    core.client(credit(ONE, 4, 0))
    assert starts(core.worker(tok(ONE, 0, 50))) == [0]


def test_a_chunk_larger_than_the_window_still_arrives(core: Core) -> None:
    core.running()
    assert starts(core.worker(tok(ONE, 0, 20))) == [0]
    assert core.worker(tok(ONE, 20, 20)) == []
    assert starts(core.client(credit(ONE, 28, 20))) == [20]


def test_a_chunk_across_the_end_of_the_window_goes_alone(core: Core) -> None:
    core.running()
    assert starts(core.worker(tok(ONE, 0, 6))) == [0]
    assert starts(core.worker(tok(ONE, 6, 6))) == []
    assert starts(core.client(credit(ONE, 8, 6))) == [6]


def test_acknowledging_what_was_never_sent_is_a_strike(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    [answer] = core.client(credit(ONE, 100, 3))
    assert failure(answer)[:2] == (CLIENT, Kind.ERROR)
    assert failure(answer)[3].code == "protocol"


def test_bodies_go_when_acknowledged_but_token_ids_stay(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 4))
    core.worker(tok(ONE, 4, 2))
    output = core.tables.requests[ONE].output
    held = output.held
    core.client(credit(ONE, 12, 4))
    assert [c.seq for c in output.chunks] == [4]
    assert 0 < output.held < held
    assert core.tables.admission.output == output.held
    assert wire.unpack_tokens(bytes(output.ids)) == [0, 1, 2, 3, 4, 5]


def test_a_credit_for_an_unknown_request_asks_for_all_there_is_of_it(core: Core) -> None:
    assert core.client(credit(ONE, 30, 17)) == [Send(CLIENT, say(Kind.WHO, ONE))]


# --- a full pipe


def test_a_full_pipe_is_tried_again(core: Core) -> None:
    core.running(ONE)
    core.running(TWO)
    core.worker(tok(ONE, 0))
    assert core.handle(PushBlocked(CLIENT, ONE, 0)) == []
    assert core.worker(tok(ONE, 1)) == []
    assert core.worker(tok(TWO, 0)) == []
    assert core.broker.next_timer() == pytest.approx(core.now + 0.01)
    core.now += 0.01
    assert core.handle(TimerDue()) == [pushed(tok(ONE, 0)), pushed(tok(ONE, 1)), pushed(tok(TWO, 0))]


def test_a_pipe_that_stays_full(core: Core) -> None:
    core.running(ONE)
    core.worker(tok(ONE, 0))
    core.worker(end(ONE, 1))
    core.handle(PushBlocked(CLIENT, ONE, 0))
    core.handle(PushBlocked(CLIENT, ONE, 1))
    for _ in range(3):
        core.now += 0.01
        assert core.handle(TimerDue()) == [pushed(tok(ONE, 0)), pushed(end(ONE, 1))]
        core.handle(PushBlocked(CLIENT, ONE, 0))
        core.handle(PushBlocked(CLIENT, ONE, 1))
    core.now += 0.01
    assert core.handle(TimerDue()) == [pushed(tok(ONE, 0)), pushed(end(ONE, 1))]
    assert core.client(say(Kind.ENDACK, ONE)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    core.assert_empty()


def test_a_full_pipe_of_one_client_does_not_stop_another(core: Core) -> None:
    core.hello(OTHER)
    core.running(ONE)
    core.running(TWO, OTHER)
    core.worker(tok(ONE, 0))
    core.handle(PushBlocked(CLIENT, ONE, 0))
    assert core.worker(tok(TWO, 0)) == [pushed(tok(TWO, 0), OTHER)]


def test_many_streams_behind_a_full_pipe_are_tried_in_batches() -> None:
    core = Core()
    core.hello()
    core.register(slots=100)
    for n in range(1, 101):
        request = bytes([n]) * 16
        core.running(request)
        core.worker(tok(request, 0))
        core.handle(PushBlocked(CLIENT, request, 0))
    core.now += 0.01
    assert len(core.handle(TimerDue())) == 64
    core.now += 0.01
    assert len(core.handle(TimerDue())) == 36


# --- a client that comes back


def welcome(peer: bytes) -> Send:
    route = codec.pack(Welcome(wire.VERSION, EPOCH, 1.0, wire.CLIENT_BODY_LIMIT, 8, "loopmux"))
    return Send(peer, Message(Header(Kind.WELCOME), route=route))


def test_the_stream_goes_on_from_what_the_client_has(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    core.worker(tok(ONE, 2, 2))
    core.lose(CLIENT)
    assert core.worker(tok(ONE, 4, 2)) == []
    assert core.hello(AGAIN, instance(CLIENT)) == [welcome(AGAIN)]
    assert core.worker(tok(ONE, 6, 1)) == []  # the client has not said yet what it has
    assert core.client(credit(ONE, 10, 2), AGAIN)[1:] == [
        pushed(tok(ONE, 2, 2), AGAIN),
        pushed(tok(ONE, 4, 2), AGAIN),
        pushed(tok(ONE, 6, 1), AGAIN),
    ]
    assert core.wait(10) == []


def test_a_hello_that_is_read_late_does_not_take_the_place_of_a_newer_one(core: Core) -> None:
    core.hello(introduction=1)
    core.running()
    core.hello(AGAIN, instance(CLIENT), introduction=2)
    assert core.hello(introduction=1) == []
    assert core.lose(CLIENT) == []
    core.client(credit(ONE, 10, 0), AGAIN)
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0), AGAIN)]
    assert core.counted["outdated"] == 1


def test_a_new_connection_takes_over_before_the_old_one_is_known_to_be_dead(core: Core) -> None:
    core.running()
    assert core.hello(AGAIN, instance(CLIENT)) == [welcome(AGAIN)]
    assert core.client(say(Kind.PING)) == [Send(CLIENT, say(Kind.WHO))]
    core.client(credit(ONE, 8, 0), AGAIN)
    assert core.lose(CLIENT) == []
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0), AGAIN)]


def test_the_terminal_comes_again_over_the_new_connection(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    core.worker(end(ONE, 2))
    core.hello(AGAIN, instance(CLIENT))
    assert core.client(credit(ONE, 10, 2), AGAIN) == [pushed(end(ONE, 2), AGAIN)]


def test_an_end_meanwhile_counts_what_the_client_may_have(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    core.lose(CLIENT)
    core.worker(tok(ONE, 2, 2))
    core.hello(AGAIN, instance(CLIENT))
    halted, *actions = core.client(say(Kind.CANCEL, ONE), AGAIN)
    assert halted == stop(ONE, 1)
    assert actions[0] == pushed(tok(ONE, 0, 2), AGAIN)  # it may have been lost on the way
    assert failure(actions[1])[:3] == (AGAIN, Kind.CANCELLED, 2)


def test_a_client_that_only_submits_again_gets_everything(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    core.hello(AGAIN, instance(CLIENT))
    assert core.submit(ONE, AGAIN) == [accepted(ONE, 0, AGAIN), pushed(tok(ONE, 0, 2), AGAIN)]


def test_a_terminal_does_not_wait_for_credit_forever(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    core.worker(end(ONE, 2))
    core.hello(AGAIN, instance(CLIENT))
    assert core.wait(1) == [pushed(tok(ONE, 0, 2), AGAIN), pushed(end(ONE, 2), AGAIN)]


def test_hello_again_on_the_same_connection_only_gets_its_answer(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    assert core.hello() == [welcome(CLIENT)]
    assert core.worker(tok(ONE, 1)) == [pushed(tok(ONE, 1))]


def test_another_client_on_the_same_connection(core: Core) -> None:
    core.running()
    core.hello(CLIENT, instance(OTHER))
    assert core.worker(tok(ONE, 0)) == []
    assert core.wait(2) == [stop(ONE, 1)]  # the first one is gone like any other
    assert list(core.tables.clients.by_instance) == [instance(OTHER)]


# --- a client that is gone


def test_a_lost_client_keeps_its_requests_for_the_grace_time(core: Core) -> None:
    core.running(ONE)
    core.worker(tok(ONE, 0))
    assert core.lose(CLIENT) == []
    assert core.tables.requests[ONE].client.peer is None
    assert core.wait(1.75) == []
    assert core.wait(0.25) == [stop(ONE, 1)]
    core.worker(stopped(ONE, 1))
    core.assert_empty()
    assert core.tables.clients.by_instance == {}
    assert core.counted == {"submitted": 1, "clients_lost": 1, "cancelled": 1}


def test_a_silent_client_is_lost_after_three_heartbeats(core: Core) -> None:
    core.running(ONE)
    assert core.wait(32.75, silent=(CLIENT,)) == []
    assert core.wait(0.5, silent=(CLIENT,)) == [stop(ONE, 1)]
    assert core.client(say(Kind.PING)) == [Send(CLIENT, say(Kind.WHO))]


def test_one_that_fell_silent_before_its_connection_closed_is_waited_for_longer(core: Core) -> None:
    core.running(ONE)
    core.wait(2.5, silent=(CLIENT,))
    core.lose(CLIENT)  # by ØMQ's own heartbeats, which a process that is stopped does not answer
    assert core.wait(29.75) == []
    core.hello(AGAIN, instance(CLIENT))
    core.client(credit(ONE, 8, 0), AGAIN)
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0), AGAIN)]


def test_a_queued_request_of_a_lost_client_goes_too(core: Core) -> None:
    core.register(slots=1)
    core.running(ONE)
    core.submit(TWO)
    core.lose(CLIENT)
    assert core.wait(2) == [stop(ONE, 1)]
    assert core.worker(stopped(ONE)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    core.assert_empty()


def test_a_client_that_says_bye_is_not_waited_for(core: Core) -> None:
    core.running(ONE)
    assert core.client(say(Kind.BYE)) == [stop(ONE, 1)]
    core.worker(stopped(ONE))
    core.assert_empty()


def test_grace_ends_with_the_return(core: Core) -> None:
    core.running(ONE)
    core.lose(CLIENT)
    core.wait(1)
    core.hello(AGAIN, instance(CLIENT))
    assert core.wait(5) == []
    core.client(credit(ONE, 8, 0), AGAIN)
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0), AGAIN)]


# --- a request that is not to outlive its client


def test_a_request_that_is_not_to_outlive_its_client_is_stopped_when_that_is_lost(core: Core) -> None:
    core.running(ONE, cancel_on_disconnect=True)
    core.running(TWO)
    assert core.lose(CLIENT) == [stop(ONE, 1)]
    core.worker(stopped(ONE, 1))
    assert core.wait(1.75) == []
    assert core.wait(0.25) == [stop(TWO, 1)]
    core.worker(stopped(TWO, 1))
    core.assert_empty()
    assert core.counted["cancelled"] == 2


def test_silence_is_a_loss_too(core: Core) -> None:
    core.running(ONE, cancel_on_disconnect=True)
    assert core.wait(2.75, silent=(CLIENT,)) == []
    assert core.wait(0.5, silent=(CLIENT,)) == [stop(ONE, 1)]


def test_one_that_has_ended_waits_for_its_client_as_all_do(core: Core) -> None:
    core.running(ONE, cancel_on_disconnect=True)
    core.worker(end(ONE, 0))
    core.lose(CLIENT)
    core.hello(AGAIN, instance(CLIENT))
    assert core.client(credit(ONE, 8, 0), AGAIN) == [pushed(end(ONE, 0), AGAIN)]


def test_a_client_that_comes_back_has_it_begun_again(core: Core) -> None:
    core.running(ONE, cancel_on_disconnect=True)
    core.lose(CLIENT)
    core.worker(stopped(ONE, 1))
    core.hello(AGAIN, instance(CLIENT))
    assert core.client(credit(ONE, 8, 0), AGAIN) == [Send(AGAIN, say(Kind.WHO, ONE))]
    route = codec.pack(Submit("m", cancel_on_disconnect=True))
    core.client(Message(Header(Kind.ATTACH, ONE, arg=8), route, BODY), AGAIN)
    assert runs(core.wait(0.5)) == [(WORKER, ONE, 2)]
    assert core.lose(AGAIN) == [stop(ONE, 1, attempt=2)]


def test_a_client_whose_broker_was_away_is_not_lost(core: Core) -> None:
    core.running(ONE, cancel_on_disconnect=True)
    core.sleep()
    assert core.lose(CLIENT) == []
    core.hello(AGAIN, instance(CLIENT))
    core.client(credit(ONE, 8, 0), AGAIN)
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0), AGAIN)]


def test_many_of_them_are_ended_in_slices_unless_the_client_returns(core: Core) -> None:
    crowd(core, 200, cancel_on_disconnect=True)
    core.lose(CLIENT)
    assert len(core.tables.requests) == 136
    core.now += 0.001
    core.handle(TimerDue())
    assert len(core.tables.requests) == 72
    core.hello(AGAIN, instance(CLIENT))
    core.at_once()
    assert len(core.tables.requests) == 72


# --- thousands of them


def crowd(core: Core, count: int, **route: Any) -> list[bytes]:
    """So many requests of one client; the first four run."""
    requests = [n.to_bytes(16) for n in range(1, count + 1)]
    for request in requests:
        core.submit(request, **route)
    for request in requests[:4]:
        core.worker(say(Kind.RUNACK, request, attempt=1))
    return requests


def test_what_a_client_leaves_behind_is_ended_in_slices(core: Core) -> None:
    """Thousands in one go would hold up everybody else for a tenth of a second."""
    requests = crowd(core, 200)
    left = [200]
    core.client(say(Kind.BYE))
    while core.tables.requests:
        left.append(len(core.tables.requests))
        core.now += 0.001
        core.handle(TimerDue())
    assert left == [200, 136, 72, 8]
    for request in requests[:4]:
        core.worker(stopped(request))
    core.assert_empty()
    assert core.tables.clients.by_instance == {}
    assert core.counted["cancelled"] == 200


def test_none_that_waits_gets_the_slot_of_one_that_is_ended(core: Core) -> None:
    crowd(core, 200)
    core.client(say(Kind.BYE))
    actions = [action for actions in core.at_once() for action in actions]
    assert [stop(n.to_bytes(16), 1) for n in (4, 3, 2, 1)] == actions


def test_a_client_that_returns_meanwhile_keeps_what_is_left(core: Core) -> None:
    crowd(core, 200)
    core.lose(CLIENT)
    core.now += core.config.closed_grace
    core.keep_alive(())
    core.handle(TimerDue())
    core.hello(AGAIN, instance(CLIENT))
    core.at_once()
    assert len(core.tables.requests) == 136
    core.client(credit((1).to_bytes(16), 8, 0), AGAIN)
    assert core.worker(tok((1).to_bytes(16), 0)) == [pushed(tok((1).to_bytes(16), 0), AGAIN)]


# --- a client that does not read


def test_the_largest_message_and_a_window_around_it_are_no_slow_client() -> None:
    core = Core()
    core.hello()
    core.register(slots=1)
    core.running(ONE)
    sizes = {512: (wire.WORKER_BODY_LIMIT - 100) // 8}
    for seq in range(0, 1024, 8):
        (push,) = core.worker(tok(ONE, seq, 8, text="x" * sizes.get(seq, 8)))
        assert isinstance(push, Push)


def test_a_slow_client_loses_its_request_and_no_other() -> None:
    core = Core(window=8, request_output=4000)
    core.hello()
    core.register(slots=2)
    core.running(ONE)
    core.running(TWO)
    core.worker(tok(ONE, 0, 8))
    seq = 8
    actions: list[Action] = []
    while not actions:
        actions = core.worker(tok(ONE, seq, 8, text="long text "))
        seq += 8
    assert actions[0] == stop(ONE, 1)
    peer, kind, total, body = failure(actions[1])
    assert (peer, kind, total, body.code) == (CLIENT, Kind.CANCELLED, 8, "cancelled")
    assert "slow_client" in body.message
    assert core.worker(tok(TWO, 0)) == [pushed(tok(TWO, 0))]
    core.worker(stopped(ONE, seq))
    core.worker(end(TWO, 1))
    core.client(say(Kind.ENDACK, ONE))
    core.client(say(Kind.ENDACK, TWO))
    core.assert_empty()


def backlog(core: Core) -> list[Action]:
    """190 chunks that the client gave no credit for; it gives it."""
    core.running(ONE)
    for seq in range(190):
        core.worker(tok(ONE, seq))
    return core.client(credit(ONE, 1_000, 8))


def test_of_a_backlog_some_is_pushed_now_and_the_rest_soon(core: Core) -> None:
    rounds = [backlog(core), *core.at_once()]
    relayed = rounds[0].pop(0)
    assert kinds([relayed]) == [(WORKER, Kind.TOKACK)]
    assert [starts(actions) for actions in rounds] == [[*range(8, 72)], [*range(72, 136)], [*range(136, 190)]]


def test_a_full_pipe_is_tried_again_with_little(core: Core) -> None:
    backlog(core)
    core.handle(PushBlocked(CLIENT, ONE, 8))
    core.now += core.config.retry
    assert starts(core.handle(TimerDue())) == [*range(8, 72)]


def test_with_a_chunk_that_was_refused_the_terminal_comes_again(core: Core) -> None:
    core.running(ONE)
    core.lose(CLIENT)
    core.worker(tok(ONE, 0))
    core.worker(end(ONE, 1))
    core.hello(AGAIN, instance(CLIENT))
    both = [pushed(tok(ONE, 0), AGAIN), pushed(end(ONE, 1), AGAIN)]
    assert core.client(credit(ONE, 8, 0), AGAIN) == both
    core.handle(PushBlocked(AGAIN, ONE, 0))
    core.now += core.config.retry
    assert core.handle(TimerDue()) == both


def test_output_held_for_all_limits_what_is_let_in() -> None:
    from loopmux_broker.admission import Limits

    core = Core(window=8, limits=Limits(output=1000))
    core.hello()
    core.register(slots=4)
    core.running(ONE)
    for n in range(4):
        core.worker(tok(ONE, n))
    [answer] = core.submit(TWO)
    assert failure(answer)[3].code == "overloaded"
    core.client(credit(ONE, 12, 4))
    assert core.submit(TWO)[0] == run(TWO)
