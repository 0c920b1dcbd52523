"""The table of docs/protocol.md about a client's requests: in each state it sends what the cell names."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from loopmux import codec, events, wire
from loopmux.connection import Connection
from loopmux.messages import Failure, Phase, Submit, Tok, Welcome
from loopmux.wire import Header, Kind, Message, pack_tokens
from protocolpages import CLIENT, table

ID, OLD, NEW = b"r" * 16, b"epoch--1", b"epoch--2"
DEADLINE = 30.0


class Talk:
    """A client with one request, before a broker that says what the test tells it to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.core = Connection("ipc:///b", b"i" * 16, 60.0)
        self.introduction = 0
        """Of the last HELLO."""

    def happens(self, event: events.ConnectionEvent) -> list[Kind]:
        """The kinds that are sent about the request."""
        actions = self.core.handle(event, self.now)
        for action in actions:
            if isinstance(action, events.Introduce):
                self.introduction = action.message.header.seq
        said = [a.message for a in actions if isinstance(a, events.Send)]
        return [message.kind for message in said if message.header.request == ID]

    def hears(self, message: Message) -> list[Kind]:
        return self.happens(events.Received(wire.to_bytes(message)))

    def welcome(self, epoch: bytes = OLD) -> list[Kind]:
        header = Header(Kind.WELCOME, seq=self.introduction)
        return self.hears(Message(header, codec.pack(Welcome(wire.VERSION, epoch, 1.0, 2**20, 8))))

    def after(self, seconds: float) -> list[Kind]:
        """Time passes, and the broker is there: what is sent at the end of it."""
        end, said = self.now + seconds, []
        while self.now < end:
            self.now = min(self.now + 0.5, end)
            self.hears(Message(Header(Kind.WHO, b"x" * 16)))
            said = self.happens(events.TimePassed())
        return said


def new() -> Talk:
    talk = Talk()
    talk.happens(events.Asked(b"q" * 16, 60.0))
    talk.welcome()
    talk.happens(events.Disconnected())
    talk.happens(events.Connected())
    talk.happens(events.Submitted(events.Request(ID, Submit("m"), codec.pack({"prompt": "x"}), DEADLINE, collect=True)))
    return talk


def there() -> Talk:
    talk = new()
    assert talk.welcome() == [Kind.SUBMIT]
    return talk


def opened() -> Talk:
    talk = there()
    talk.hears(Message(Header(Kind.ACCEPTED, ID)))
    return talk


def cancelling() -> Talk:
    talk = opened()
    talk.happens(events.CancelAsked(ID))
    return talk


STATES: dict[str, Callable[[], Talk]] = {"new": new, "sent": there, "open": opened, "cancelling": cancelling}


def again(talk: Talk, epoch: bytes) -> list[Kind]:
    talk.happens(events.Disconnected())
    talk.happens(events.Connected())
    return talk.welcome(epoch)


def twice_pong(talk: Talk) -> list[Kind]:
    assert talk.hears(Message(Header(Kind.PONG))) == []
    return talk.hears(Message(Header(Kind.PONG)))


CANCELLED = Message(Header(Kind.CANCELLED, ID, seq=5), body=codec.pack(Failure("cancelled", "as asked")))
TOKENS = Message(Header(Kind.TOK, ID, 0, 1, 1), body=codec.pack(Tok("x")), tokens=pack_tokens([7]))

EVENTS: dict[str, Callable[[Talk], list[Kind]]] = {
    "WELCOME after HELLO, epoch as before": lambda talk: again(talk, OLD),
    "WELCOME, another epoch": lambda talk: again(talk, NEW),
    "WHO with its id": lambda talk: talk.hears(Message(Header(Kind.WHO, ID))),
    "ACCEPTED, PHASE": lambda talk: [
        *talk.hears(Message(Header(Kind.ACCEPTED, ID, arg=3))),
        *talk.hears(Message(Header(Kind.PHASE, ID), codec.pack(Phase("loading")))),
    ],
    "TOK": lambda talk: talk.hears(TOKENS),
    "terminal": lambda talk: talk.hears(CANCELLED),
    "PONG, and nothing came since the last": twice_pong,
    "1 s after it was sent last": lambda talk: talk.after(1.0),
    "the connection is lost": lambda talk: talk.happens(events.Disconnected()),
    "the user cancels": lambda talk: talk.happens(events.CancelAsked(ID)),
    "1 s after its deadline": lambda talk: talk.after(DEADLINE + 1.0),
}

CELLS = [
    pytest.param(event, state, cell, id=f"{event} / {state}")
    for event, cells in table(CLIENT, "event", "new").by("event").items()
    for state, cell in cells.items()
    if state in STATES
    and cell != "–"
    and "as below" not in cell
    and not (event == "1 s after its deadline" and not cell)
]


@pytest.mark.parametrize(("event", "state", "cell"), CELLS)
def test_what_a_client_does(event: str, state: str, cell: str) -> None:
    promised = [Kind[word] for word in re.findall(r"\b[A-Z]{3,}\b", cell) if "wait for" not in cell]
    assert EVENTS[event](STATES[state]()) == promised


def test_a_request_that_was_attached_is_attached_again() -> None:
    talk = there()
    assert talk.hears(Message(Header(Kind.WHO, ID))) == [Kind.ATTACH]
    assert talk.after(1.0) == [Kind.ATTACH]
    assert again(talk, OLD) == [Kind.ATTACH]


def test_every_event_is_in_the_table() -> None:
    assert table(CLIENT, "event", "new").by("event").keys() == EVENTS.keys()
