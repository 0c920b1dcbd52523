"""The two tables of docs/ that say what the broker does with a message in each state of its request.

It sends what the cell names. Of a cell with several parts ("; or") the first is tried; the others need another past.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from brokerkit import BODY, CLIENT, ONE, OTHER, SECOND, TWO, WORKER, Core, end, instance, kinds, tok
from loopmux import codec
from loopmux.messages import Held, Submit
from loopmux.wire import Header, Kind, Message, pack_tokens
from loopmux_broker.events import Action, say
from protocolpages import CLIENT as CLIENT_PAGE
from protocolpages import WORKER as WORKER_PAGE
from protocolpages import table

WINDOW = 2
"""Of three tokens that are there, the client was sent two."""


KINDS = {kind.name for kind in Kind} - {"DONE"}
"""The kinds that are in use; DONE is a state here."""


def promised(cell: str) -> set[Kind]:
    """The kinds that a cell says are sent. A stream's terminal is END here, and a request goes to the free worker."""
    first = cell.split("; or")[0].replace("terminal", "END").replace("queued again", "RUN")
    return {Kind[word] for word in re.findall(r"\b[A-Z]+\b", first) if word in KINDS}


def sent(actions: list[Action]) -> set[Kind]:
    return {kind for _, kind in kinds(actions)}


def attach(core: Core, received: int, body: bytes = BODY) -> list[Action]:
    header = Header(Kind.ATTACH, ONE, received, received + WINDOW, 1)
    ids = pack_tokens(list(range(received)))
    return core.client(Message(header, codec.pack(Submit("m", timeout=10.0)), body, ids))


def held(core: Core) -> list[Action]:
    header = Header(Kind.HELD, ONE, 0, 9, 1)
    return core.worker(Message(header, codec.pack(Held(instance(CLIENT), "m"))))


# --- a client's messages ----------------------------------------------------------------------------------------------


def unknown() -> Core:
    core = Core(window=WINDOW)
    core.hello()
    core.register()
    return core


def queued() -> Core:
    core = unknown()
    core.hello(OTHER)
    core.running(TWO, OTHER)
    core.submit(ONE, timeout=10.0)
    return core


def running() -> Core:
    core = unknown()
    core.running(ONE, timeout=10.0)
    for seq in range(3):
        core.worker(tok(ONE, seq))
    return core


def ended() -> Core:
    core = running()
    core.worker(end(ONE, 3))
    return core


def by_attach() -> Core:
    core = Core(window=WINDOW, settle=3.0, claim_wait=60.0)
    core.hello()
    attach(core, 0)
    return core


def from_a_worker() -> Core:
    core = Core(window=WINDOW, settle=3.0)
    core.hello()
    core.register(held=1)
    held(core)
    return core


STATES: dict[str, Callable[[], Core]] = {
    "unknown": unknown,
    "queued": queued,
    "dispatched, running": running,
    "ended, no ENDACK yet": ended,
    "recovering, by ATTACH": by_attach,
    "recovering, from a worker": from_a_worker,
}


def all_sent(core: Core) -> Core:
    if ONE in core.tables.requests and core.tables.requests[ONE].output.total:
        core.client(say(Kind.CREDIT, ONE, seq=5, arg=0))
    return core


def credit(core: Core) -> list[Action]:
    has = core.tables.requests[ONE].output.total if ONE in core.tables.requests else 0
    return core.client(say(Kind.CREDIT, ONE, seq=4, arg=min(has, 1)))


def again(core: Core) -> list[Action]:
    has = core.tables.requests[ONE].output.total if ONE in core.tables.requests else 0
    return attach(core, min(has, 1))


EVENTS: dict[str, Callable[[Core], list[Action]]] = {
    "SUBMIT, same BODY": lambda core: all_sent(core).submit(ONE, timeout=10.0),
    "SUBMIT, another BODY": lambda core: all_sent(core).submit(ONE, body=b"other"),
    "ATTACH, same BODY": again,
    "CREDIT": credit,
    "CANCEL": lambda core: core.client(say(Kind.CANCEL, ONE)),
    "ENDACK": lambda core: core.client(say(Kind.ENDACK, ONE)),
    "its first PING": lambda core: core.client(say(Kind.PING)),
    "BYE, or lost for too long": lambda core: core.client(say(Kind.BYE)),
    "its deadline": lambda core: core.wait(10.0),
}

CELLS = [
    pytest.param(event, state, cell, id=f"{event} / {state}")
    for event, cells in table(CLIENT_PAGE, "", "unknown").by("").items()
    for state, cell in cells.items()
    if event in EVENTS and cell and state
]


@pytest.mark.parametrize(("event", "state", "cell"), CELLS)
def test_what_a_client_says(event: str, state: str, cell: str) -> None:
    core = STATES[state]()
    if event == "BYE, or lost for too long":
        lost = STATES[state]()
        assert sent([*lost.lose(CLIENT), *lost.wait(2.0, silent=(CLIENT,))]) == promised(cell)
    assert sent(EVENTS[event](core)) == promised(cell)


def test_every_event_of_a_client_is_in_the_table() -> None:
    rows = table(CLIENT_PAGE, "", "unknown").by("")
    assert rows.keys() - {"time"} == EVENTS.keys()
    assert set(rows["CREDIT"]) - {""} == STATES.keys()


# --- a worker's messages ----------------------------------------------------------------------------------------------


def with_another(core: Core) -> Core:
    """A second worker is there for what the first one loses."""
    core.register(SECOND)
    return core


def at_work() -> Core:
    core = Core()
    core.hello()
    core.register()
    core.running()
    core.worker(tok(ONE, 0))
    return with_another(core)


def stopping() -> Core:
    core = at_work()
    core.client(say(Kind.CANCEL, ONE))
    return core


def not_assigned() -> Core:
    core = Core()
    core.hello()
    core.register(SECOND)
    core.running(worker=SECOND)
    core.worker(tok(ONE, 0), SECOND)
    core.register()
    return core


WORK_STATES: dict[str, Callable[[], Core]] = {
    "DISPATCHED, RUNNING": at_work,
    "stopping": stopping,
    "RECOVERING, this is the worker's half": from_a_worker,
    "not assigned to this worker": not_assigned,
}

WORK_EVENTS: dict[str, Callable[[Core], list[Action]]] = {
    "RUNACK": lambda core: core.worker(say(Kind.RUNACK, ONE, attempt=1)),
    "TOK at the end of the output": lambda core: core.worker(tok(ONE, 1)),
    "TOK before that": lambda core: core.worker(tok(ONE, 0)),
    "TOK beyond that": lambda core: core.worker(tok(ONE, 2)),
    "terminal, total as here": lambda core: core.worker(end(ONE, 1)),
    "terminal, another total": lambda core: core.worker(end(ONE, 2)),
    "RESET": lambda core: core.worker(say(Kind.RESET, ONE, attempt=1)),
    "HELD": held,
    "the worker is lost": lambda core: core.lose(WORKER),
    "the worker says BYE": lambda core: core.worker(say(Kind.BYE)),
    "half of DRAIN's time is over": lambda core: [
        *core.worker(say(Kind.DRAIN, arg=1000)),
        *core.wait(0.5),
    ],
}

WORK_CELLS = [
    pytest.param(event, state, cell, id=f"{event} / {state}")
    for event, cells in table(WORKER_PAGE, "", "DISPATCHED, RUNNING").by("").items()
    for state, cell in cells.items()
    if event in WORK_EVENTS and cell and state
]


@pytest.mark.parametrize(("event", "state", "cell"), WORK_CELLS)
def test_what_a_worker_says(event: str, state: str, cell: str) -> None:
    core = WORK_STATES[state]()
    losses = core.tables.counters["requeued"]
    assert sent(WORK_EVENTS[event](core)) == promised(cell)
    assert core.tables.counters["requeued"] - losses == ("a loss" in cell)


def test_a_run_that_is_not_answered() -> None:
    core = Core()
    core.hello()
    core.register()
    core.submit(ONE)
    with_another(core)
    rows = table(WORKER_PAGE, "", "DISPATCHED, RUNNING").by("")
    cells = rows["1 s without an answer"]
    assert rows.keys() == {*WORK_EVENTS, "1 s without an answer"}
    assert sent(core.wait(1.0)) | sent(core.wait(1.0)) == promised(cells["DISPATCHED, RUNNING"])
    core = stopping()
    assert sent(core.wait(1.0)) - {Kind.CANCELLED} == promised(cells["stopping"])
