"""What waits for room in a client's socket: in order, and nothing twice."""

from __future__ import annotations

from loopmux.outbox import Outbox
from loopmux.wire import NO_ID, Header, Kind, Message

ONE, TWO = b"1" * 16, b"2" * 16


def taken(outbox: Outbox) -> list[tuple[Kind, bytes, int]]:
    found = [(message.header.kind, message.header.request, message.header.seq) for message in outbox]
    outbox.drop(len(found))
    assert not outbox
    return found


def put(outbox: Outbox, kind: Kind, request: bytes = NO_ID, seq: int = 0) -> None:
    outbox.extend([Message(Header(kind, request, seq))])


def test_what_is_said_again_takes_the_place_of_what_waits() -> None:
    outbox = Outbox()
    put(outbox, Kind.SUBMIT, ONE)
    put(outbox, Kind.CREDIT, TWO, 10)
    put(outbox, Kind.PING)
    for seq in range(11, 100):
        put(outbox, Kind.SUBMIT, ONE)
        put(outbox, Kind.CREDIT, TWO, seq)
        put(outbox, Kind.PING)
    put(outbox, Kind.CANCEL, ONE)
    assert len(outbox) == 4
    assert taken(outbox) == [
        (Kind.SUBMIT, ONE, 0),
        (Kind.CREDIT, TWO, 99),
        (Kind.PING, NO_ID, 0),
        (Kind.CANCEL, ONE, 0),
    ]


def test_what_was_sent_may_wait_again() -> None:
    outbox = Outbox()
    put(outbox, Kind.CREDIT, ONE, 1)
    put(outbox, Kind.CREDIT, TWO, 1)
    outbox.drop(1)
    put(outbox, Kind.CREDIT, ONE, 2)
    assert taken(outbox) == [(Kind.CREDIT, TWO, 1), (Kind.CREDIT, ONE, 2)]


def test_nothing_waits_behind_an_introduction() -> None:
    outbox = Outbox()
    put(outbox, Kind.SUBMIT, ONE)
    outbox.clear()
    assert not outbox


def test_a_request_that_is_over_is_not_said_again() -> None:
    outbox = Outbox()
    for kind in (Kind.SUBMIT, Kind.ATTACH, Kind.CREDIT, Kind.CANCEL):
        put(outbox, kind, ONE)
    put(outbox, Kind.SUBMIT, TWO)
    put(outbox, Kind.ENDACK, ONE)
    put(outbox, Kind.CANCEL, ONE)  # it was refused, and may have been let in the second time
    assert taken(outbox) == [(Kind.SUBMIT, TWO, 0), (Kind.ENDACK, ONE, 0), (Kind.CANCEL, ONE, 0)]
