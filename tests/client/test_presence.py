"""The rules by which a client, a worker and a launcher know whether their broker is there."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loopmux.cadence import HEARTBEAT, INTRODUCE_AGAIN, SILENT_HEARTBEATS
from loopmux.codec import pack
from loopmux.errors import LoopmuxError, ProtocolError
from loopmux.messages import Failure, Welcome
from loopmux.presence import Presence, State
from loopmux.wire import NO_ID, VERSION, Header, Kind, Message

BEAT = 2.0
REFUSAL = Failure("bad_request", "the name is taken")


def welcome(to: int = 0, **fields: Any) -> Message:
    said = {"version": VERSION, "epoch": b"one", "heartbeat": BEAT, "max_body": 1, "window": 1} | fields
    return Message(Header(Kind.WELCOME, seq=to), pack(Welcome(**said)))


def error(request: bytes = NO_ID) -> Message:
    return Message(Header(Kind.ERROR, request), body=pack(REFUSAL))


def answer(presence: Presence, message: Message, now: float) -> Welcome | LoopmuxError | None:
    presence.turn(now)
    presence.heard = now
    return presence.answered(message, now)


def greeting() -> Presence:
    presence = Presence()
    presence.introduce()
    assert presence.speaks(0.0)
    return presence


def ready() -> Presence:
    presence = greeting()
    assert isinstance(answer(presence, welcome(), 0.0), Welcome)
    return presence


def test_who_has_nothing_to_say_says_nothing() -> None:
    presence = Presence()
    presence.disconnected()
    assert (presence.state, presence.next_timer(), presence.speaks(1e9)) == (State.IDLE, math.inf, False)


def test_an_introduction_is_repeated_until_it_is_answered_and_heartbeats_follow() -> None:
    presence = greeting()
    for now in (INTRODUCE_AGAIN, 2 * INTRODUCE_AGAIN):
        assert not presence.speaks(now - 0.01)
        assert presence.next_timer() == now
        assert presence.speaks(now)
    assert isinstance(answer(presence, welcome(), 1.1), Welcome)
    assert presence.ready
    assert not presence.speaks(3.0)
    assert presence.speaks(1.1 + BEAT)
    assert not presence.speaks(1.1 + BEAT)


def test_a_new_connection_is_used_at_once_and_by_whom_the_broker_knows_for_nothing() -> None:
    presence = greeting()
    presence.introduce()
    assert presence.speaks(0.1)
    presence = ready()
    presence.introduce()
    assert presence.ready
    assert not presence.speaks(0.1)


def test_an_answer_to_what_was_said_over_a_connection_that_is_gone_counts_for_nothing() -> None:
    for presence, known in ((greeting(), False), (ready(), True)):
        assert presence.disconnected() is known
        assert presence.speaks(1.0)
        assert answer(presence, welcome(to=0), 1.1) is None
        assert presence.state is State.GREETING
        assert isinstance(answer(presence, welcome(to=1), 1.2), Welcome)


def test_a_second_welcome_is_news_from_another_broker_only() -> None:
    presence = ready()
    assert answer(presence, welcome(heartbeat=9.0), 1.0) is None
    assert presence.next_timer() == BEAT
    assert isinstance(answer(presence, welcome(epoch=b"two"), 1.5), Welcome)
    assert presence.epoch == b"two"
    assert presence.next_timer() == 1.5 + BEAT


def test_silence_is_noticed_so_many_heartbeats_after_the_last_word() -> None:
    presence = ready()
    for now in (2.0, 4.0):
        presence.turn(now)
        assert presence.speaks(now)
    presence.heard = 4.1
    limit = 4.1 + SILENT_HEARTBEATS * BEAT
    for now in (6.0, 8.0, 10.0):
        presence.turn(now)
        assert presence.speaks(now)
        assert not presence.silent(now)
    assert presence.next_timer() == limit
    assert presence.silent(limit)
    presence.disconnected()
    assert not presence.silent(limit)


def test_who_was_away_does_not_blame_the_broker() -> None:
    presence = ready()
    presence.turn(3600.0)
    assert not presence.silent(3600.0)
    assert presence.speaks(3600.0)
    presence.turn(3600.0 + HEARTBEAT)
    assert presence.silent(3600.0 + SILENT_HEARTBEATS * BEAT)


def test_an_introduction_is_refused_and_nothing_else_is() -> None:
    presence = greeting()
    assert answer(presence, error(b"r" * 16), 0.1) is None
    refused = answer(presence, error(), 0.2)
    assert isinstance(refused, LoopmuxError)
    assert (refused.code, refused.message) == (REFUSAL.code, REFUSAL.message)
    assert answer(ready(), error(), 0.2) is None  # something that we said was malformed


@pytest.mark.parametrize(
    "impossible",
    [{"heartbeat": 0.0}, {"heartbeat": math.nan}, {"heartbeat": math.inf}, {"window": 0}, {"version": 99}],
    ids=str,
)
def test_an_impossible_welcome_is_a_refusal(impossible: dict[str, Any]) -> None:
    presence = greeting()
    assert isinstance(answer(presence, welcome(**impossible), 0.1), ProtocolError)
    assert not presence.ready


def test_a_malformed_answer_changes_nothing() -> None:
    presence = greeting()
    for message in (Message(Header(Kind.WELCOME), b"\xc1"), Message(Header(Kind.ERROR), body=b"\xc1")):
        with pytest.raises(ProtocolError):
            answer(presence, message, 0.1)
    assert presence.next_timer() == INTRODUCE_AGAIN


def test_no_broker_has_a_peer_speak_without_a_pause() -> None:
    presence = greeting()
    answer(presence, welcome(heartbeat=1e-9), 1.0)
    assert presence.next_timer() >= 1.05


def test_who_has_left_says_nothing_more_whatever_comes() -> None:
    presence = ready()
    presence.enter(State.CLOSED)
    presence.introduce()
    presence.disconnected()
    assert answer(presence, welcome(to=presence.introduction), 1.0) is None
    assert (presence.state, presence.next_timer(), presence.speaks(1e9)) == (State.CLOSED, math.inf, False)
