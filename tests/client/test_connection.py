"""Stories of one connection: presence, epochs, and that every request hears of them."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from loopmux import codec, connection, errors, wire
from loopmux.cadence import INTRODUCE_AGAIN
from loopmux.connection import Connection, State
from loopmux.events import (
    Action,
    Answer,
    Asked,
    CancelAsked,
    Closed,
    Connected,
    ConnectionEvent,
    Consumed,
    Disconnected,
    Fail,
    Finish,
    Hinted,
    Introduce,
    Received,
    Request,
    Send,
    Submitted,
    TimePassed,
)
from loopmux.messages import AdapterOrder, Done, End, Failure, Hello, SessionHint, Status, Submit, Tok, Welcome
from loopmux.results import Timing, Usage
from loopmux.stream import GRACE
from loopmux.wire import Header, Kind, Message, pack_tokens, to_bytes

HEARTBEAT = 1.0
QUESTION = b"q" * 16
WAITING = bytes([99]) * 16
"""The request of a story that begins ``ready``."""
OLD_RELEASE = b"LM\x01" + bytes([Kind.ERROR]) + bytes(30)
"""A header of protocol version 1, which was a frame of its own."""


class Story:
    def __init__(self, connect_timeout: float = 5.0) -> None:
        self.now = 100.0
        self.connection = Connection("ipc:///x", b"i" * 16, connect_timeout, "test")
        self.outcomes: dict[bytes, Finish | Fail | Answer] = {}
        self.alive = False
        self.introduction = 0
        """Of the last HELLO."""

    def do(self, event: ConnectionEvent) -> list[Message]:
        actions: list[Action] = self.connection.handle(event, self.now)
        for action in actions:
            match action:
                case Finish(id_) | Fail(id_) | Answer(id_):
                    assert id_ not in self.outcomes
                    self.outcomes[id_] = action
                case Introduce(hello):
                    self.introduction = hello.header.seq
        return [a.message for a in actions if isinstance(a, (Send, Introduce))]

    def kinds(self, event: ConnectionEvent) -> list[Kind]:
        return [m.kind for m in self.do(event)]

    def get(self, kind: Kind, *parts: Any, request: bytes = wire.NO_ID, seq: int = 0, **raw: bytes) -> list[Kind]:
        if parts:
            raw["route" if wire.PARTS[kind] & wire.Part.ROUTE else "body"] = codec.pack(parts[0])
        return self.kinds(Received(to_bytes(Message(Header(kind, request, seq=seq), **raw))))

    def welcome(self, epoch: bytes = b"one", *, to: int | None = None, **other: Any) -> list[Kind]:
        """The answer to the last HELLO, or ``to`` the one with this number."""
        seq = self.introduction if to is None else to
        told = dataclasses.replace(Welcome(wire.VERSION, epoch, HEARTBEAT, 10**6, 16), **other)
        return self.get(Kind.WELCOME, told, seq=seq)

    def submit(self, i: int = 1, timeout: float = 50.0, body: bytes = b"") -> bytes:
        id_ = bytes([i]) * 16
        self.do(Submitted(Request(id_, Submit("m", timeout=timeout), body, self.now + timeout)))
        return id_

    def wait(self, seconds: float) -> list[Kind]:
        until, sent = self.now + seconds, []
        while self.connection.next_timer() <= until:
            self.now = max(self.now, self.connection.next_timer())
            kinds = self.kinds(TimePassed())
            if self.alive and Kind.PING in kinds:
                kinds += self.get(Kind.PONG)
            sent += kinds
        self.now = until
        return sent

    def error(self, id_: bytes) -> errors.LoopmuxError:
        outcome = self.outcomes[id_]
        assert isinstance(outcome, Fail)
        return outcome.error


def ready() -> Story:
    story = Story()
    assert story.submit(99) == WAITING
    assert story.welcome() == [Kind.SUBMIT]
    story.alive = True
    return story


def test_the_first_request_greets_and_goes_out_with_the_welcome() -> None:
    story = Story()
    assert story.connection.next_timer() == math.inf
    request = Request(b"1" * 16, Submit("m"), b"", story.now + 9)
    (hello,) = story.do(Submitted(request))
    said = codec.unpack(Hello, hello.route)
    assert (hello.kind, said.versions, said.instance) == (Kind.HELLO, wire.VERSIONS, b"i" * 16)
    assert story.wait(2 * INTRODUCE_AGAIN) == [Kind.HELLO, Kind.HELLO]
    assert story.kinds(Submitted(Request(b"2" * 16, Submit("m"), b"", story.now + 9))) == []
    assert story.welcome() == [Kind.SUBMIT, Kind.SUBMIT]
    assert story.connection.state is State.READY


def test_a_closed_connection_is_not_waited_for_to_be_silent() -> None:
    story = ready()
    assert story.kinds(Disconnected()) == [Kind.HELLO]
    assert story.connection.state is State.GREETING
    assert story.kinds(Connected()) == [Kind.HELLO]  # the one before may have gone with the old connection
    assert story.welcome() == [Kind.SUBMIT]


def test_without_a_connection_there_is_nothing_but_hello() -> None:
    story = ready()
    assert story.kinds(Asked(QUESTION, math.inf)) == [Kind.STATUS]
    story.do(Disconnected())
    assert set(story.wait(5)) == {Kind.HELLO}
    assert story.welcome() == [Kind.SUBMIT, Kind.STATUS]


def test_who_knew_a_broker_says_hello_to_the_next_one_whether_or_not_anything_waits() -> None:
    story = ready()
    story.get(Kind.END, End("stop", Usage(), Timing(), "m", "w"), request=WAITING)
    story.do(Disconnected())
    assert story.wait(10 * INTRODUCE_AGAIN) == [Kind.HELLO] * 10
    story.welcome(b"two")
    assert story.connection.state is State.READY


def test_a_welcome_from_the_connection_that_is_gone_is_none_to_the_new_one() -> None:
    story = Story()
    story.submit()
    old = story.introduction
    story.do(Disconnected())
    assert story.welcome(to=old) == []  # it had come in before
    assert story.kinds(Connected()) == [Kind.HELLO]
    assert story.welcome(to=old) == []
    assert story.connection.state is State.GREETING
    assert story.wait(INTRODUCE_AGAIN) == [Kind.HELLO]
    assert story.welcome() == [Kind.SUBMIT]


def test_a_hello_that_is_repeated_may_be_answered_late() -> None:
    story = Story()
    story.submit()
    old = story.introduction
    assert story.wait(INTRODUCE_AGAIN) == [Kind.HELLO]
    assert story.welcome(to=old) == [Kind.SUBMIT]


def test_connections_without_a_request_are_of_no_interest() -> None:
    story = Story()
    assert story.kinds(Connected()) == story.kinds(Disconnected()) == story.kinds(Connected()) == []
    story.submit()
    assert story.welcome() == [Kind.SUBMIT]
    assert story.kinds(Connected()) == []


def test_pings_every_heartbeat_and_repeats_credit_on_the_pongs_of_quiet_time() -> None:
    story = ready()
    story.get(Kind.ACCEPTED, request=WAITING)
    assert story.wait(3.0) == [Kind.PING, Kind.PING, Kind.CREDIT, Kind.PING, Kind.CREDIT]


def test_nobody_there_ends_each_request_after_its_own_patience() -> None:
    story = Story(connect_timeout=2.0)
    first = story.submit(1)
    story.wait(1)
    second = story.submit(2)
    story.wait(1)
    assert list(story.outcomes) == [first]
    assert isinstance(story.error(first), errors.ConnectionLostError)
    assert "loopmux up" in str(story.error(first))
    story.wait(1)
    assert list(story.outcomes) == [first, second]
    assert story.connection.state is State.IDLE
    assert story.wait(60) == []  # nobody waits, nobody calls
    assert story.kinds(Submitted(Request(b"3" * 16, Submit("m"), b"", story.now + 9))) == [Kind.HELLO]


def test_silence_of_three_heartbeats_means_away_and_the_requests_wait() -> None:
    story = ready()
    late = story.submit(1, timeout=10)
    story.alive = False
    assert story.wait(2.9).count(Kind.PING) == 2
    assert story.connection.state is State.READY
    assert Kind.HELLO in story.wait(0.2)
    assert story.connection.state is State.GREETING
    story.wait(9.5)
    assert isinstance(story.error(late), errors.DeadlineExceededError)
    assert WAITING not in story.outcomes
    assert story.welcome(b"two") == [Kind.ATTACH, Kind.CANCEL]


def test_a_pause_of_our_own_is_not_the_brokers_silence() -> None:
    story = ready()
    story.wait(2)
    story.now += 3600  # the machine slept
    assert Kind.HELLO not in story.kinds(TimePassed())
    assert story.connection.state is State.READY


def test_who_makes_us_say_hello_again() -> None:
    story = ready()
    story.get(Kind.ACCEPTED, request=WAITING)
    old = story.introduction
    assert story.get(Kind.WHO) == [Kind.HELLO]
    assert story.get(Kind.WHO) == []  # it is on its way
    assert story.welcome(to=old) == []
    assert story.welcome() == [Kind.CREDIT]


def test_a_new_epoch_while_ready_resubmits() -> None:
    story = ready()
    assert story.welcome() == []
    assert story.welcome(b"two") == [Kind.ATTACH]


def test_a_question_about_one_request_is_no_question_about_the_client() -> None:
    story = ready()
    assert story.get(Kind.WHO, request=b"x" * 16) == []  # it has ended here: nobody waits for it
    assert story.get(Kind.WHO, request=WAITING) == [Kind.ATTACH]
    assert story.connection.state is State.READY


def test_a_refused_hello_fails_what_waits_and_the_next_request_tries_anew() -> None:
    story = Story()
    one, two = story.submit(1), story.submit(2)
    story.do(Asked(QUESTION, story.now + 5))
    story.get(Kind.ERROR, Failure("protocol", "no common version"))
    for id_ in (one, two, QUESTION):
        assert isinstance(story.error(id_), errors.ProtocolError)
    assert {story.error(one).request_id, story.error(two).request_id} == {one.hex(), two.hex()}
    assert story.kinds(Submitted(Request(b"3" * 16, Submit("m"), b"", story.now + 9))) == [Kind.HELLO]
    assert story.welcome() == [Kind.SUBMIT]


def test_a_refusal_may_have_many_words() -> None:
    words = ", ".join(f"worker-{i}" for i in range(3000))
    story = ready()
    story.do(Asked(QUESTION, story.now + 5, Kind.EVICT))
    story.get(Kind.ERROR, Failure("bad_request", words), request=QUESTION)
    assert str(story.error(QUESTION)) == words
    greeting = Story()
    id_ = greeting.submit()
    greeting.get(Kind.ERROR, Failure("auth", words))
    assert str(greeting.error(id_)) == words


@pytest.mark.parametrize("welcome", [{"heartbeat": 0.0}, {"heartbeat": -1.0}, {"version": 99}, {"window": 0}])
def test_an_impossible_welcome_is_refused(welcome: dict[str, Any]) -> None:
    story = Story()
    id_ = story.submit()
    story.welcome(**welcome)
    assert isinstance(story.error(id_), errors.ProtocolError)
    assert "the broker at ipc:///x sent an impossible WELCOME" in str(story.error(id_))
    late = story.submit(2)
    story.wait(6)
    assert "no broker answers" in str(story.error(late))  # what sent it is none


def test_a_window_of_one_token_is_possible() -> None:
    story = Story()
    story.submit()
    assert story.welcome(window=1) == [Kind.SUBMIT]


def test_an_error_about_nothing_is_none_to_who_was_welcomed() -> None:
    story = ready()
    assert story.get(Kind.ERROR, Failure("protocol", "no common version")) == []
    assert story.connection.state is State.READY
    assert WAITING not in story.outcomes


def test_a_terminal_of_a_forgotten_request_is_acknowledged_again() -> None:
    story = ready()
    id_ = story.submit(1)
    done = End("stop", Usage(), Timing(), "m", "w")
    assert story.get(Kind.END, done, request=id_) == [Kind.ENDACK]
    assert isinstance(story.outcomes[id_], Finish)
    assert story.get(Kind.END, done, request=id_) == [Kind.ENDACK]
    assert story.get(Kind.TOK, Tok("a"), request=id_, tokens=pack_tokens([1])) == []
    assert story.kinds(Consumed(id_, 3)) == []
    assert story.kinds(CancelAsked(id_)) == []


def test_questions_are_repeated_answered_and_given_up() -> None:
    story = Story()
    assert story.kinds(Asked(QUESTION, story.now + 3)) == [Kind.HELLO]
    assert story.welcome() == [Kind.STATUS]
    story.do(Asked(b"s" * 16, story.now + 0.5))
    assert Kind.STATUS not in story.wait(0.5)  # another question's end is no reason to repeat this one
    assert Kind.STATUS in story.wait(0.5)
    status = Status(b"e", 1.0, "s", 1, 1, 0, 0)
    story.get(Kind.REPORT, status, request=QUESTION)
    assert story.outcomes[QUESTION] == Answer(QUESTION, status)
    other = b"o" * 16
    assert story.kinds(Asked(other, story.now + 3)) == [Kind.STATUS]
    story.alive = True
    story.wait(3)
    assert isinstance(story.error(other), errors.ConnectionLostError)
    assert "did not answer STATUS (waited 5 s)" in str(story.error(other))


def test_a_question_that_nobody_waits_for_is_not_kept() -> None:
    story = Story()
    story.do(Asked(QUESTION, math.inf))
    assert story.kinds(CancelAsked(QUESTION)) == []
    assert story.welcome() == []
    status = Status(b"e", 1.0, "s", 1, 1, 0, 0)
    assert story.get(Kind.REPORT, status, request=QUESTION) == []
    assert QUESTION not in story.outcomes


def test_an_undecodable_report_fails_its_question() -> None:
    story = ready()
    story.do(Asked(QUESTION, story.now + 3))
    story.get(Kind.REPORT, request=QUESTION, body=b"\x90")
    assert isinstance(story.error(QUESTION), errors.ProtocolError)


def test_hints_go_to_a_broker_that_is_there() -> None:
    hint = Hinted(SessionHint("s", "done"))
    assert Story().kinds(hint) == []
    assert ready().kinds(hint) == [Kind.SESSION]


def test_closing_cancels_says_goodbye_and_ends_everything() -> None:
    story = ready()
    story.do(Asked(QUESTION, story.now + 3))
    assert story.kinds(Closed()) == [Kind.CANCEL, Kind.BYE]
    assert isinstance(story.error(WAITING), errors.CancelledError)
    assert isinstance(story.error(QUESTION), errors.CancelledError)
    assert story.welcome(b"two") == []
    assert story.connection.next_timer() == math.inf


def test_malformed_messages_are_counted_and_dropped() -> None:
    story = ready()
    for data in (b"", b"junk", bytes(40), to_bytes(Message(Header(Kind.PONG))) + b"more", OLD_RELEASE):
        assert story.do(Received(data)) == []
    assert story.get(Kind.WELCOME, route=b"\xc1") == []
    assert story.connection.malformed == 6
    assert story.connection.state is State.READY


def test_malformed_messages_are_no_answer_to_a_greeting() -> None:
    story = Story()
    id_ = story.submit()
    for data in (b"", b"junk", to_bytes(Message(Header(Kind.PONG))) + b"more"):
        assert story.do(Received(data)) == []
    assert (story.connection.malformed, story.connection.state) == (3, State.GREETING)
    assert id_ not in story.outcomes
    assert story.welcome() == [Kind.SUBMIT]


def test_a_broker_of_another_release_is_named_at_once() -> None:
    """It cannot read HELLO and says so in its own way: a header of its version, in a frame of its own, and a BODY."""
    story = Story()
    story.submit(99)
    assert story.do(Received(OLD_RELEASE)) == []
    error = story.error(WAITING)
    assert isinstance(error, errors.ProtocolError)
    assert "version 1 is not spoken here (spoken: 3)" in error.message
    assert story.do(Received(b"\x81\xa4code")) == []
    assert story.connection.state is State.IDLE


def test_timers_of_ended_requests_do_not_pile_up() -> None:
    story = ready()
    done = End("stop", Usage(), Timing(), "m", "w")
    for i in range(2000):
        id_ = i.to_bytes(16)
        story.do(Submitted(Request(id_, Submit("m"), b"", story.now + 600)))
        story.get(Kind.ACCEPTED, request=id_)
        story.now += 0.001
        story.get(Kind.END, done, request=id_)
    assert len(story.connection._timers) < 200
    assert len(story.connection._exchanges) == 1


@pytest.mark.parametrize("seed", range(5))
def test_who_is_left_is_woken_in_time_however_many_ended_before(seed: int) -> None:
    story, dice = ready(), random.Random(seed)
    due = {}
    for i in range(300):
        id_, timeout = i.to_bytes(16), dice.uniform(10, 40)
        story.do(Submitted(Request(id_, Submit("m"), b"", story.now + timeout)))
        story.get(Kind.ACCEPTED, request=id_)
        due[id_] = story.now + timeout + GRACE
    story.wait(2)  # and nothing is said again by now
    for id_ in dice.sample(sorted(due), 250):
        story.get(Kind.END, End("stop", Usage(), Timing(), "m", "w"), request=id_)
        del due[id_]
    for id_ in sorted(due, key=due.__getitem__):
        story.wait(due[id_] - story.now - 1e-6)
        assert id_ not in story.outcomes
        story.wait(1e-5)
        assert isinstance(story.error(id_), errors.DeadlineExceededError)


# --- what waits for a broker ------------------------------------------------------------------------------------------


def test_a_client_keeps_so_many_requests_that_no_broker_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_WAITING", 2)
    story = Story()
    first, second, third = (story.submit(i) for i in (1, 2, 3))
    error = story.error(third)
    assert isinstance(error, errors.OverloadedError)
    assert str(error).startswith("2 requests of 0 bytes wait for the broker at ipc:///x, and this one has 0; a client")
    assert (error.retryable, error.retry_after, error.request_id, error.model) == (True, 1.0, third.hex(), "m")
    assert story.welcome() == [Kind.SUBMIT, Kind.SUBMIT]
    assert isinstance(story.error(story.submit(4)), errors.OverloadedError)  # sent is not taken
    story.get(Kind.ACCEPTED, request=first)
    story.get(Kind.ACCEPTED, request=first)
    taken = story.submit(5)
    assert isinstance(story.error(story.submit(6)), errors.OverloadedError)
    story.kinds(CancelAsked(second))
    story.get(Kind.CANCELLED, Failure("cancelled", "as was asked"), request=second)
    assert story.submit(7) not in story.outcomes
    assert not {first, taken} & story.outcomes.keys()


def test_a_broker_that_was_started_again_has_to_take_them_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_WAITING", 2)
    story = ready()
    story.get(Kind.ACCEPTED, request=WAITING)
    second = story.submit(2)
    story.get(Kind.ACCEPTED, request=second)
    assert story.kinds(Disconnected()) == [Kind.HELLO]
    assert story.welcome(b"two") == [Kind.ATTACH, Kind.ATTACH]
    assert isinstance(story.error(story.submit(3)), errors.OverloadedError)
    story.get(Kind.ACCEPTED, request=WAITING)
    assert story.submit(4) not in story.outcomes


def test_and_so_many_bytes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_BYTES", 1000)
    story = Story()
    first = story.submit(1, body=bytes(600))
    assert "1 requests of 600 bytes wait" in str(story.error(story.submit(2, body=bytes(401))))
    small = story.submit(3, body=bytes(400))
    assert story.welcome() == [Kind.SUBMIT, Kind.SUBMIT]
    assert story.wait(2.0).count(Kind.SUBMIT) == 4  # what is said again counts once
    story.kinds(CancelAsked(first))
    story.get(Kind.CANCELLED, Failure("cancelled", "as was asked"), request=first)
    assert story.submit(4, body=bytes(600)) not in story.outcomes
    assert small not in story.outcomes


# --- adapters ---------------------------------------------------------------------------------------------------------


def order(story: Story, kind: Kind = Kind.LOAD) -> Asked:
    return Asked(QUESTION, story.now + 5.0, kind, codec.pack(AdapterOrder("m", "loud", "/a")), 60.0)


@pytest.mark.parametrize("kind", [Kind.LOAD, Kind.UNLOAD])
def test_an_order_is_put_again_until_it_is_answered(kind: Kind) -> None:
    story = Story()
    assert story.kinds(order(story, kind)) == [Kind.HELLO]
    assert story.welcome() == [kind]
    story.alive = True
    assert story.wait(1.0).count(kind) == 1
    story.wait(30.0)  # longer than a status would be waited for
    done = Done(content="c0ffee", workers=("w1",), remembered=True)
    story.get(Kind.DONE, done, request=QUESTION)
    assert story.outcomes[QUESTION] == Answer(QUESTION, done)
    assert kind not in story.wait(5.0)


def test_an_order_that_is_not_answered_is_given_up_after_its_own_time() -> None:
    story = ready()
    story.do(order(story))
    story.wait(59.0)
    assert QUESTION not in story.outcomes
    story.wait(2.0)
    assert "did not answer LOAD (waited 60 s)" in story.error(QUESTION).message


def test_an_order_without_a_broker_waits_no_longer_than_a_question() -> None:
    story = Story()
    story.do(order(story))
    story.wait(6.0)
    assert "no broker answers" in story.error(QUESTION).message


def test_an_order_goes_to_the_next_broker_as_well() -> None:
    story = ready()
    story.do(order(story))
    story.do(Disconnected())
    assert Kind.LOAD in story.welcome(b"two")
