from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loopmux.codec import BODY_LIMITS, pack, unpack
from loopmux.errors import EngineError
from loopmux.messages import (
    AdapterOrder,
    Done,
    End,
    Failure,
    Generate,
    Heartbeat,
    Held,
    Register,
    Run,
    ServedModel,
    SessionHint,
    Tok,
    Welcome,
)
from loopmux.results import Timing, TokenLogprob, ToolCall, Usage
from loopmux.wire import (
    VERSION,
    VERSIONS,
    WORKER_BODY_LIMIT,
    Header,
    Kind,
    Message,
    StopReason,
    pack_tokens,
    unpack_tokens,
)
from loopmux_worker.engine.base import Description, Failed, Finished, Job, Key, Load, Produced
from loopmux_worker.events import (
    Adapt,
    Adapted,
    Asked,
    Cancel,
    Cancelled,
    Connected,
    Disconnected,
    Hint,
    Leave,
    Received,
    Send,
    Stepped,
    Submit,
    Unsend,
    Woke,
)
from loopmux_worker.session import ACKNOWLEDGE_WITHIN, Session

REQUEST, OTHER = b"r" * 16, b"o" * 16
EPOCH, NEXT_EPOCH = b"e" * 8, b"f" * 8
KEY = Key(REQUEST, 1)
BUSY = Load(1, 0, 7, cached=300, computed=50)
REGISTER = Register("worker", "w1", b"b" * 16, VERSIONS, models=(ServedModel("m", "f"),), slots=4)


def message(kind, request=bytes(16), route=None, body=None, tokens=(), **header):
    attempt = header.pop("attempt", 1 if request != bytes(16) else 0)
    return Message(
        Header(kind, request, attempt=attempt, **header),
        route=pack(route) if route is not None else b"",
        body=pack(body) if body is not None else b"",
        tokens=pack_tokens(tokens),
    )


def welcome(session, epoch=EPOCH, heartbeat=1.0, to=None):
    """The answer to the REGISTER of its present connection, or ``to`` the one with this number."""
    seq = session._presence.introduction if to is None else to
    return Received(message(Kind.WELCOME, route=Welcome(VERSION, epoch, heartbeat, 2**20, 256), seq=seq))


def run(request=REQUEST, attempt=1, prefix=(), **route):
    return Received(message(Kind.RUN, request, Run("m", **route), Generate(prompt="hi"), prefix, attempt=attempt))


def produced(position, count, text="x", key=KEY, **more):
    return Produced(key, position, tuple(range(position, position + count)), text, **more)


def stepped(*outputs):
    return Stepped(outputs, BUSY)


def finished(total, key=KEY):
    return Finished(key, total, "stop", Usage(3, total), Timing())


def sent(actions):
    return [action.message for action in actions if isinstance(action, Send)]


def kinds(actions):
    return [m.kind for m in sent(actions)]


def joined(at=0.0):
    session = Session(REGISTER, {"engine": "test"}, at)
    session.handle(Woke(), at)
    session.handle(welcome(session), at)
    return session


def running(at=0.0, **options):
    session = joined(at)
    session.handle(run(**options), at)
    assert kinds(session.handle(run(**options), at)) == [Kind.RUNACK]
    return session


def test_register_is_repeated_until_welcome_and_nothing_else_is_said():
    session = Session(REGISTER, {"engine": "test"}, 10.0)
    (first,) = sent(session.handle(Woke(), 10.0))
    assert (first.kind, unpack(Register, first.route)) == (Kind.REGISTER, REGISTER)
    assert session.next_timer() == 10.5
    assert kinds(session.handle(Woke(), 10.5)) == [Kind.REGISTER]
    assert session.handle(run(), 10.6) == []
    assert session.handle(welcome(session), 10.7) == []
    assert session.next_timer() == 11.7


def test_a_fresh_connection_is_used_at_once():
    session = Session(REGISTER, {}, 0.0)
    session.handle(Woke(), 0.0)
    assert kinds(session.handle(Connected(), 0.01)) == [Kind.REGISTER]
    session.handle(welcome(session), 0.02)
    assert session.handle(Connected(), 0.03) == []


def test_a_welcome_from_the_connection_that_is_gone_is_none_to_the_new_one():
    session = Session(REGISTER, {}, 0.0)
    [old] = sent(session.handle(Woke(), 0.0))
    session.handle(Disconnected(), 0.1)
    assert session.handle(welcome(session, to=old.header.seq), 0.2) == []  # it had come in before
    [new] = sent(session.handle(Connected(), 0.3))
    assert new.header.seq > old.header.seq
    assert session.handle(welcome(session, to=old.header.seq), 0.4) == []
    assert not session.welcomed
    session.handle(welcome(session, to=new.header.seq), 0.5)
    assert session.welcomed


def test_a_register_that_is_repeated_may_be_answered_late():
    session = Session(REGISTER, {}, 0.0)
    [first] = sent(session.handle(Woke(), 0.0))
    [second] = sent(session.handle(Woke(), 0.5))
    assert first.header == second.header
    session.handle(welcome(session, to=first.header.seq), 0.6)
    assert session.welcomed


def test_a_hint_about_a_session_is_the_engine_s():
    hint = SessionHint("s", "waiting_on_tool", 2.5)
    assert joined().handle(Received(message(Kind.SESSION, route=hint)), 0.1) == [Hint(hint)]


def test_heartbeats_carry_load_progress_and_rate():
    session = running()
    session.handle(Stepped((produced(0, 8),), replace(BUSY, progress=2**32 + 7)), 0.5)
    (beat,) = sent(session.handle(Woke(), 1.0))
    assert beat.header == Header(Kind.HB, seq=7)  # of 32 bits
    assert unpack(Heartbeat, beat.route) == Heartbeat(1, 0, 8.0, cached_tokens=300, computed_tokens=50)
    session.handle(Received(message(Kind.PONG)), 1.1)
    (beat,) = [m for m in sent(session.handle(Woke(), 2.0)) if m.kind is Kind.HB]
    assert unpack(Heartbeat, beat.route).tokens_per_second == 0


def test_heartbeats_are_no_closer_than_a_worker_can_bear():
    session = Session(REGISTER, {}, 0.0)
    session.handle(Woke(), 0.0)
    session.handle(welcome(session, heartbeat=0.001), 0.0)
    assert session.next_timer() == 0.05
    assert kinds(session.handle(Woke(), 0.05)) == [Kind.HB]
    assert session.next_timer() == 0.1


def test_run_is_submitted_once_and_acknowledged_where_no_output_does_so():
    session = joined()
    assert session.handle(run(prefix=(5, 6)), 0.0) == [Submit(Job(KEY, Run("m"), Generate(prompt="hi"), (5, 6), 0.0))]
    assert session.next_timer() == ACKNOWLEDGE_WITHIN
    acknowledged = Send(Message(Header(Kind.RUNACK, REQUEST, attempt=1)))
    assert session.handle(Woke(), ACKNOWLEDGE_WITHIN) == [acknowledged]
    assert session.next_timer() == 1.0  # the heartbeat
    assert session.handle(run(prefix=(5, 6)), 0.9) == [acknowledged]


def test_a_later_attempt_is_acknowledged_before_it_begins():
    """The broker tells by it whether a worker that is lost then was lost with the request."""
    acknowledged, *begun = joined().handle(run(attempt=2), 0.0)
    assert acknowledged == Send(Message(Header(Kind.RUNACK, REQUEST, attempt=2)))
    assert [type(action) for action in begun] == [Submit]


def test_output_is_as_good_as_runack():
    session = joined()
    session.handle(run(), 0.0)
    assert kinds(session.handle(stepped(produced(0, 1)), 0.01)) == [Kind.TOK]
    assert session.next_timer() == 1.0
    assert session.handle(Woke(), ACKNOWLEDGE_WITHIN) == []


def test_what_could_not_go_out_acknowledges_nothing():
    session = joined()
    session.handle(run(), 0.0)
    session.handle(Disconnected(), 0.01)
    assert session.handle(stepped(produced(0, 1)), 0.02) == []
    session.handle(welcome(session), 0.03)
    assert kinds(session.handle(replay(0), 0.04)) == [Kind.TOK]


def test_two_attempts_of_one_request_live_side_by_side():
    session = running()
    assert Submit(Job(Key(REQUEST, 2), Run("m"), Generate(prompt="hi"), arrived=0.0)) in session.handle(
        run(attempt=2), 0.0
    )
    assert session.requests == 2


def test_an_unreadable_body_is_an_error_for_its_sender_alone():
    session = joined()
    broken = Message(Header(Kind.RUN, REQUEST, attempt=1), route=pack(Run("m")), body=b"\xc1")
    (error,) = sent(session.handle(Received(broken), 0.0))
    assert error.kind is Kind.ERROR
    failure = unpack(Failure, error.body)
    assert (failure.code, failure.worker) == ("bad_request", "w1")
    assert session.handle(run(request=OTHER), 0.0) != []


@pytest.mark.parametrize("field", [b"\xa6prompt", b"\xa8messages\x91\x81\xa7content", b"\xa5tools\x91\x81\xa4type"])
@pytest.mark.parametrize("levels", [80, 1000])
def test_a_body_that_is_nested_without_end_is_an_error_for_its_sender_alone(field, levels):
    session = joined()
    body = b"\x81" + field + b"\x91" * levels + b"\xc0"
    deep = Message(Header(Kind.RUN, REQUEST, attempt=1), route=pack(Run("m")), body=body)
    (error,) = sent(session.handle(Received(deep), 0.0))
    assert unpack(Failure, error.body).code == "bad_request"
    assert session.handle(run(request=OTHER), 0.0) != []


def test_the_first_token_goes_at_once_then_eight_or_twenty_milliseconds():
    session = running(0.9)
    assert [(m.header.seq, m.header.arg) for m in sent(session.handle(stepped(produced(0, 1)), 1.0))] == [(0, 1)]
    assert session.handle(stepped(produced(1, 3, "a")), 1.005) == []
    assert session.next_timer() == 1.02
    (tok,) = sent(session.handle(Woke(), 1.02))
    assert (tok.header.seq, tok.header.arg, unpack_tokens(tok.tokens)) == (1, 3, [1, 2, 3])
    assert session.handle(stepped(produced(4, 4, "b")), 1.025) == []
    (tok,) = sent(session.handle(stepped(produced(8, 4, "c")), 1.026))
    assert (tok.header.seq, tok.header.arg, unpack(Tok, tok.body).text) == (4, 8, "bc")


def test_a_terminal_flushes_first_and_repeats_until_acknowledged():
    session = running()
    session.handle(stepped(produced(0, 1)), 1.0)
    brought = {"calls": (ToolCall("call_0", "add", {"a": 1}),), "logprobs": (TokenLogprob(2, -0.5),), "reasoning": "hm"}
    tok, end = sent(session.handle(stepped(produced(1, 2, **brought), finished(3)), 1.001))
    assert unpack(Tok, tok.body) == Tok("x", **brought)
    assert end.header == Header(Kind.END, REQUEST, seq=3, attempt=1)
    assert unpack(End, end.body) == End("stop", Usage(3, 3), Timing(), "m", "w1")
    assert [m for m in sent(session.handle(Woke(), 2.001)) if m.kind is not Kind.HB] == [end]
    session.handle(Received(message(Kind.ENDACK, REQUEST)), 2.5)
    assert session.requests == 0


def test_an_unacknowledged_terminal_is_forgotten_after_a_minute():
    session = running()
    session.handle(stepped(finished(0)), 1.0)
    at = 1.0
    while session.requests:
        at = session.next_timer()
        session.handle(Woke(), at)
        session.handle(Received(message(Kind.PONG)), at)
    assert 60 <= at - 1.0 <= 62


def test_stop_becomes_cancelled_with_the_usage_so_far():
    session = running()
    session.handle(stepped(produced(0, 1), produced(1, 1, "y")), 1.0)
    stop = Received(message(Kind.STOP, REQUEST, arg=1))
    assert session.handle(stop, 1.001) == [Cancel(KEY)]
    assert session.handle(stop, 1.002) == []
    tok, cancelled = sent(session.handle(Cancelled(KEY, Usage(3, 2)), 1.003))
    assert (tok.header.seq, unpack(Tok, tok.body).text) == (1, "y")
    assert cancelled.header == Header(Kind.CANCELLED, REQUEST, seq=2, attempt=1)
    failure = unpack(Failure, cancelled.body)
    assert (failure.code, failure.usage) == ("cancelled", Usage(3, 2))
    assert sent(session.handle(stop, 1.5)) == [cancelled]


def test_stop_for_a_deadline_says_so():
    session = running()
    session.handle(Received(message(Kind.STOP, REQUEST, arg=2)), 1.0)
    (cancelled,) = sent(session.handle(Cancelled(KEY, Usage(3, 0)), 1.0))
    assert unpack(Failure, cancelled.body).code == "deadline"


def test_an_end_that_overtakes_stop_is_the_answer():
    session = running()
    session.handle(Received(message(Kind.STOP, REQUEST, arg=1)), 1.0)
    assert kinds(session.handle(stepped(finished(0)), 1.0)) == [Kind.END]
    assert session.handle(Cancelled(KEY, None), 1.0) == []


def test_stop_for_an_unknown_request_is_answered():
    (cancelled,) = sent(joined().handle(Received(message(Kind.STOP, OTHER, arg=1)), 1.0))
    assert (cancelled.kind, cancelled.header.request) == (Kind.CANCELLED, OTHER)


def test_reset_drops_without_an_answer():
    session = running()
    assert session.handle(Received(message(Kind.RESET, REQUEST)), 1.0) == [Cancel(KEY)]
    assert session.handle(stepped(produced(0, 1), finished(1)), 1.1) == []
    assert session.handle(Cancelled(KEY, Usage(1, 1)), 1.2) == []
    assert session.requests == 0


def test_a_passed_deadline_ends_the_request_even_without_the_broker():
    session = running(timeout=5.0)
    times = []
    while not times or Cancel(KEY) not in times[-1][1]:
        at = session.next_timer()
        times.append((at, session.handle(Woke(), at)))
        session.handle(Received(message(Kind.PONG)), at)
    assert times[-1][0] == 6.0
    (error,) = [m for m in sent(session.handle(Cancelled(KEY, Usage(1, 0)), 6.0)) if m.kind is not Kind.HB]
    assert (error.kind, unpack(Failure, error.body).code) == (Kind.ERROR, "deadline")


def test_an_engine_failure_carries_code_and_usage():
    session = running()
    (error,) = sent(session.handle(stepped(Failed(KEY, EngineError("boom"), Usage(4, 0))), 1.0))
    failure = unpack(Failure, error.body)
    assert (failure.code, failure.message, failure.usage, failure.model) == ("engine", "boom", Usage(4, 0), "m")


def test_an_error_of_many_words_is_shortened_and_keeps_its_code():
    words = "out of memory" + "!" * WORKER_BODY_LIMIT + ": the cause"
    (error,) = sent(running().handle(stepped(Failed(KEY, EngineError(words))), 1.0))
    failure = unpack(Failure, error.body, BODY_LIMITS)
    assert failure.code == "engine"
    assert (failure.message[:13], failure.message[-11:]) == ("out of memory", ": the cause")
    assert len(error.body) < WORKER_BODY_LIMIT


def test_output_that_cannot_be_sent_ends_its_request_alone():
    session = running()
    huge = "x" * (2 * 1024 * 1024)
    actions = session.handle(stepped(produced(0, 1, huge)), 1.0)
    assert actions[0] == Cancel(KEY)
    (error,) = sent(actions)
    assert (error.kind, error.header.seq, unpack(Failure, error.body).code) == (Kind.ERROR, 0, "engine")
    actions = session.handle(run(request=OTHER), 1.0)
    actions = session.handle(stepped(produced(5, 1, key=Key(OTHER, 1))), 1.0)
    assert "position 5" in unpack(Failure, sent(actions)[0].body).message


def test_acknowledged_output_is_not_kept_and_the_rest_comes_again_unchanged():
    session = running()
    first = sent(session.handle(stepped(produced(0, 8)), 1.0))
    second = sent(session.handle(stepped(produced(8, 8)), 1.1))
    session.handle(Received(message(Kind.TOKACK, REQUEST, arg=8)), 1.2)
    assert session.handle(Disconnected(), 1.3) == [Unsend()]
    assert session.handle(stepped(produced(16, 8), finished(24)), 1.4) == []
    assert kinds(session.handle(Woke(), 1.5)) == [Kind.REGISTER]
    [held] = sent(session.handle(welcome(session), 1.6))
    assert held.header == Header(Kind.HELD, REQUEST, seq=8, arg=24, attempt=1)
    again = sent(session.handle(replay(8), 1.7))
    assert again[0] == second[0]
    assert first[0] not in again
    assert [(m.kind, m.header.seq) for m in again] == [(Kind.TOK, 8), (Kind.TOK, 16), (Kind.END, 24)]


def replay(start, request=REQUEST, attempt=1, acknowledged=0):
    return Received(message(Kind.REPLAY, request, seq=start, arg=acknowledged, attempt=attempt))


def test_a_replay_names_what_the_client_has_and_only_that_is_let_go():
    """What the broker alone has is not sent again, and kept: the broker may die with it."""
    session = running()
    for n in range(3):
        session.handle(stepped(produced(8 * n, 8)), 1.0 + n / 10)
    session.handle(Disconnected(), 1.3)
    session.handle(welcome(session), 1.4)
    assert [m.header.seq for m in sent(session.handle(replay(16, acknowledged=8), 1.5))] == [16]
    session.handle(Disconnected(), 1.6)
    [held] = sent(session.handle(welcome(session, NEXT_EPOCH), 1.7))
    assert held.header == Header(Kind.HELD, REQUEST, seq=8, arg=24, attempt=1)
    assert [m.header.seq for m in sent(session.handle(replay(8, acknowledged=8), 1.8))] == [8, 16]


def test_output_that_waits_for_a_minute_is_let_go():
    """Nothing older can be asked for, and a client that acknowledges nothing must not fill the worker."""
    session = running(timeout=1000.0)
    for position, at in ((0, 1.0), (8, 2.0)):
        session.handle(stepped(produced(position, 8)), at)
    at = 2.0
    while at < 61.0:
        at = session.next_timer()
        session.handle(Woke(), at)
        session.handle(Received(message(Kind.PONG)), at)
    assert at == 61.0
    session.handle(Received(message(Kind.WHO)), 61.5)
    [held] = sent(session.handle(welcome(session), 61.6))
    assert held.header == Header(Kind.HELD, REQUEST, seq=8, arg=16, attempt=1)


def test_the_first_tokens_of_an_attempt_come_with_the_name_of_the_weights():
    session = running(prefix=(7, 7))
    first = sent(session.handle(stepped(produced(2, 1)), 1.0))
    more = sent(session.handle(stepped(produced(3, 8)), 1.1))
    assert [unpack(Tok, m.body).fingerprint for m in first + more] == ["f", ""]


@pytest.mark.parametrize(
    ("model", "adapter", "expected"),
    [
        ("m", None, "f"),
        ("a", None, "g"),
        ("a", "red", "g"),
        ("m", "a", "f+g"),
        ("m", "blue", "f+blue"),
        ("n", None, ""),
    ],
)
def test_what_names_the_weights(model, adapter, expected):
    served = (ServedModel("m", "f"), ServedModel("a", "g", adapter="red"))
    assert replace(REGISTER, models=served).fingerprint(model, adapter) == expected


def test_what_is_held_is_announced_and_repeated_until_the_broker_has_said_what_it_wants():
    session = running()
    session.handle(run(request=OTHER, client=b"c" * 16), 0.0)
    session.handle(Disconnected(), 1.0)
    [register] = sent(session.handle(Woke(), 1.1))
    assert unpack(Register, register.route).held == 2
    held = sent(session.handle(welcome(session, NEXT_EPOCH), 1.2))
    assert [(m.kind, m.header.request) for m in held] == [(Kind.HELD, REQUEST), (Kind.HELD, OTHER)]
    assert unpack(Held, held[1].route) == Held(b"c" * 16, "m", epoch=EPOCH)
    assert session.handle(stepped(produced(0, 8)), 1.3) == []  # not before it is asked for
    assert [m.header.seq for m in sent(session.handle(replay(0), 1.4))] == [0]
    assert session.handle(Received(message(Kind.RESET, OTHER)), 1.5) == [Cancel(Key(OTHER, 1))]
    assert Kind.HELD not in kinds(session.handle(Woke(), 2.5))
    assert session.requests == 1
    session.handle(Disconnected(), 2.6)
    [again] = sent(session.handle(welcome(session, b"g" * 8), 2.7))
    assert unpack(Held, again.route).epoch == NEXT_EPOCH, "that of the broker that asked for it"


def test_held_is_repeated():
    session = running()
    session.handle(Disconnected(), 1.0)
    session.handle(welcome(session, NEXT_EPOCH), 1.2)
    assert session.next_timer() == 2.2
    assert kinds(session.handle(Woke(), 2.2)) == [Kind.HB, Kind.HELD]


def test_a_new_broker_that_gives_the_same_attempt_again_gets_what_is_here():
    session = running()
    session.handle(stepped(produced(0, 8)), 1.0)
    session.handle(Disconnected(), 1.1)
    session.handle(welcome(session, NEXT_EPOCH), 1.2)
    actions = session.handle(run(), 1.3)
    assert kinds(actions) == [Kind.RUNACK, Kind.TOK]
    assert not any(isinstance(a, Submit) for a in actions)


def test_an_attempt_of_the_same_number_behind_another_prefix_is_another_attempt():
    session = running()
    session.handle(stepped(produced(0, 8)), 1.0)
    session.handle(Disconnected(), 1.1)
    session.handle(welcome(session, NEXT_EPOCH), 1.2)
    actions = session.handle(run(prefix=(0, 1)), 1.3)
    assert actions[0] == Cancel(KEY)
    assert [(m.kind, m.header.attempt) for m in sent(actions)] == [(Kind.RESET, 1)]
    assert session.requests == 0


def test_what_was_dropped_does_not_end_what_is_run_under_its_number():
    session = running()
    assert session.handle(Received(message(Kind.RESET, REQUEST)), 1.0) == [Cancel(KEY)]
    session.handle(run(), 1.1)
    assert session.handle(Cancelled(KEY, Usage(3, 8)), 1.11) == []
    assert kinds(session.handle(stepped(produced(0, 1), finished(1)), 1.12)) == [Kind.TOK, Kind.END]


def test_replay_of_what_is_not_here_says_so():
    session = joined()
    assert [m.header for m in sent(session.handle(replay(3), 1.0))] == [Header(Kind.RESET, REQUEST, attempt=1)]


def test_stop_while_held_is_answered():
    session = running()
    session.handle(stepped(finished(0)), 1.0)
    session.handle(Disconnected(), 1.1)
    session.handle(welcome(session, NEXT_EPOCH), 1.2)
    stop = Received(message(Kind.STOP, REQUEST, arg=StopReason.SUPERSEDED))
    assert kinds(session.handle(stop, 1.3)) == [Kind.END]


@pytest.mark.parametrize("ended", [False, True])
def test_what_was_stopped_is_not_offered_to_a_broker(ended):
    """It would be taken up, and the client told that it was cancelled."""
    session = running()
    stop = Received(message(Kind.STOP, REQUEST, arg=StopReason.SUPERSEDED))
    session.handle(stop, 1.0)
    if ended:
        session.handle(Cancelled(KEY, None), 1.0)
    [register] = [m for m in sent(session.handle(Received(message(Kind.WHO)), 1.1)) if m.kind is Kind.REGISTER]
    assert unpack(Register, register.route).held == 0
    assert session.handle(welcome(session), 1.2) == []
    assert session.handle(Cancelled(KEY, None), 1.3) == []
    assert kinds(session.handle(stop, 2.0)) == [Kind.CANCELLED], "who still waits for it asks again"


def test_without_a_broker_output_is_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("loopmux_worker.session.BUFFER", 100)
    session = running()
    session.handle(stepped(produced(0, 8, "x" * 200)), 1.0)
    assert not session.full  # a broker that is there takes it
    session.handle(Disconnected(), 1.1)
    assert session.full
    session.handle(welcome(session, NEXT_EPOCH), 1.2)
    assert session.full  # it has not said yet what it wants
    session.handle(Received(message(Kind.REPLAY, REQUEST, seq=0, arg=0)), 1.3)
    assert not session.full


def test_what_nobody_claims_keeps_the_engine_waiting_for_a_second_at_most(monkeypatch):
    """It would stop for up to 30 s else, with all that runs there, and be taken for hung."""
    monkeypatch.setattr("loopmux_worker.session.BUFFER", 600)
    session = running()
    session.handle(run(OTHER), 0.0)
    small = Key(OTHER, 1)
    session.handle(Received(message(Kind.WHO)), 1.0)
    assert kinds(session.handle(welcome(session, NEXT_EPOCH), 1.1)) == [Kind.HELD, Kind.HELD]
    session.handle(stepped(produced(0, 8, "x" * 300)), 1.2)
    session.handle(stepped(produced(0, 8, "x" * 100, small)), 1.2)
    assert not session.full
    session.handle(stepped(produced(8, 8, "x" * 300)), 1.3)
    assert session.full
    assert session.next_timer() <= 2.1
    assert kinds(session.handle(Woke(), 2.09)) == []
    actions = [a for a in session.handle(Woke(), 2.1) if not (isinstance(a, Send) and a.message.kind is Kind.HB)]
    assert actions[0] == Cancel(KEY)
    assert sent(actions) == [message(Kind.RESET, REQUEST), session._held(session._requests[small]).message]
    assert not session.full
    assert session.handle(stepped(produced(16, 8, "x" * 300)), 2.2) == []  # until the engine hears of it
    [tok] = sent(session.handle(Received(message(Kind.REPLAY, OTHER, seq=0, arg=0)), 2.3))
    assert tok.kind is Kind.TOK
    [not_here] = sent(session.handle(Received(message(Kind.REPLAY, REQUEST, seq=0, arg=0)), 2.4))
    assert not_here.kind is Kind.RESET


def test_who_makes_the_worker_introduce_itself():
    session = running()
    actions = session.handle(Received(message(Kind.WHO)), 1.0)
    assert actions[0] == Unsend()
    assert kinds(actions) == [Kind.REGISTER]
    assert kinds(session.handle(welcome(session), 1.1)) == [Kind.HELD]
    assert session.requests == 1


def test_who_while_it_introduces_itself_answers_what_the_connection_before_left_behind():
    """A thousand TOK may reach the next broker before REGISTER does: each is answered with WHO."""
    session = running()
    session.handle(Disconnected(), 1.0)
    assert kinds(session.handle(Connected(), 1.1)) == [Kind.REGISTER]
    assert session.handle(Received(message(Kind.WHO)), 1.2) == []
    assert kinds(session.handle(welcome(session, NEXT_EPOCH), 1.3)) == [Kind.HELD]


@pytest.mark.parametrize("kind", [Kind.STOP, Kind.REPLAY])
def test_what_was_asked_before_the_worker_introduced_itself_again_is_not_answered_behind_it(kind):
    """The broker may have given the same attempt out again by then, and would take the answer for its end."""
    session = joined()
    asked = Received(message(kind, REQUEST, arg=1))
    assert kinds(session.handle(Received(message(Kind.WHO)), 1.0)) == [Kind.REGISTER]
    assert session.handle(asked, 1.1) == []
    session.handle(welcome(session), 1.2)
    assert len(sent(session.handle(asked, 1.3))) == 1


def test_register_waits_for_room_before_all_else():
    session = running()
    session.handle(Disconnected(), 1.0)
    unsend, register = session.handle(Connected(), 1.1)
    assert unsend == Unsend()
    assert register.lasting


def test_three_silent_heartbeats_make_it_pause_and_register():
    session = running()
    for at in (1.0, 2.0):
        assert kinds(session.handle(Woke(), at)) == [Kind.HB]
    assert session.handle(stepped(produced(0, 1)), 2.5) != []
    assert kinds(session.handle(Woke(), 3.0)) == [Kind.REGISTER]
    assert session.handle(stepped(produced(1, 8)), 3.1) == []
    assert kinds(session.handle(welcome(session), 3.4)) == [Kind.HELD]
    assert kinds(session.handle(replay(0), 3.5)) == [Kind.TOK, Kind.TOK]


def test_a_welcome_from_another_broker_process_has_it_say_what_it_has():
    session = running()
    assert session.handle(welcome(session), 1.0) == []  # REGISTER was said again before the first one
    assert kinds(session.handle(welcome(session, NEXT_EPOCH), 1.1)) == [Kind.HELD]


@pytest.mark.parametrize("until", [3.0, 100.0])
def test_a_process_that_was_suspended_does_not_blame_the_broker(until):
    session = running()
    assert kinds(session.handle(Woke(), until)) == [Kind.HB]


def test_requests_of_a_broker_that_stays_away_are_given_up_after_a_minute():
    session = running(timeout=1000.0)
    session.handle(Disconnected(), 1.0)
    at, actions = 1.0, []
    while Cancel(KEY) not in actions:
        at = session.next_timer()
        actions = session.handle(Woke(), at)
    assert at == 61.0
    assert session.requests == 0


@pytest.mark.parametrize("reason", ["no common version", "the worker name 'w' is taken " * 500])
def test_refusal_at_registration_ends_the_process_with_the_reason(reason):
    session = Session(REGISTER, {}, 0.0)
    (leave,) = session.handle(Received(message(Kind.ERROR, body=Failure("protocol", reason))), 0.1)
    assert isinstance(leave, Leave)
    assert reason in leave.error.message


def test_an_impossible_welcome_ends_the_process():
    session = Session(REGISTER, {}, 0.0)
    (leave,) = session.handle(welcome(session, heartbeat=0.0), 0.1)
    assert isinstance(leave, Leave)
    assert "refused this worker: it sent an impossible WELCOME" in leave.error.message


def test_asked_to_end_with_nothing_to_do_it_says_goodbye():
    actions = joined().handle(Asked(), 1.0)
    assert kinds(actions) == [Kind.BYE]
    assert actions[-1] == Leave()


def test_asked_to_end_it_lets_what_runs_end_first():
    session = running()
    [drain] = sent(session.handle(Asked(), 1.0))
    assert drain.header == Header(Kind.DRAIN, arg=1500)
    assert kinds(session.handle(stepped(produced(0, 1), finished(1)), 1.2)) == [Kind.TOK, Kind.END]
    actions = session.handle(Received(message(Kind.ENDACK, REQUEST)), 1.3)
    assert kinds(actions) == [Kind.BYE]
    assert actions[-1] == Leave()


def test_what_does_not_end_is_left_behind():
    session = running()
    session.handle(Asked(), 0.2)
    assert kinds(session.handle(Woke(), 1.2)) == [Kind.HB, Kind.DRAIN]  # it may have been lost
    assert session.next_timer() == 1.7
    actions = session.handle(Woke(), 1.7)
    assert kinds(actions) == [Kind.BYE]
    assert actions[-1] == Leave()


def test_asked_twice_it_goes_at_once():
    session = running()
    session.handle(Asked(), 0.2)
    assert session.handle(Asked(), 0.2)[-1] == Leave()


def drained(within: float) -> Received:
    return Received(Message(Header(Kind.DRAIN, arg=round(1000 * within))))


def test_drained_it_says_so_and_leaves_when_its_time_is_over():
    session = running()
    [drain] = sent(session.handle(drained(10), 1.0))
    assert drain.header == Header(Kind.DRAIN, arg=10_000)
    for when in range(2, 11):
        session.handle(Received(message(Kind.PONG)), when - 0.5)
        assert Kind.DRAIN in kinds(session.handle(Woke(), when))
    actions = session.handle(Woke(), 11.0)
    assert kinds(actions)[-1] == Kind.BYE
    assert actions[-1] == Leave()


def test_drained_with_nothing_to_do_it_leaves_at_once():
    actions = joined().handle(drained(10), 1.0)
    assert kinds(actions) == [Kind.DRAIN, Kind.BYE]
    assert actions[-1] == Leave()


def test_drained_it_leaves_when_what_ran_has_ended():
    session = running()
    session.handle(drained(10), 1.0)
    session.handle(stepped(produced(0, 1), finished(1)), 1.2)
    assert session.handle(Received(message(Kind.ENDACK, REQUEST)), 1.3)[-1] == Leave()


def test_a_signal_while_it_is_drained_shortens_its_time():
    session = running()
    session.handle(drained(10), 0.2)
    assert kinds(session.handle(Asked(), 0.3)) == [Kind.DRAIN]
    session.handle(drained(10), 0.4)
    assert Leave() in session.handle(Woke(), 1.8)


def test_one_whose_engine_hangs_ends_with_an_error():
    [leave] = running().handle(Received(message(Kind.DIE)), 1.0)
    assert isinstance(leave.error, EngineError)


def test_acknowledgements_without_an_attempt_count_for_all_of_the_request():
    session = running()
    session.handle(stepped(finished(0)), 1.0)
    session.handle(Received(message(Kind.ENDACK, REQUEST, attempt=0)), 1.1)
    assert session.requests == 0


def test_bodies_are_read_within_the_limits_of_bodies():
    session = joined()
    generate = Generate(prompt_token_ids=pack_tokens(range(3000)))
    received = Received(Message(Header(Kind.RUN, REQUEST, attempt=1), route=pack(Run("m")), body=pack(generate)))
    assert unpack(Generate, pack(generate), BODY_LIMITS) == generate
    assert isinstance(session.handle(received, 0.0)[-1], Submit)


def test_a_signal_does_not_end_what_an_administrator_has_given_time():
    session = running()
    session.handle(drained(60), 1.0)
    assert kinds(session.handle(Asked(240.0), 2.0)) == [Kind.DRAIN]
    [drain] = sent(session.handle(Asked(), 3.0))
    assert drain.header == Header(Kind.DRAIN, arg=1500)
    assert session.handle(Asked(), 3.1)[-1] == Leave()


def test_asked_to_take_its_time_it_takes_it_until_it_is_asked_to_hurry():
    session = running()
    [drain] = sent(session.handle(Asked(240.0), 1.0))
    assert drain.header == Header(Kind.DRAIN, arg=240_000)
    [drain] = sent(session.handle(Asked(), 2.0))
    assert drain.header == Header(Kind.DRAIN, arg=1500)
    assert session.handle(Asked(), 2.1)[-1] == Leave()
    patient = running()
    patient.handle(Asked(240.0), 1.0)
    assert patient.handle(Asked(240.0), 2.0)[-1] == Leave()


# --- adapters at run time ---------------------------------------------------------------------------------------------

LOUD = ServedModel("loud", "f-loud", "loud")
ORDER = AdapterOrder("m", "loud", "/adapters/loud")


def ordered(kind=Kind.LOAD, id_=OTHER, order=ORDER):
    return Received(Message(Header(kind, id_), pack(order)))


def adapted(*models, id_=OTHER, **report):
    description = Description("", (ServedModel("m", "f"), *models), 4, tuple(m.id for m in models), report)
    return Adapted(id_, ORDER, description)


def answered(actions):
    return [unpack(Done, m.body) for m in sent(actions) if m.kind is Kind.DONE]


def test_an_adapter_is_loaded_by_the_engine_announced_and_part_of_every_introduction_from_then_on():
    session = joined()
    assert session.handle(ordered(), 1.0) == [Adapt(OTHER, ORDER, load=True)]
    assert session.handle(ordered(), 1.5) == []  # it is at it
    actions = session.handle(adapted(LOUD, adapters={"loud": "c0ffee"}), 2.0)
    assert answered(actions) == [Done(content="c0ffee", served=LOUD)]
    [_, again] = session.handle(Received(message(Kind.WHO)), 2.5)
    register = unpack(Register, again.message.route)
    assert (register.models, register.adapters) == ((ServedModel("m", "f"), LOUD), ("loud",))
    assert unpack(dict, again.message.body) == {"engine": "test", "adapters": {"loud": "c0ffee"}}


def test_a_request_with_an_adapter_that_was_loaded_is_told_its_weights():
    session = joined()
    session.handle(ordered(), 1.0)
    session.handle(adapted(LOUD), 2.0)
    session.handle(run(adapter="loud"), 3.0)
    [tok] = sent(session.handle(stepped(produced(0, 1)), 3.0))
    assert unpack(Tok, tok.body).fingerprint == "f+f-loud"


def test_what_cannot_be_loaded_is_answered_with_the_reason_and_changes_nothing():
    session = joined()
    session.handle(ordered(), 1.0)
    [done] = answered(session.handle(Adapted(OTHER, ORDER, None, EngineError("it does not fit " * 500)), 2.0))
    assert (done.failure.code, done.failure.worker, done.served) == ("engine", "w1", None)
    assert len(done.failure.message) <= 2000
    [_, again] = session.handle(Received(message(Kind.WHO)), 2.5)
    assert unpack(Register, again.message.route) == REGISTER


def test_an_adapter_is_unloaded():
    session = joined()
    session.handle(ordered(), 1.0)
    session.handle(adapted(LOUD), 2.0)
    unload = AdapterOrder("m", "loud")
    assert session.handle(ordered(Kind.UNLOAD, REQUEST, unload), 3.0) == [Adapt(REQUEST, unload, load=False)]
    assert answered(session.handle(adapted(id_=REQUEST), 3.5)) == [Done()]
    [_, again] = session.handle(Received(message(Kind.WHO)), 4.0)
    assert unpack(Register, again.message.route) == REGISTER


def test_more_than_can_be_announced_is_unloaded_again():
    session = joined()
    session.handle(ordered(), 1.0)
    many = tuple(ServedModel(f"adapter-{i}" + "x" * 40, "f", None) for i in range(70))
    actions = session.handle(adapted(*many, LOUD), 2.0)
    assert actions[0] == Adapt(OTHER, ORDER, load=False)
    [done] = answered(actions)
    assert done.failure.code == "config"
    assert "spread them over several workers" in done.failure.message
    [_, again] = session.handle(Received(message(Kind.WHO)), 2.5)
    assert unpack(Register, again.message.route) == REGISTER


def test_what_was_loaded_since_register_was_sent_is_said_in_another_one_and_the_first_is_not_answered():
    session = joined()
    session.handle(ordered(), 1.0)
    session.handle(Disconnected(), 1.5)
    [_, first] = session.handle(Connected(), 2.0)
    assert unpack(Register, first.message.route).models == (ServedModel("m", "f"),)
    assert session.handle(adapted(LOUD), 2.1) == []
    assert session.next_timer() <= 2.1
    session.handle(welcome(session, to=first.message.header.seq), 2.1)
    assert not session.welcomed
    [_, again] = session.handle(Woke(), 2.1)
    assert unpack(Register, again.message.route).models == (ServedModel("m", "f"), LOUD)
    session.handle(welcome(session), 2.2)
    assert session.welcomed


def test_an_adapter_that_was_loaded_while_the_broker_was_away_is_in_the_next_introduction():
    session = joined()
    session.handle(ordered(), 1.0)
    session.handle(Disconnected(), 1.5)
    assert session.handle(ordered(id_=REQUEST), 1.6) == []  # of a connection that is gone
    assert sent(session.handle(adapted(LOUD), 2.0)) == []
    [register] = [m for m in sent(session.handle(Connected(), 2.5)) if m.kind is Kind.REGISTER]
    assert LOUD in unpack(Register, register.route).models


# --- whatever happens -------------------------------------------------------------------------------------------------

HAPPENINGS = {
    "run": lambda session: run(timeout=50.0),
    "run again": lambda session: run(attempt=2, prefix=(7,)),
    "tokens": lambda session: stepped(*(produced(r.stream.end, 1, key=key) for key, r in session._requests.items())),
    "end": lambda session: stepped(*(finished(r.stream.end, key) for key, r in session._requests.items())),
    "stop": lambda session: Received(message(Kind.STOP, REQUEST, arg=1)),
    "cancelled": lambda session: Cancelled(KEY, None),
    "reset": lambda session: Received(message(Kind.RESET, REQUEST)),
    "replay": lambda session: replay(0),
    "endack": lambda session: Received(message(Kind.ENDACK, REQUEST)),
    "tokack": lambda session: Received(message(Kind.TOKACK, REQUEST, arg=1)),
    "who": lambda session: Received(message(Kind.WHO)),
    "lost": lambda session: Disconnected(),
    "connected": lambda session: Connected(),
    "welcome": lambda session: welcome(session, NEXT_EPOCH),
    "drain": lambda session: drained(100),
    "alarm": lambda session: Woke(),
}


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(sorted(HAPPENINGS)), st.sampled_from([0.0, 0.01, 0.5, 20.0])), max_size=25))
@example([("run", 0.0), ("cancelled", 60.0)])
def test_alarms_soon_leave_nothing_to_do_at_their_time(happened):
    """Else the loop that waits for the next one would not wait, and take a whole core."""
    session, now = joined(), 0.0
    for name, later in happened:
        now += later
        session.handle(HAPPENINGS[name](session), now)
    end = now + 100.0
    while now < end:
        now = max(now, session.next_timer())
        for _ in range(3):  # a request does one thing at a time
            if Leave() in session.handle(Woke(), now):
                return
        assert session.next_timer() > now
        session.handle(Received(message(Kind.PONG)), now)
