"""Who runs next and where; and what is let in."""

from __future__ import annotations

import time

import pytest

from brokerkit import (
    CLIENT,
    FOUR,
    ONE,
    OTHER,
    SECOND,
    THREE,
    TWO,
    WORKER,
    Core,
    accepted,
    end,
    failure,
    kinds,
    run,
)
from loopmux import codec
from loopmux.messages import Run, SessionHint, Submit
from loopmux.wire import Header, Kind, Message
from loopmux_broker.admission import Limits
from loopmux_broker.clients import Client
from loopmux_broker.dispatch import HeadStart, Queues
from loopmux_broker.events import Action, Send, say
from loopmux_broker.output import Output
from loopmux_broker.requests import Request


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    return core


def order(core: Core, count: int, worker: bytes = WORKER) -> list[bytes]:
    """The requests that one worker with one slot gets one after the other, beginning with ONE."""
    ran, current = [], ONE
    for _ in range(count):
        actions = core.worker(end(current, 0), worker)
        current = next(a.message.header.request for a in actions if isinstance(a, Send) and a.message.kind is Kind.RUN)
        ran.append(current)
    return ran


def receivers(actions: list[Action]) -> list[bytes]:
    return [peer for peer, kind in kinds(actions) if kind is Kind.RUN]


# --- order


def test_first_come_first_served(core: Core) -> None:
    core.register()
    for request in (ONE, TWO, THREE, FOUR):
        core.submit(request)
    assert order(core, 3) == [TWO, THREE, FOUR]


def test_higher_priority_first(core: Core) -> None:
    core.register()
    core.submit(ONE)
    core.submit(TWO, priority=-1)
    core.submit(THREE)
    assert core.submit(FOUR, priority=5) == [accepted(FOUR, 1)]
    assert core.submit(TWO, priority=-1) == [accepted(TWO, 3)]
    assert order(core, 3) == [FOUR, THREE, TWO]


def test_an_impossible_priority(core: Core) -> None:
    core.register()
    [answer] = core.submit(ONE, priority=101)
    assert failure(answer)[3].message == "priority: found 101, expected a value from -100 to 100"


def test_a_continuing_turn_goes_before_a_first_turn(core: Core) -> None:
    core.register()
    core.submit(ONE)
    core.submit(TWO)
    core.wait(5)
    core.submit(THREE, continues=True)
    assert order(core, 2) == [THREE, TWO]


def test_but_waiting_makes_up_for_it(core: Core) -> None:
    core.register()
    core.submit(ONE)
    core.worker(say(Kind.RUNACK, ONE, attempt=1))
    core.submit(TWO)
    core.wait(11)
    core.submit(THREE, continues=True)
    assert order(core, 2) == [TWO, THREE]


def test_one_worker_for_several_models_takes_the_oldest_of_all(core: Core) -> None:
    core.register(models=("m", "n"))
    core.submit(ONE)
    core.submit(TWO, model="n")
    core.submit(THREE)
    core.submit(FOUR, model="n")
    assert order(core, 3) == [TWO, THREE, FOUR]


def test_a_queue_is_nobody_elses(core: Core) -> None:
    core.register(models=("m",))
    core.register(SECOND, models=("n",))
    core.submit(ONE)
    assert core.submit(TWO) == [accepted(TWO, 1)]
    assert receivers(core.submit(THREE, model="n")) == [SECOND]


def test_a_long_queue_costs_little_to_use() -> None:
    queues = Queues(HeadStart())
    client = Client(b"i", None, 0.0)

    def request(n: int, priority: int) -> Request:
        return Request(n.to_bytes(16), client, Submit("m", priority=priority), b"", float(n), 1.0, Output(1))

    waiting = [request(n, n % 7) for n in range(20_000)]
    begun = time.process_time()
    for entry in waiting:
        queues.push(entry)
    for entry in waiting[::2]:
        queues.position(entry)
        queues.remove(entry)
    spent = time.process_time() - begun
    assert queues.length == 10_000
    assert spent < 2.0  # 0.15 s here; a scan of the queue per operation would take minutes


# --- places


def test_the_least_loaded_worker_relative_to_its_slots(core: Core) -> None:
    core.register(WORKER, slots=2)
    core.register(SECOND, slots=8)
    requests = [bytes([n]) * 16 for n in range(1, 6)]
    places = [receivers(core.submit(r))[0] for r in requests]
    assert places == [WORKER, SECOND, SECOND, SECOND, SECOND]


def test_a_session_goes_back_to_its_worker(core: Core) -> None:
    core.register(WORKER, slots=2)
    core.register(SECOND, slots=2)
    core.submit(ONE, session="s")
    core.submit(TWO)
    core.worker(say(Kind.RUNACK, TWO, attempt=1), SECOND)
    core.worker(end(TWO, 0), SECOND)
    assert core.submit(THREE, session="s")[0] == run(THREE, WORKER, session="s")


def test_a_session_does_not_wait_for_its_worker(core: Core) -> None:
    core.register(WORKER)
    core.register(SECOND)
    core.submit(ONE, session="s")
    assert core.submit(TWO, session="s")[0] == run(TWO, SECOND, session="s")


def test_a_session_that_is_done_goes_anywhere(core: Core) -> None:
    core.register(WORKER, slots=2)
    core.submit(ONE, session="s")
    core.register(SECOND, slots=2)
    assert [peer for peer, kind in kinds(core.client(hint("waiting_on_tool", 2.0)))] == [WORKER]
    assert receivers(core.submit(TWO, session="s")) == [WORKER]
    assert [peer for peer, kind in kinds(core.client(hint("done")))] == [WORKER]
    assert core.client(hint("done")) == [], "nobody holds it any more"
    assert receivers(core.submit(THREE, session="s")) == [SECOND]


def hint(state: str, expected: float | None = None) -> Message:
    return Message(Header(Kind.SESSION), route=codec.pack(SessionHint("s", state, expected)))


def test_a_worker_knows_a_session_by_one_name_that_no_other_client_s_has(core: Core) -> None:
    core.hello(OTHER)
    core.register(WORKER, slots=4)
    named = []
    for request, client in ((ONE, CLIENT), (TWO, CLIENT), (THREE, OTHER)):
        [message] = [a.message for a in core.submit(request, client, session="s") if kinds([a]) == [(WORKER, Kind.RUN)]]
        named.append(codec.unpack(Run, message.route).session)
    assert named[0] == named[1] != named[2]
    [sent] = core.client(hint("waiting_on_tool", 2.0), OTHER)
    assert codec.unpack(SessionHint, sent.message.route) == SessionHint(named[2], "waiting_on_tool", 2.0)


def test_a_hint_about_a_session_that_nobody_ran_or_whose_worker_is_gone_goes_nowhere(core: Core) -> None:
    core.register(WORKER)
    assert core.client(hint("waiting_on_tool")) == []
    core.submit(ONE, session="s")
    core.worker(say(Kind.BYE))
    assert core.client(hint("waiting_on_tool")) == []


def test_sessions_of_different_clients_have_nothing_to_do_with_each_other(core: Core) -> None:
    core.hello(OTHER)
    core.register(WORKER, slots=2)
    core.register(SECOND, slots=2)
    core.submit(ONE, session="s")
    assert receivers(core.submit(TWO, OTHER, session="s")) == [SECOND]


# --- limits


def test_a_full_queue() -> None:
    core = Core(limits=Limits(queued=2, client_queued=2))
    core.hello()
    core.register()
    core.submit(ONE)
    core.submit(TWO)
    core.submit(THREE)
    [answer] = core.submit(FOUR)
    _, kind, _, body = failure(answer)
    assert (kind, body.code, body.retryable) == (Kind.ERROR, "overloaded", True)
    assert body.retry_after is not None
    assert 0 < body.retry_after <= 30
    assert body.message == "2 requests are queued, the most allowed: try again later"
    assert core.counted == {"submitted": 3, "overloaded": 1}
    core.worker(end(ONE, 0))
    assert core.submit(FOUR) == [accepted(FOUR, 2)]


def test_a_full_queue_does_not_refuse_what_need_not_queue() -> None:
    core = Core(limits=Limits(queued=1))
    core.hello()
    core.register(models=("m",))
    core.register(SECOND, models=("n",))
    core.submit(ONE)
    core.submit(TWO)
    assert receivers(core.submit(THREE, model="n")) == [SECOND]


def test_one_client_cannot_fill_the_queue_for_others() -> None:
    core = Core(limits=Limits(queued=10, client_queued=1))
    core.hello()
    core.hello(OTHER)
    core.register()
    core.submit(ONE)
    core.submit(TWO)
    [answer] = core.submit(THREE)
    assert "of this client" in failure(answer)[3].message
    assert core.submit(FOUR, OTHER) == [accepted(FOUR, 2, OTHER)]


@pytest.mark.parametrize(
    ("limits", "word"), [(Limits(held=150), "100 bytes of requests"), (Limits(client_held=150), "of this client")]
)
def test_bytes_are_limited_too(limits: Limits, word: str) -> None:
    core = Core(limits=limits)
    core.hello()
    core.register(slots=4)
    core.submit(ONE, body=bytes(100))
    [answer] = core.submit(TWO, body=bytes(100))
    assert failure(answer)[3].code == "overloaded"
    assert word in failure(answer)[3].message.replace("client's", "client")
    core.worker(end(ONE, 0))
    assert receivers(core.submit(TWO, body=bytes(100))) == [WORKER]


def test_retry_after_follows_the_pace(core: Core) -> None:
    core.register(slots=1)
    admission = core.tables.admission
    client = core.tables.clients.by_peer[CLIENT]
    assert admission.retry_after() == 0.1
    for _ in range(100):
        core.now += 2
        admission.ended(client, 0, core.now)
    admission.queued = 50
    assert admission.retry_after() == pytest.approx(10, rel=0.01)
    admission.queued = 5000
    assert admission.retry_after() == 30
