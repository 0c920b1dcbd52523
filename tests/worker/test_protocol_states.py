"""The table of docs/protocol-worker.md about what a worker answers, by what it knows of the attempt: it sends that."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from loopmux.codec import pack
from loopmux.messages import Generate, Register, Run, ServedModel, Welcome
from loopmux.results import Timing, Usage
from loopmux.wire import VERSION, VERSIONS, Header, Kind, Message
from loopmux_worker.engine.base import Finished, Key, Load, Produced
from loopmux_worker.events import Cancel, Cancelled, Connected, Disconnected, Received, Send, Stepped, Woke
from loopmux_worker.session import ACKNOWLEDGE_WITHIN, Session
from protocolpages import WORKER, table

KEY = Key(b"r" * 16, 1)


def welcome(session: Session) -> Received:
    header = Header(Kind.WELCOME, seq=session._presence.introduction)
    return Received(Message(header, pack(Welcome(VERSION, b"epoch--1", 1.0, 2**20, 1024))))


def say(kind: Kind, seq: int = 0, arg: int = 0) -> Received:
    return Received(Message(Header(kind, KEY.request, seq, arg, KEY.attempt)))


def produced(*outputs: Produced | Finished) -> Stepped:
    return Stepped(outputs, Load(1, 0, 1))


def not_here() -> Session:
    session = Session(Register("worker", "w", b"b" * 16, VERSIONS, models=(ServedModel("m", "f"),), slots=1), {}, 0.0)
    session.handle(Woke(), 0.0)
    session.handle(welcome(session), 0.0)
    return session


RUN = Received(Message(Header(Kind.RUN, KEY.request, attempt=1), pack(Run("m")), pack(Generate(prompt="hi"))))


def runs() -> Session:
    session = not_here()
    session.handle(RUN, 0.0)
    session.handle(produced(Produced(KEY, 0, (7,), "x")), 0.0)
    session.handle(produced(*(Produced(KEY, at, (7,), "x") for at in range(1, 9))), 0.0)
    return session


def has_ended() -> Session:
    session = runs()
    session.handle(produced(Finished(KEY, 9, "stop", Usage(1, 9), Timing())), 0.0)
    return session


def announced() -> Session:
    session = runs()
    session.handle(Disconnected(), 0.0)
    session.handle(Connected(), 0.0)
    assert [a.message.kind for a in session.handle(welcome(session), 0.0) if isinstance(a, Send)] == [Kind.HELD]
    return session


STATES: dict[str, Callable[[], Session]] = {
    "not here": not_here,
    "runs": runs,
    "has ended, no ENDACK yet": has_ended,
    "announced with HELD, no answer yet": announced,
}
EVENTS = {
    "RUN": RUN,
    "REPLAY": say(Kind.REPLAY, seq=1),
    "STOP": say(Kind.STOP, arg=1),
    "RESET": say(Kind.RESET),
    "TOKACK": say(Kind.TOKACK, seq=1, arg=1),
    "ENDACK": say(Kind.ENDACK),
}
ROWS = table(WORKER, "it gets", "not here").by("it gets")
CELLS = [(event, state, ROWS[event][state]) for event in EVENTS for state in STATES]


@pytest.mark.parametrize(("event", "state", "cell"), CELLS)
def test_what_a_worker_answers(event: str, state: str, cell: str) -> None:
    session = STATES[state]()
    had = session.requests
    actions = session.handle(EVENTS[event], 0.1)
    for stopped in [action.key for action in actions if isinstance(action, Cancel)]:
        actions += session.handle(Cancelled(stopped, Usage()), 0.1)
    actions += session.handle(Woke(), 0.1 + ACKNOWLEDGE_WITHIN)
    first = cell.split("; or")[0].replace("terminal", "END")
    promised = {Kind[word] for word in re.findall(r"\b[A-Z]{3,}\b", first)}
    assert {action.message.kind for action in actions if isinstance(action, Send)} == promised
    assert had - session.requests == ("drops it" in first) - ("begins" in first)


def test_every_message_is_in_the_table() -> None:
    assert ROWS.keys() == EVENTS.keys()
    assert set(ROWS["RUN"]) - {"it gets"} == STATES.keys()
