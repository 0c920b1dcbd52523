"""Stories of a broker that was started again: requests come back in halves, from their clients and their workers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from brokerkit import (
    BODY,
    CLIENT,
    EPOCH,
    FOUR,
    ONE,
    OTHER,
    SECOND,
    THIRD,
    TWO,
    WORKER,
    Core,
    accepted,
    end,
    failure,
    held,
    kinds,
    pushed,
    run,
    runs,
    stop,
    stopped,
    tok,
)
from loopmux import codec
from loopmux.messages import Submit
from loopmux.wire import Header, Kind, Message, pack_tokens
from loopmux_broker.admission import Limits
from loopmux_broker.events import Action, LoopStalled, Push, Send, TimerDue, say


@pytest.fixture
def core() -> Core:
    return Core(settle=3.0)


def attach(
    core: Core, request: bytes, received: int, attempt: int = 1, peer: bytes = CLIENT, **route: Any
) -> list[Action]:
    route.setdefault("model", "m")
    header = Header(Kind.ATTACH, request, received, received + 1024, attempt)
    message = Message(header, codec.pack(Submit(**route)), BODY, pack_tokens(list(range(received))))
    return core.client(message, peer)


def replay(
    start: int, request: bytes = ONE, attempt: int = 1, worker: bytes = WORKER, acknowledged: int | None = None
) -> Send:
    known = start if acknowledged is None else acknowledged
    return Send(worker, say(Kind.REPLAY, request, seq=start, arg=known, attempt=attempt))


def reset(request: bytes = ONE, attempt: int = 1, worker: bytes = WORKER) -> Send:
    return Send(worker, say(Kind.RESET, request, attempt=attempt))


def goes_on(core: Core, start: int, attempt: int = 1, worker: bytes = WORKER) -> None:
    """The stream comes from there, is acknowledged and forgotten."""
    assert core.worker(tok(ONE, start, attempt=attempt), worker) == [pushed(tok(ONE, start, attempt=attempt))]
    last = end(ONE, start + 1, attempt=attempt)
    assert core.worker(last, worker) == [pushed(last)]
    assert core.client(say(Kind.ENDACK, ONE)) == [Send(worker, say(Kind.ENDACK, ONE, attempt=attempt))]
    core.assert_empty()


def test_the_client_comes_first(core: Core) -> None:
    core.hello()
    assert attach(core, ONE, 5) == [accepted(ONE)]
    core.register(held=1)
    assert held(core, ONE, 3, 9) == [replay(5)]
    goes_on(core, 5)
    assert core.counted["recovered"] == 1


def test_the_worker_comes_first(core: Core) -> None:
    core.register(held=1)
    assert held(core, ONE, 3, 9) == []
    core.hello()
    assert attach(core, ONE, 5) == [accepted(ONE), replay(5)]
    goes_on(core, 5)


def test_what_was_asked_for_and_did_not_come_is_asked_for_again(core: Core) -> None:
    core.hello()
    core.register(held=1)
    held(core, ONE, 0, 9)
    attach(core, ONE, 5)
    assert held(core, ONE, 0, 9) == [replay(5)]
    core.worker(tok(ONE, 5))
    assert held(core, ONE, 0, 9) == [replay(6, acknowledged=5)], "the client may never get what is here"


def test_a_client_alone_waits_a_moment_for_its_worker(core: Core) -> None:
    core.hello()
    core.register()
    attach(core, ONE, 5, attempt=2)
    assert core.wait(0.25) == [run(ONE, attempt=3, prefix=5, timeout=599.75)]
    goes_on(core, 5, attempt=3)


def test_a_worker_that_comes_later_than_that_may_still_have_it(core: Core) -> None:
    core.hello()
    attach(core, ONE, 5)
    core.wait(1)
    core.register(held=1)
    assert held(core, ONE, 0, 9) == [replay(5)]
    goes_on(core, 5)


def test_but_not_once_another_has_it(core: Core) -> None:
    core.hello()
    core.register(SECOND)
    attach(core, ONE, 5)
    core.wait(0.25)
    core.register(held=1)
    assert held(core, ONE, 0, 9) == [reset()]
    goes_on(core, 5, attempt=2, worker=SECOND)


def test_a_worker_gets_nothing_before_it_has_said_what_it_has(core: Core) -> None:
    core.hello()
    core.submit(TWO)
    assert kinds(core.register(held=1))[-1] == (WORKER, Kind.WELCOME)
    held(core, ONE, 0, 9)
    assert core.tables.requests[TWO].lease is None, "its one slot is taken"


def test_nor_for_ever_if_it_does_not_say(core: Core) -> None:
    core.hello()
    core.submit(TWO)
    core.register(held=1)
    assert [a for a in core.wait(0.25) if kinds([a]) == [(WORKER, Kind.RUN)]] != []


def test_a_worker_whose_connection_breaks_again_and_again_is_not_lost_by_its_request(core: Core) -> None:
    core.hello()
    core.register()
    core.submit(ONE)
    for _ in range(5):
        core.worker(say(Kind.RUNACK, ONE, attempt=1))
        core.lose(WORKER)
        core.register(held=1)
        assert replay(0) in held(core, ONE, 0, 0, epoch=EPOCH)
    request = core.tables.requests[ONE]
    assert (len(request.lost), request.alone, request.attempt) == (0, False, 1)
    goes_on(core, 0)


def test_a_client_that_takes_it_for_known_here_is_asked_for_it(core: Core) -> None:
    """It brought it once, and was lost; then the worker did."""
    core.hello()
    core.register(held=1)
    held(core, ONE, 0, 9)
    assert core.client(say(Kind.CREDIT, ONE, seq=1029, arg=5)) == [Send(CLIENT, say(Kind.WHO, ONE))]
    assert replay(5) in attach(core, ONE, 5)
    assert "strikes" not in core.counted


def test_a_worker_alone_is_stopped_in_the_end(core: Core) -> None:
    core.register(held=1)
    held(core, ONE, 0, 9)
    assert core.wait(29.75) == []
    assert core.wait(0.25) == [stop(ONE, 1)]
    assert core.worker(stopped(ONE, 9)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    core.assert_empty()
    assert core.tables.clients.by_instance == {}


def test_and_at_once_when_the_client_is_there_and_did_not_bring_it(core: Core) -> None:
    """It has its end, perhaps, and ENDACK was lost with the broker. ATTACH would have come before PING."""
    core.hello()
    core.register(slots=2, held=2)
    held(core, ONE, 0, 9)
    held(core, TWO, 0, 9)
    attach(core, TWO, 5)
    assert core.client(say(Kind.PING)) == [stop(ONE, 1), Send(CLIENT, say(Kind.PONG))]
    core.worker(stopped(ONE, 9))
    assert list(core.tables.requests) == [TWO]
    assert held(core, ONE, 0, 9) == [reset()]


def test_a_ping_that_was_meant_for_the_former_broker_does_not_count(core: Core) -> None:
    """The client's socket had HELLO and PING when its connection closed, and begins the next one with them."""
    core.hello(introduction=1)
    core.client(say(Kind.PING))
    core.hello(introduction=2)
    core.register(held=1)
    assert held(core, ONE, 0, 9) == []
    assert attach(core, ONE, 5) == [accepted(ONE), replay(5)]
    goes_on(core, 5)


def test_what_ended_here_while_its_worker_was_away_is_nobodys(core: Core) -> None:
    """It was frozen and its request went to another; it says which broker wanted it, and that was this one."""
    core.hello()
    core.register()
    core.running()
    core.register(SECOND)
    core.lose(WORKER)
    core.worker(end(ONE, 0, attempt=2), SECOND)
    core.register(held=1)
    assert held(core, ONE, 0, 9, epoch=EPOCH) == [reset()], "its end is still here"
    core.client(say(Kind.ENDACK, ONE))
    core.client(say(Kind.BYE))
    assert held(core, ONE, 0, 9, epoch=EPOCH) == [reset()], "nothing of it is here any more"
    core.assert_empty()


def test_a_client_that_greets_may_come_with_it_later_than_its_worker(core: Core) -> None:
    core.hello()
    core.now += 2
    core.register(held=1)
    assert held(core, ONE, 0, 9) == []
    assert attach(core, ONE, 5) == [accepted(ONE), replay(5)]


def test_a_worker_that_was_lost_again_may_still_be_asked_for_what_it_holds(core: Core) -> None:
    core.register(held=1)
    held(core, ONE, 0, 9)
    core.lose(WORKER)
    core.register(held=1)
    assert held(core, ONE, 0, 9) == []
    core.hello()
    assert attach(core, ONE, 5) == [accepted(ONE), replay(5)]


def test_a_broker_that_has_been_up_for_long_waits_for_no_client_to_bring_what_only_a_worker_has(core: Core) -> None:
    core.register()
    core.wait(30)
    core.register(held=1)
    assert held(core, ONE, 0, 9) == [reset()]
    core.assert_empty()


def test_time_in_which_the_broker_itself_was_away_is_not_part_of_that(core: Core) -> None:
    core.now += 60
    core.handle(LoopStalled(60.0))
    core.register(held=1)
    assert held(core, ONE, 0, 9) == []


@pytest.mark.parametrize(("start", "end", "attempt"), [(6, 9, 1), (0, 4, 1), (0, 9, 0)])
@pytest.mark.parametrize("first", ["client", "worker"])
def test_halves_that_do_not_fit(core: Core, first: str, start: int, end: int, attempt: int) -> None:
    """The worker let go of what the client lacks, or is behind it, or is an older attempt."""
    core.hello()
    core.register(held=1)
    if first == "client":
        attach(core, ONE, 5, attempt=attempt + 1 if not attempt else 1)
        assert held(core, ONE, start, end, attempt=attempt) == [reset(attempt=attempt)]
        assert core.wait(0.25) == [run(ONE, attempt=2, prefix=5, timeout=599.75)]
    else:
        held(core, ONE, start, end, attempt=attempt)
        actions = attach(core, ONE, 5)
        assert stop(ONE, 3, attempt=attempt) in actions
        assert core.worker(stopped(ONE, end, attempt=attempt))[-1] == run(ONE, attempt=2, prefix=5)
    goes_on(core, 5, attempt=2)


def test_two_workers_with_the_same_request(core: Core) -> None:
    """One was frozen when it was given to the other: the later attempt counts."""
    core.hello()
    core.register(held=1)
    core.register(SECOND, held=1)
    attach(core, ONE, 5, attempt=1)
    assert held(core, ONE, 4, 9, attempt=2, worker=SECOND) == [replay(5, attempt=2, worker=SECOND)]
    assert held(core, ONE, 0, 7, attempt=1) == [reset()]
    goes_on(core, 5, attempt=2, worker=SECOND)


def test_an_ended_one_is_delivered(core: Core) -> None:
    core.hello()
    core.register(held=1)
    held(core, ONE, 3, 6)
    attach(core, ONE, 5)
    goes_on(core, 5)


def test_another_clients_id_is_nobody_elses(core: Core) -> None:
    core.hello()
    core.hello(OTHER)
    core.register(held=1)
    held(core, ONE, 0, 9)
    [answer] = attach(core, ONE, 5, peer=OTHER)
    assert failure(answer)[:2] == (OTHER, Kind.ERROR)
    assert attach(core, ONE, 5)[-1] == replay(5)


def test_a_worker_may_not_name_a_client_that_it_did_not_get_the_request_from(core: Core) -> None:
    core.hello()
    core.hello(OTHER)
    core.register(held=1)
    attach(core, ONE, 5)
    assert held(core, ONE, 0, 9, client=OTHER) == [reset()]


def test_output_that_was_not_asked_for_waits(core: Core) -> None:
    core.register(held=1)
    held(core, ONE, 0, 9)
    assert core.worker(tok(ONE, 0)) == []
    assert core.worker(end(ONE, 0)) == []
    assert core.counted["fenced"] == 2
    core.hello()
    assert attach(core, ONE, 0)[-1] == replay(0)


def test_a_worker_that_dies_before_its_client_comes(core: Core) -> None:
    core.register(held=1)
    held(core, ONE, 0, 9)
    core.lose(WORKER)
    core.assert_empty()
    core.hello()
    core.register(SECOND)
    attach(core, ONE, 5)
    assert core.wait(0.25) == [run(ONE, SECOND, attempt=2, prefix=5, timeout=599.75)]


def test_the_deadline_is_the_clients(core: Core) -> None:
    core.hello()
    core.register(held=1)
    held(core, ONE, 0, 9)
    attach(core, ONE, 5, timeout=2)
    actions = core.wait(2)
    assert actions[0] == stop(ONE, 2)
    assert failure(actions[1])[:3] == (CLIENT, Kind.ERROR, 5)


def test_what_nobody_serves_yet_is_waited_for_and_what_never_ran_is_not(core: Core) -> None:
    core.hello()
    attach(core, ONE, 5)
    attach(core, TWO, 0, attempt=0)
    actions = core.wait(3.25)
    assert [failure(a)[3].code for a in actions if kinds([a]) == [(CLIENT, Kind.ERROR)]] == ["model_not_found"]
    assert core.register()[-1] == run(ONE, attempt=2, prefix=5, timeout=596.75)


def test_its_worker_may_need_longer_than_the_broker_to_be_back(core: Core) -> None:
    core.hello()
    core.wait(3)
    assert attach(core, ONE, 5) == [accepted(ONE)]
    [refused] = attach(core, TWO, 0, attempt=0)
    assert failure(refused)[3].code == "model_not_found"
    core.wait(20)
    assert core.register()[-1] == run(ONE, attempt=2, prefix=5, timeout=580.0)


def test_a_broker_that_was_away_just_after_its_start_goes_on_waiting_for_who_belongs_to_it(core: Core) -> None:
    core.hello()
    core.submit(ONE)
    core.now += 60
    core.handle(LoopStalled(60.0))
    assert [a for a in core.handle(TimerDue()) if isinstance(a, Send)] == []
    assert core.register()[-1] == run(ONE, timeout=540.0)


def test_a_request_that_does_not_wait_for_a_model_waits_for_its_worker(core: Core) -> None:
    core.hello()
    core.launcher()
    core.declare("m", "loading")
    assert attach(core, ONE, 5, wait=False) == [accepted(ONE)]


def test_attach_to_what_is_here_says_where_to_go_on(core: Core) -> None:
    core.hello()
    core.register()
    core.running()
    core.worker(tok(ONE, 0, 2))
    core.worker(tok(ONE, 2))
    actions = attach(core, ONE, 2)
    assert actions[0] == accepted(ONE)
    assert actions[-1] == pushed(tok(ONE, 2))
    core.worker(end(ONE, 3))
    assert attach(core, ONE, 3)[-1] == pushed(end(ONE, 3))


def test_attach_with_more_than_there_is_is_malformed(core: Core) -> None:
    core.hello()
    core.register()
    core.running()
    [_, answer] = attach(core, ONE, 2)
    assert failure(answer)[3].code == "protocol"


def test_attach_to_another_request_under_a_taken_id_is_refused_with_the_tokens_that_the_client_has(core: Core) -> None:
    """With any other number the client would take it for a fault of the broker's."""
    core.hello()
    core.register()
    core.running(body=b"another")
    [answer] = attach(core, ONE, 2)
    assert (failure(answer)[2], failure(answer)[3].code) == (2, "bad_request")


def test_attach_after_the_request_was_given_up(core: Core) -> None:
    core.hello()
    core.register()
    core.running()
    core.worker(tok(ONE, 0, 2))
    core.lose(CLIENT)
    core.wait(2)
    core.worker(stopped(ONE, 2))
    core.hello()
    assert core.client(say(Kind.CREDIT, ONE, seq=1026, arg=2)) == [Send(CLIENT, say(Kind.WHO, ONE))]
    attach(core, ONE, 2)
    [again] = [a for a in core.wait(0.25) if kinds([a]) == [(WORKER, Kind.RUN)]]
    assert again.message.header.attempt == 2  # type: ignore[union-attr]
    goes_on(core, 2, attempt=2)


def test_a_cancel_that_comes_before_its_worker(core: Core) -> None:
    core.hello()
    [answer] = core.client(say(Kind.CANCEL, ONE))
    assert failure(answer)[:2] == (CLIENT, Kind.CANCELLED)
    core.client(say(Kind.ENDACK, ONE))
    core.wait(1)
    core.register(held=1)
    assert held(core, ONE, 0, 9) == [reset()]
    core.wait(3.25)
    core.assert_empty()


def test_a_cancel_that_comes_after_its_worker(core: Core) -> None:
    core.hello()
    core.register(held=1)
    held(core, ONE, 0, 9)
    actions = core.client(say(Kind.CANCEL, ONE))
    assert actions[0] == stop(ONE, 1)
    assert failure(actions[1])[:2] == (CLIENT, Kind.CANCELLED)
    core.client(say(Kind.ENDACK, ONE))
    core.worker(stopped(ONE, 9))
    core.assert_empty()


def test_a_worker_holds_a_limited_number(core: Core) -> None:
    core.register(held=400)
    answers = [held(core, n.to_bytes(16), 0, 1) for n in range(1, 401)]
    assert sum(kinds(a) == [(WORKER, Kind.RESET)] for a in answers) == 144
    assert len(core.tables.requests) == 256


@pytest.mark.parametrize("workers", [0, 1])
def test_returning_requests_are_let_in_past_a_queue_that_they_were_let_into_before(workers: int) -> None:
    """A client had many running; now all of them queue, and none may be lost for it."""
    core = Core(settle=30.0, limits=Limits(client_queued=2, queued=12))
    core.hello()
    for name in (WORKER,)[:workers]:
        core.register(name)
    for n in range(1, 21):
        assert kinds(attach(core, bytes([n]) * 16, 0)) == [(CLIENT, Kind.ACCEPTED)]
        core.wait(0.3)
    [answer] = attach(core, bytes(16 * [99]), 0)
    assert failure(answer)[3].message.startswith("20 requests of this client are back, the most allowed")


def test_what_others_have_not_read_does_not_keep_a_returning_request_out() -> None:
    core = Core(settle=3.0, limits=Limits(output=1))
    core.hello()
    core.hello(OTHER)
    core.register(slots=2)
    core.submit(TWO, OTHER)
    core.worker(tok(TWO, 0))
    core.register(slots=2, held=1)
    held(core, ONE, 0, 9)
    assert attach(core, ONE, 5) == [accepted(ONE), replay(5)]


@pytest.mark.parametrize("first", ["client", "worker"])
def test_a_refusal_has_the_number_of_tokens_that_the_client_has(first: str) -> None:
    """With any other the client would take it for a fault of the broker's."""
    core = Core(settle=3.0, limits=Limits(held=1))
    core.hello()
    if first == "worker":
        core.register(held=1)
        held(core, ONE, 0, 9)
    [answer] = attach(core, ONE, 5)
    _, kind, seq, body = failure(answer)
    assert (kind, seq, body.code) == (Kind.ERROR, 5, "overloaded")


def test_a_half_that_was_not_let_in_has_no_deadline_yet() -> None:
    core = Core(settle=3.0, limits=Limits(held=1))
    core.hello()
    core.register(held=1)
    held(core, ONE, 0, 9)
    attach(core, ONE, 5)
    assert core.tables.requests[ONE].deadline == math.inf


def test_a_queue_of_returning_requests_takes_no_new_ones() -> None:
    core = Core(settle=30.0, limits=Limits(client_queued=2))
    core.hello()
    for n in range(1, 4):
        attach(core, bytes([n]) * 16, 0)
    core.wait(0.3)
    [answer] = core.submit(FOUR)
    assert failure(answer)[3].code == "overloaded"


@pytest.mark.parametrize("number", [60_001, 65_535])
def test_nobody_has_seen_an_attempt_whose_next_one_has_no_number(core: Core, number: int) -> None:
    core.hello()
    core.register(held=1)
    [answer] = attach(core, ONE, 0, attempt=number)
    assert f"ATTACH: found attempt {number}, expected at most 60000" in failure(answer)[3].message
    held(core, TWO, 0, 9, attempt=number)
    assert not core.tables.requests
    core.assert_empty()


@pytest.mark.parametrize("free", [True, False])
def test_a_request_whose_numbers_are_used_up_ends_and_says_so(core: Core, free: bool) -> None:
    core.hello()
    core.register()
    if not free:
        core.running(TWO)
    attach(core, ONE, 3, attempt=60_000)
    actions = core.wait(0.3) if free else core.wait(0.3) + core.worker(end(TWO, 0))
    [ended] = [a for a in actions if isinstance(a, Push) and a.request == ONE]
    _, kind, seq, why = failure(ended)
    assert (kind, seq, why.code, why.retryable) == (Kind.ERROR, 3, "engine", True)
    assert "number above 60000" in why.message
    assert "another id" in why.message
    assert not runs([a for a in actions if isinstance(a, Send) and a.message.header.request == ONE])
    core.client(say(Kind.ENDACK, ONE))
    core.client(say(Kind.ENDACK, TWO))
    core.assert_empty()


def test_nobody_uses_numbers_up_by_leaving_and_coming_back(core: Core) -> None:
    """Whenever a client is given up the last number is remembered: RUN had 65536 in the end, which no header holds."""
    core.hello()
    core.register()
    attach(core, ONE, 0, attempt=59_998)
    actions = core.wait(0.3)
    given = []
    while runs(actions):
        [(_, _, attempt)] = runs(actions)
        given.append(attempt)
        core.client(say(Kind.BYE))
        core.worker(stopped(ONE, attempt=attempt))
        core.hello()
        actions = core.submit(ONE)
    assert given == [59_999, 60_000]
    [ended] = actions
    assert failure(ended)[3].code == "engine"
    core.client(say(Kind.BYE))
    core.hello()
    [again] = core.submit(ONE)
    assert failure(again)[3].code == "engine"


def test_nor_by_a_worker_that_names_a_high_one(core: Core) -> None:
    core.hello()
    core.register(slots=2)
    core.running()
    core.register(SECOND, held=1)
    held(core, ONE, 0, 9, attempt=60_000, worker=SECOND)
    [ended] = [a for a in core.lose(WORKER) if isinstance(a, Push)]
    assert failure(ended)[3].code == "engine"


def test_nor_does_a_worker_stay_emptied_for_it(core: Core) -> None:
    core.hello()
    for worker in (WORKER, SECOND, THIRD):
        core.register(worker)
    attach(core, ONE, 0, attempt=59_998)
    actions = core.wait(0.3)
    for attempt in (59_999, 60_000):
        [(worker, _, given)] = runs(actions)
        assert given == attempt
        core.worker(say(Kind.RUNACK, ONE, attempt=attempt), worker)
        actions = core.lose(worker)
    assert core.tables.requests[ONE].alone
    [ended] = actions
    assert failure(ended)[3].code == "engine"
    assert core.tables.queues.length == 0
    assert len(runs(core.submit(TWO))) == 1


def test_a_refused_return_keeps_the_number_of_who_was_given_up() -> None:
    core = Core(limits=Limits(client_held=len(BODY)))
    core.hello()
    core.register()
    core.running()
    core.client(say(Kind.BYE))
    core.worker(stopped(ONE))
    core.hello()
    [answer] = core.client(Message(Header(Kind.ATTACH, ONE), codec.pack(Submit("m")), BODY + BODY))
    assert failure(answer)[3].code == "overloaded"
    assert runs(core.submit(ONE)) == [(WORKER, ONE, 2)]


@pytest.mark.parametrize("first", ["the client", "its worker"])
def test_the_tokens_that_a_request_comes_back_with_are_counted(first: str) -> None:
    core = Core(settle=3.0, limits=Limits(held=len(BODY) + 4 * 5))
    if first == "its worker":
        core.register(held=1)
        held(core, ONE, 0, 9)
    core.hello()
    attach(core, ONE, 5)
    [answer] = attach(core, TWO, 1)
    assert failure(answer)[3].code == "overloaded"
    core.client(say(Kind.CANCEL, ONE))
    core.client(say(Kind.ENDACK, ONE))
    attach(core, TWO, 5)
    assert core.broker.tables.requests.keys() == {TWO}


def test_an_attempt_that_is_still_being_stopped_keeps_its_number(core: Core) -> None:
    """The client was away for long and heard nothing of the first attempt, which its worker has not let go of."""
    core.hello()
    core.register(slots=2)
    core.running()
    core.lose(CLIENT)
    assert core.wait(3)[-1] == stop(ONE, 1)
    core.hello()
    attach(core, ONE, 0, attempt=0)
    [run] = [s for s in core.wait(0.3) if isinstance(s, Send) and s.message.kind is Kind.RUN]
    assert run.message.header.attempt == 2


@pytest.mark.parametrize("known", [True, False])
def test_a_number_that_two_brokers_gave_out_belongs_to_who_has_it_here(core: Core, known: bool) -> None:
    """The client had heard of no attempt that the former broker made, so the number was given out again."""
    core.hello()
    core.register()
    core.running()
    if known:
        core.worker(tok(ONE, 1))
        assert core.tables.requests[ONE].attempt == 1, "it waits for a worker while the first one stops"
    else:
        core.lose(CLIENT)
        core.wait(3)
        assert ONE not in core.tables.requests
    core.register(SECOND, held=1)
    assert held(core, ONE, 0, 9, worker=SECOND)[0] == reset(worker=SECOND)
    assert core.worker(stopped(ONE))[0] == Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))
    assert not any(lease.stopping for worker in core.tables.pool.workers.values() for lease in worker.leases.values())


@pytest.mark.parametrize("epoch", [b"former!!", EPOCH])
def test_of_a_number_that_was_given_out_here_another_broker_s_attempt_is_another_one(core: Core, epoch: bytes) -> None:
    """Its output would go on where another worker's ended, which was made without it."""
    core.hello()
    core.register()
    core.running()
    core.worker(tok(ONE, 0, 8))
    core.lose(WORKER)
    core.register(SECOND, held=1)
    answer = held(core, ONE, 0, 9, worker=SECOND, epoch=epoch)[0]
    assert answer == (replay(8, worker=SECOND, acknowledged=0) if epoch == EPOCH else reset(worker=SECOND))


def test_nor_is_it_when_the_client_was_given_up_meanwhile(core: Core) -> None:
    core.hello()
    core.register()
    core.running()
    core.worker(tok(ONE, 0, 8))
    core.client(say(Kind.BYE))
    core.worker(stopped(ONE))
    core.hello()
    attach(core, ONE, 8)
    core.register(SECOND, held=1)
    assert held(core, ONE, 0, 9, worker=SECOND)[0] == reset(worker=SECOND)


def test_what_is_stopped_while_its_worker_introduces_itself_is_no_new_attempt_when_its_name_comes(core: Core) -> None:
    core.hello()
    core.register(slots=2)
    core.running()
    core.wait(1.0)
    core.register(slots=2, held=1, introduction=1)
    core.client(say(Kind.BYE))
    core.wait(core.config.claim_wait + 0.1)
    core.hello()
    attach(core, ONE, 0, attempt=0)
    assert held(core, ONE, 0, 9)[0] == stop(ONE, 1)


def test_a_client_may_say_submit_for_what_only_its_worker_knew(core: Core) -> None:
    core.register(held=1)
    held(core, ONE, 0, 9)
    core.hello()
    assert core.submit(ONE) == [accepted(ONE), replay(0)]
    goes_on(core, 0)


# --- a worker that introduces itself again to the broker that knows it


def test_what_a_worker_does_not_name_when_it_is_back_it_does_not_have(core: Core) -> None:
    core.hello()
    core.register(slots=2)
    core.register(SECOND, slots=2)
    core.running(ONE)
    core.worker(tok(ONE, 0))
    core.running(TWO, worker=SECOND)
    assert core.register(SECOND, slots=2, held=0)[1:] == [run(TWO, attempt=2)]
    assert core.register(slots=2, held=1)[1:] == [], "it has not said yet what it has"
    assert held(core, TWO, 0, 0, attempt=2, epoch=EPOCH)[1:] == [run(ONE, SECOND, attempt=2, prefix=1)]
    assert [len(core.tables.requests[r].lost) for r in (ONE, TWO)] == [0, 0], "no worker died"


def test_nor_what_it_has_not_named_in_time(core: Core) -> None:
    core.hello()
    core.register()
    core.running()
    core.register(held=1)
    core.register(SECOND)
    assert core.wait(0.25) == [run(ONE, SECOND, attempt=2, timeout=599.75)]
    assert held(core, ONE, 0, 9, epoch=EPOCH) == [reset()]


def test_what_it_was_given_just_now_it_may_not_have_known_then(core: Core) -> None:
    """It says REGISTER until it hears WELCOME, and RUN may follow that."""
    core.hello()
    core.register()
    core.submit(ONE)
    assert kinds(core.register()) == [(WORKER, Kind.WELCOME)]
    assert core.wait(1) == [run(ONE, timeout=599.0)]


def test_what_is_being_stopped_has_its_slot_until_the_worker_answers_whatever_it_names(core: Core) -> None:
    """The answer may have been under way when it registered again, and must meet no other attempt of that number."""
    core.hello()
    core.register()
    core.running()
    core.client(say(Kind.CANCEL, ONE))
    core.client(say(Kind.ENDACK, ONE))
    core.submit(TWO)
    assert runs(core.register()) == []
    assert stop(ONE, 1) in core.wait(1.0)
    assert runs(core.worker(stopped(ONE, 0))) == [(WORKER, TWO, 1)]


def test_a_request_that_comes_again_after_its_client_was_given_up_goes_on_counting(core: Core) -> None:
    """What a worker may still say of the former attempts is none of the new one's."""
    core.hello()
    core.register()
    core.running()
    core.lose(CLIENT)
    core.wait(2.0)
    core.worker(stopped(ONE, 0))
    core.assert_empty()
    core.hello()
    assert runs(core.submit(ONE)) == [(WORKER, ONE, 2)]
    assert core.worker(stopped(ONE, 0)) == [reset()]
    assert core.tables.requests[ONE].terminal is None


def test_a_returning_request_that_is_queued_anew_hears_its_place(core: Core) -> None:
    core.register(held=1)
    held(core, ONE, 5, 9)
    core.hello(b"c2", b"o" * 16)
    core.hello()
    core.submit(TWO, b"c2")
    place = [a.message.header.arg for a in attach(core, ONE, 2) if kinds([a]) == [(CLIENT, Kind.ACCEPTED)]]  # type: ignore[union-attr]
    assert place == [core.broker.tables.queues.position(core.tables.requests[ONE])]


# --- the weights that a client's tokens came from


def test_a_returning_request_goes_on_only_where_the_same_weights_are_loaded(core: Core) -> None:
    core.hello()
    core.register(fingerprint="other")
    attach(core, ONE, 5, fingerprint="f")
    [phase] = core.wait(0.25)
    assert kinds([phase]) == [(CLIENT, Kind.PHASE)]
    assert core.register(SECOND)[1:] == [run(ONE, SECOND, attempt=2, prefix=5, timeout=599.75)]


@pytest.mark.parametrize("first", ["client", "worker"])
def test_nor_is_it_claimed_by_a_worker_with_other_weights(core: Core, first: str) -> None:
    core.hello()
    core.register(slots=2, fingerprint="other", held=1)
    if first == "client":
        attach(core, ONE, 5, fingerprint="f")
        assert held(core, ONE, 0, 9) == [reset()]
    else:
        held(core, ONE, 0, 9)
        assert stop(ONE, 3) in attach(core, ONE, 5, fingerprint="f")
    core.wait(0.25)
    assert core.tables.requests[ONE].lease is None


def test_weights_that_nobody_has_make_a_limited_number_of_queues() -> None:
    core = Core(settle=3.0, limits=Limits(queued=2_000))
    core.hello()
    core.register(fingerprint="other")
    for n in range(1, 1_102):
        attach(core, n.to_bytes(16), 1, fingerprint=f"print {n}")
    errors = [failure(a)[3] for a in core.wait(0.25) if Kind.ERROR in dict(kinds([a])).values()]
    assert [e.code for e in errors] == ["overloaded"] * 101
    assert core.tables.queues.lanes("m") == 1_000
