from __future__ import annotations

import math

import pytest

from loopmux.codec import pack, unpack
from loopmux.errors import ProtocolError
from loopmux.messages import Catalogue, Demand, Failure, Register, Welcome, WorkerLoad
from loopmux.wire import NO_ID, VERSION, VERSIONS, Header, Kind, Message
from loopmux_launcher.events import BrokerWelcomed, DemandReported
from loopmux_launcher.link import Link, Refused

REGISTER = Register("launcher", "launcher@host", bytes(16), VERSIONS)


def welcome(epoch: bytes = b"e" * 8, heartbeat: float = 1.0, to: int = 0) -> Message:
    return Message(Header(Kind.WELCOME, seq=to), pack(Welcome(VERSION, epoch, heartbeat, 1 << 20, 1024)))


def kinds(messages: list[Message]) -> list[Kind]:
    return [m.kind for m in messages]


def joined(now: float = 0.0) -> Link:
    link = Link(REGISTER)
    assert link.received(welcome(), now) == BrokerWelcomed()
    return link


def test_register_is_repeated_until_answered_and_carries_who_we_are() -> None:
    link = Link(REGISTER)
    (first,) = link.due(0.0)
    assert unpack(Register, first.route) == REGISTER
    assert link.due(0.4) == []
    assert link.next_timer() == 0.5
    assert kinds(link.due(0.5)) == [Kind.REGISTER]
    assert link.report(Catalogue("m", "ready")) == []  # nothing before WELCOME
    link.received(welcome(), 0.6)
    assert link.due(0.7) == []
    assert kinds(link.due(1.6)) == [Kind.HB]
    assert kinds(link.report(Catalogue("m", "ready"))) == [Kind.CATALOGUE]
    assert kinds(link.bye()) == [Kind.BYE]


def test_who_and_silence_lead_to_a_new_introduction() -> None:
    link = joined()
    assert link.received(Message(Header(Kind.WHO)), 0.1) is None
    assert kinds(link.due(0.1)) == [Kind.REGISTER]
    link = joined()
    for now in (1.0, 2.0):
        assert kinds(link.due(now)) == [Kind.HB]
    link.received(Message(Header(Kind.PONG)), 2.1)
    for now in (3.0, 4.0, 5.0):
        assert kinds(link.due(now)) == [Kind.HB]
    assert link.next_timer() == 5.1
    assert kinds(link.due(5.1)) == [Kind.REGISTER]
    assert link.bye() == []


def test_a_launcher_that_was_suspended_does_not_blame_the_broker() -> None:
    assert kinds(joined().due(100.0)) == [Kind.HB]


def test_a_message_that_could_not_be_sent_leads_to_a_new_introduction() -> None:
    link = joined()
    link.lost()
    assert not link.ready
    assert kinds(link.due(0.1)) == [Kind.REGISTER]


def test_who_has_taken_leave_says_nothing_any_more() -> None:
    link = joined()
    assert kinds(link.bye()) == [Kind.BYE]
    assert link.report(Catalogue("m", "ready")) == link.answer(bytes(16), "") == link.bye() == link.due(9.0) == []
    assert link.next_timer() == math.inf


def test_demand_is_passed_on() -> None:
    demand = Demand({"m": 2}, (WorkerLoad("m-1", 4, 1, 0.5),))
    assert joined().received(Message(Header(Kind.SCALE), body=pack(demand)), 1.0) == DemandReported(demand)


def test_a_refusal_is_passed_on_in_the_brokers_words() -> None:
    body = pack(Failure("protocol", "the name is taken"))
    assert Link(REGISTER).received(Message(Header(Kind.ERROR), body=body), 0.0) == Refused("the name is taken")
    assert isinstance(Link(REGISTER).received(welcome(heartbeat=0.0), 0.0), Refused)


@pytest.mark.parametrize("request_id", [NO_ID, b"r" * 16])
def test_an_error_about_something_else_ends_no_launcher_that_the_broker_knows(request_id: bytes) -> None:
    link = joined()
    body = pack(Failure("protocol", "CATALOGUE: found an int, expected a text"))
    assert link.received(Message(Header(Kind.ERROR, request_id), body=body), 0.1) is None
    assert link.ready


def test_a_malformed_answer_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        Link(REGISTER).received(Message(Header(Kind.WELCOME), b"\xc1"), 0.0)


def test_while_nobody_is_there_the_introduction_is_tried_at_intervals() -> None:
    link = Link(REGISTER)
    assert kinds(link.due(1.0)) == [Kind.REGISTER]
    link.lost()  # it could not be sent
    assert link.next_timer() == 1.5
    assert link.due(1.1) == []


def test_a_welcome_from_the_connection_that_is_gone_is_none_to_the_new_one() -> None:
    link = Link(REGISTER)
    [old] = link.due(0.0)
    link.disconnected()
    link.introduce()
    [new] = link.due(0.1)
    assert new.header.seq > old.header.seq
    assert link.received(welcome(to=old.header.seq), 0.2) is None
    assert not link.ready
    assert link.received(welcome(to=new.header.seq), 0.3) == BrokerWelcomed()
