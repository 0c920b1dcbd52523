"""Stories of single requests: every state, every way out of it."""

from __future__ import annotations

import pytest

from brokerkit import (
    BODY,
    CLIENT,
    ONE,
    OTHER,
    SECOND,
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
    stop,
    stopped,
    tok,
)
from loopmux import codec, wire
from loopmux.messages import Failure, Submit
from loopmux.results import Usage
from loopmux.wire import Header, Kind, Message
from loopmux_broker.admission import Limits
from loopmux_broker.clients import Client, Principal
from loopmux_broker.events import Send, TimerDue, say
from loopmux_broker.output import Output
from loopmux_broker.requests import TRANSITIONS, Request, State, Step


@pytest.fixture
def core() -> Core:
    """One client, one worker with one slot for model m."""
    core = Core()
    core.hello()
    core.register()
    return core


def test_a_whole_life(core: Core) -> None:
    assert core.submit(ONE) == [run(ONE)]
    assert core.worker(say(Kind.RUNACK, ONE, attempt=1)) == [accepted(ONE)]
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]
    assert core.worker(tok(ONE, 1, 2)) == [pushed(tok(ONE, 1, 2))]
    credit = say(Kind.CREDIT, ONE, seq=1027, arg=3)
    assert core.client(credit) == [Send(WORKER, say(Kind.TOKACK, ONE, seq=3, arg=3, attempt=1))]
    assert core.worker(end(ONE, 3)) == [pushed(end(ONE, 3))]
    assert core.client(say(Kind.ENDACK, ONE)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    core.assert_empty()
    assert core.counted == {"submitted": 1, "finished": 1}


def test_the_table_has_every_step_and_no_other() -> None:
    allowed = {(state, step): after for state, steps in TRANSITIONS.items() for step, after in steps.items()}
    for state in State:
        for step in Step:
            request = Request(
                ONE, Client(b"i", None, "", Principal(), 0.0), Submit("m"), b"", 0.0, 1.0, Output(1), state
            )
            if (state, step) in allowed:
                request.move(step)
                assert request.state is allowed[state, step]
            else:
                with pytest.raises(KeyError):
                    request.move(step)


def test_the_second_waits_for_the_slot(core: Core) -> None:
    core.running(ONE)
    assert core.submit(TWO) == [accepted(TWO, 1)]
    core.now += 5
    assert core.worker(end(ONE, 0)) == [pushed(end(ONE, 0)), run(TWO, timeout=595.0)]


def test_a_repeated_submit_is_accepted_again(core: Core) -> None:
    core.submit(ONE)
    assert core.submit(ONE) == [accepted(ONE)]
    core.submit(TWO)
    assert core.submit(TWO) == [accepted(TWO, 1)]
    assert core.counted["submitted"] == 2


def test_a_repeated_submit_of_an_ended_request_gets_the_terminal_again(core: Core) -> None:
    core.running()
    core.worker(end(ONE, 0))
    assert core.submit(ONE) == [pushed(end(ONE, 0))]


@pytest.mark.parametrize("peer", [CLIENT, OTHER])
def test_a_request_id_names_one_request(core: Core, peer: bytes) -> None:
    core.hello(OTHER)
    core.submit(ONE)
    [answer] = core.submit(ONE, peer, body=codec.pack({"prompt": "another"}))
    assert failure(answer)[:2] == (peer, Kind.ERROR)
    assert failure(answer)[3].code == "bad_request"
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]


# --- RUN and its answer


def test_run_is_repeated_then_given_to_another_worker(core: Core) -> None:
    core.submit(ONE)
    core.register(SECOND)
    assert core.wait(1) == [run(ONE, timeout=599.0)]
    assert core.wait(1) == [stop(ONE, 3), run(ONE, SECOND, attempt=2, timeout=598.0)]
    assert core.counted["requeued"] == 1
    # The first worker's slot is taken until it says that it has stopped.
    assert core.wait(1) == [stop(ONE, 3), run(ONE, SECOND, attempt=2, timeout=597.0)]
    core.worker(say(Kind.RUNACK, ONE, attempt=2), SECOND)
    assert core.submit(TWO) == [accepted(TWO, 1)]
    answers = core.worker(stopped(ONE))
    assert answers == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1)), run(TWO)]


def test_an_answer_after_the_attempt_was_given_up_counts_for_nothing(core: Core) -> None:
    core.submit(ONE)
    core.register(SECOND)
    core.wait(2)
    assert core.worker(say(Kind.RUNACK, ONE, attempt=1)) == []
    assert core.worker(tok(ONE, 0)) == []
    assert core.worker(tok(ONE, 0, attempt=2), SECOND) == [pushed(tok(ONE, 0, attempt=2))]
    assert core.worker(end(ONE, 1)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]


def test_output_is_as_good_as_runack(core: Core) -> None:
    assert core.submit(ONE) == [run(ONE)]
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]
    assert core.worker(say(Kind.RUNACK, ONE, attempt=1)) == []
    assert core.wait(2.5) == []


def test_whoever_asks_again_before_the_worker_has_answered_is_told_too(core: Core) -> None:
    core.submit(ONE)
    assert core.submit(ONE) == [accepted(ONE)]


# --- workers that die


def test_a_worker_lost_before_the_first_token_is_replaced(core: Core) -> None:
    core.register(SECOND)
    core.running()
    assert core.lose(WORKER) == [run(ONE, SECOND, attempt=2)]
    assert core.worker(tok(ONE, 0, attempt=2), SECOND) == [pushed(tok(ONE, 0, attempt=2))]


def test_with_no_other_worker_the_request_waits_for_one(core: Core) -> None:
    core.running()
    actions = core.lose(WORKER)
    assert kinds(actions) == [(CLIENT, Kind.PHASE)]
    core.now += 1
    assert core.register(SECOND)[1:] == [run(ONE, SECOND, attempt=2, timeout=599.0)]


def test_a_requeued_request_keeps_its_place(core: Core) -> None:
    core.running(ONE)
    core.now += 1
    core.submit(TWO)
    core.lose(WORKER)
    assert core.register(SECOND)[1:] == [run(ONE, SECOND, attempt=2, timeout=599.0)]


def test_a_worker_that_says_bye_is_lost(core: Core) -> None:
    core.register(SECOND)
    core.running()
    assert core.worker(say(Kind.BYE)) == [run(ONE, SECOND, attempt=2)]


def test_a_silent_worker_is_lost_after_three_heartbeats(core: Core) -> None:
    core.register(SECOND)
    core.running()
    assert core.wait(2.75, silent=(WORKER,)) == []
    assert core.wait(0.5, silent=(WORKER,)) == [run(ONE, SECOND, attempt=2, timeout=597.0)]
    assert core.worker(tok(ONE, 0)) == [Send(WORKER, say(Kind.WHO))]


# --- fencing


def test_output_of_others_and_of_other_attempts_is_refused(core: Core) -> None:
    core.register(SECOND)
    core.running()
    assert core.worker(tok(ONE, 0), SECOND) == [Send(SECOND, say(Kind.RESET, ONE, attempt=1))]
    assert core.worker(tok(ONE, 0, attempt=7)) == [Send(WORKER, say(Kind.RESET, ONE, attempt=7))]
    assert core.worker(end(TWO, 0)) == [Send(WORKER, say(Kind.RESET, TWO, attempt=1))]
    assert core.worker(say(Kind.RUNACK, TWO, attempt=1)) == [Send(WORKER, say(Kind.RESET, TWO, attempt=1))]
    assert core.counted["fenced"] == 4


def test_a_worker_that_comes_back_to_life_is_fenced(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0))
    core.lose(WORKER)
    core.register(b"w1'", name="w1", boot=b"w1".ljust(16, b"."))
    assert core.worker(tok(ONE, 1), b"w1'") == [Send(b"w1'", say(Kind.RESET, ONE, attempt=1))]


def test_repeated_output_is_dropped(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 2))
    assert core.worker(tok(ONE, 0, 2)) == []
    assert core.worker(tok(ONE, 2)) == [pushed(tok(ONE, 2))]
    assert core.counted["duplicates"] == 1


def test_an_end_before_lost_output_gives_the_request_to_another_worker(core: Core) -> None:
    core.register(SECOND)
    core.running()
    assert core.worker(end(ONE, 4)) == [run(ONE, SECOND, attempt=2)]


# --- terminals


def test_a_terminal_is_repeated_until_acknowledged(core: Core) -> None:
    core.running()
    core.worker(end(ONE, 0))
    assert core.wait(2) == [pushed(end(ONE, 0))] * 2
    core.client(say(Kind.ENDACK, ONE))
    assert core.wait(5) == []


def test_a_terminal_that_nobody_acknowledges_is_forgotten_after_a_minute(core: Core) -> None:
    core.running()
    core.worker(end(ONE, 0))
    assert len(core.wait(61)) == 60 - 1
    core.assert_empty()


def test_a_workers_repeated_terminal(core: Core) -> None:
    core.running()
    core.worker(end(ONE, 0))
    assert core.worker(end(ONE, 0)) == []  # the client has not acknowledged: the worker keeps it
    core.client(say(Kind.ENDACK, ONE))
    assert core.worker(end(ONE, 0)) == [Send(WORKER, say(Kind.RESET, ONE, attempt=1))]  # it may drop it


def test_a_workers_error_goes_to_the_client_as_it_is(core: Core) -> None:
    core.running()
    body = codec.pack(Failure("context_length", "too long", worker="w1"))
    error = Message(Header(Kind.ERROR, ONE, attempt=1), body=body)
    assert core.worker(error) == [pushed(error)]
    assert core.counted["failed"] == 1


def test_an_acknowledgement_for_a_worker_that_is_gone(core: Core) -> None:
    core.running()
    core.worker(end(ONE, 0))
    core.lose(WORKER)
    assert core.client(say(Kind.ENDACK, ONE)) == []
    core.assert_empty()


def test_an_early_acknowledgement_means_nothing(core: Core) -> None:
    core.running()
    assert core.client(say(Kind.ENDACK, ONE)) == []
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]


# --- cancel


def test_cancel_in_the_queue(core: Core) -> None:
    core.running(ONE)
    core.submit(TWO)
    [answer] = core.client(say(Kind.CANCEL, TWO))
    assert failure(answer) == (
        CLIENT,
        Kind.CANCELLED,
        0,
        Failure("cancelled", "the client cancelled the request", model="m", usage=Usage()),
    )
    assert core.worker(end(ONE, 0)) == [pushed(end(ONE, 0))]


def test_cancel_before_runack(core: Core) -> None:
    core.submit(ONE)
    actions = core.client(say(Kind.CANCEL, ONE))
    assert actions[0] == stop(ONE, 1)
    assert failure(actions[1])[:3] == (CLIENT, Kind.CANCELLED, 0)


def test_cancel_mid_stream(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 3))
    actions = core.client(say(Kind.CANCEL, ONE))
    assert actions[0] == stop(ONE, 1)
    peer, kind, seq, body = failure(actions[1])
    assert (peer, kind, seq, body.usage, body.worker) == (CLIENT, Kind.CANCELLED, 3, Usage(0, 3), "w1")
    core.client(say(Kind.ENDACK, ONE))
    # The slot is the worker's until it has stopped, and STOP is repeated until then.
    assert core.submit(TWO) == [accepted(TWO, 1)]
    assert core.wait(1) == [stop(ONE, 1)]
    assert core.worker(tok(ONE, 3)) == []
    assert core.worker(stopped(ONE, 4)) == [
        Send(WORKER, say(Kind.ENDACK, ONE, attempt=1)),
        run(TWO, timeout=599.0),
    ]


def test_cancel_drops_what_the_client_cannot_have(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 1024))
    core.worker(tok(ONE, 1024, 8))
    actions = core.client(say(Kind.CANCEL, ONE))
    assert failure(actions[1])[2] == 1024


def test_cancel_races_the_end(core: Core) -> None:
    core.running()
    core.worker(end(ONE, 0))
    assert core.client(say(Kind.CANCEL, ONE)) == [pushed(end(ONE, 0))]
    assert core.counted == {"submitted": 1, "finished": 1}


def test_cancel_of_what_ended_unread_drops_the_rest(core: Core) -> None:
    core.running()
    core.worker(tok(ONE, 0, 1024))
    core.worker(tok(ONE, 1024, 8))
    core.worker(end(ONE, 1032))  # it waits for the client to read
    [push] = core.client(say(Kind.CANCEL, ONE))
    assert push.data == wire.to_bytes(end(ONE, 1032))
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()


def test_the_end_races_cancel(core: Core) -> None:
    core.running()
    core.client(say(Kind.CANCEL, ONE))
    assert core.worker(end(ONE, 0)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()


def test_cancel_of_what_is_not_here_refuses_it_when_it_comes(core: Core) -> None:
    [answer] = core.client(say(Kind.CANCEL, ONE))
    assert failure(answer)[:2] == (CLIENT, Kind.CANCELLED)
    [again] = core.submit(ONE)
    assert again == answer
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()


def test_nobody_has_the_end_of_what_still_runs(core: Core) -> None:
    core.running()
    assert core.client(say(Kind.ENDACK, ONE)) == []
    core.worker(end(ONE, 0))
    assert core.client(say(Kind.ENDACK, ONE)) == [Send(WORKER, say(Kind.ENDACK, ONE, attempt=1))]
    core.assert_empty()


@pytest.mark.parametrize("held_by_a_worker", [True, False])
def test_credit_behind_a_cancel_that_a_new_broker_hears_first_is_no_offence(held_by_a_worker: bool) -> None:
    core = Core(settle=3.0)
    core.hello()
    core.register(held=1)
    if held_by_a_worker:
        held(core, ONE, 0, 200)
    core.client(say(Kind.CANCEL, ONE))
    assert core.client(say(Kind.CREDIT, ONE, seq=160, arg=96)) == []
    assert "strikes" not in core.counted


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (Kind.SUBMIT, [Kind.ERROR]),
        (Kind.ATTACH, [Kind.ERROR]),
        (Kind.CREDIT, [Kind.WHO]),
        (Kind.CANCEL, [Kind.ERROR]),
        (Kind.ENDACK, []),
    ],
)
def test_what_is_said_about_anothers_request_is_counted_and_does_nothing_to_it(
    core: Core, kind: Kind, answer: list[Kind], ended: bool
) -> None:
    core.hello(OTHER)
    core.running()
    if ended:
        core.worker(end(ONE, 0))
    parts = (codec.pack(Submit("m")), BODY) if kind in (Kind.SUBMIT, Kind.ATTACH) else ()
    assert kinds(core.client(Message(Header(kind, ONE), *parts), OTHER)) == [(OTHER, one) for one in answer]
    assert core.counted["foreign_ids"] == 1
    if ended:
        assert core.submit(ONE) == [pushed(end(ONE, 0))]
    else:
        assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]
    assert core.counted["foreign_ids"] == 1


def test_tombstones_of_unknown_cancels_are_bounded() -> None:
    core = Core(limits=Limits(client_queued=2))
    core.hello()
    for n in range(5):
        core.client(say(Kind.CANCEL, bytes([n]) * 16))
    assert len(core.tables.requests) == 2


# --- deadlines


def test_a_deadline_in_the_queue(core: Core) -> None:
    core.running(ONE)
    core.submit(TWO, timeout=2)
    [answer] = core.wait(2)
    peer, kind, seq, body = failure(answer)
    assert (peer, kind, seq, body.code) == (CLIENT, Kind.EXPIRED, 0, "deadline")
    assert core.counted["expired"] == 1


def test_very_many_deadlines_at_once_are_seen_to_some_at_a_time(core: Core) -> None:
    """Ten thousand together would hold everybody else up for a sixth of a second."""
    core = Core(limits=Limits(queued=1_000, client_queued=1_000))
    core.hello()
    core.register()
    waiting = [n.to_bytes(16) for n in range(1, 1_001)]
    for request in waiting:
        core.submit(request, timeout=2)
    core.now += 2
    told = [len(core.handle(TimerDue()))]
    core.submit(ONE, timeout=2)  # who comes in between is heard
    told += map(len, core.at_once())
    assert max(told) <= 257
    assert sum(told) == 1_000 + 1, "the request that ran is stopped, too"
    assert [r.id for r in core.tables.requests.values() if r.state is not State.DONE] == [ONE]


def test_a_deadline_mid_stream(core: Core) -> None:
    core.running(timeout=2)
    core.worker(tok(ONE, 0, 2))
    actions = core.wait(2)
    assert actions[0] == stop(ONE, 2)
    peer, kind, seq, body = failure(actions[1])
    assert (peer, kind, seq, body.code, body.usage) == (CLIENT, Kind.ERROR, 2, "deadline", Usage(0, 2))
    assert core.counted["failed"] == 1


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_timeout(core: Core, timeout: float) -> None:
    [answer] = core.submit(ONE, timeout=timeout)
    assert failure(answer)[3].code == "bad_request"
    assert "timeout" in failure(answer)[3].message
    core.assert_empty()


def test_the_body_reaches_the_second_worker_too(core: Core) -> None:
    core.register(SECOND)
    core.running()
    [again] = core.lose(WORKER)
    assert isinstance(again, Send)
    assert again.message.body == BODY


def test_the_log_follows_a_request_where_it_is_to(core: Core) -> None:
    core.tables.traced = True
    core.running(ONE, trace="00-1-2-00")
    core.worker(tok(ONE, 0))
    core.lose(WORKER)
    core.register(SECOND, name="second")
    core.worker(say(Kind.RUNACK, ONE, attempt=2), SECOND)
    core.worker(end(ONE, 1, attempt=2), SECOND)
    core.submit(TWO, model="unknown")
    said = [(log.event, {k: v for k, v in log.fields.items() if k != "request"}) for log in core.logged
            if log.fields.get("request") == ONE.hex()]  # fmt: skip
    assert [event for event, _ in said] == [
        "request accepted", "attempt begins", "attempt lost", "attempt begins", "request finished"
    ]  # fmt: skip
    assert (said[0][1]["model"], said[0][1]["trace"]) == ("m", "00-1-2-00")
    assert [(f["attempt"], f["worker"], f["tokens"]) for e, f in said if e == "attempt begins"] == [
        (1, "w1", 0), (2, "second", 1)
    ]  # fmt: skip
    assert said[-1][1]["tokens"] == 1
    assert {log.level for log in core.logged if "request" in log.fields} == {"debug"}


def test_a_refusal_is_in_that_log_too(core: Core) -> None:
    core.tables.traced = True
    core.wait(4)
    core.submit(ONE, model="unknown")
    assert core.logged[-1].fields == {"request": ONE.hex(), "model": "unknown", "code": "model_not_found"}
