"""Who runs next and where; and what is let in."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

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
    instance,
    kinds,
    order,
    run,
    runs,
    tok,
)
from loopmux import codec
from loopmux.messages import Register, Run, ServedModel, SessionHint, Submit
from loopmux.wire import VERSIONS, Header, Kind, Message
from loopmux_broker import dispatch
from loopmux_broker.admission import Limits
from loopmux_broker.clients import Client, Principal
from loopmux_broker.events import Action, say
from loopmux_broker.output import Output
from loopmux_broker.pool import Worker
from loopmux_broker.queues import HeadStart, Queues
from loopmux_broker.requests import Request


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    return core


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


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("priority", 101, "from -100 to 100"),
        ("prompt_size", 2**62, "from 0 to 4194304"),
        ("prompt_size", -1, "from 0 to 4194304"),
        ("max_new_tokens", 2**62, "from 1 to 2147483647"),
        ("max_new_tokens", -(2**62), "from 1 to 2147483647"),
    ],
)
def test_numbers_that_no_request_can_have(core: Core, field: str, value: int, expected: str) -> None:
    """They would be its client's account, and the time for which its worker's engine may stand still."""
    core.register()
    [answer] = core.submit(ONE, **{field: value})
    assert failure(answer)[3].code == "bad_request"
    assert failure(answer)[3].message == f"{field}: found {value}, expected a value {expected}"
    core.assert_empty()


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


class Counted(float):
    """A time that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float(self) < float(other)

    def __gt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float(self) > float(other)

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return float(self) == other

    __hash__ = float.__hash__

    def __neg__(self) -> Counted:
        return Counted(-float(self))

    def __rsub__(self, other: float) -> Counted:
        return Counted(other - float(self))


def operations_per_dispatch(queued: int, clients: int, dispatches: int = 50) -> float:
    """Comparisons of ranks and lines of Python, for each request that is taken out of a queue and charged."""
    queues = Queues(HeadStart(), lambda _: True)
    known = [Client(n.to_bytes(16), None, "", Principal(), 0.0) for n in range(clients)]
    dice = random.Random(1)
    for n in range(queued):
        submit = Submit("m", priority=dice.randint(0, 3), max_new_tokens=dice.randint(1, 500))
        queues.push(Request(n.to_bytes(16), known[n % clients], submit, b"", Counted(dice.random()), 1.0, Output(1)))
    worker = Worker(
        b"w", Register("worker", "w", b"b" * 16, VERSIONS, models=(ServedModel("m", "f"),), slots=1), 0.0, 0.0, 0, ""
    )
    lines = 0

    def count(frame: FrameType, event: str, _: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    Counted.comparisons = 0
    before = sys.gettrace()
    sys.settrace(count)
    try:
        for _ in range(dispatches):
            request = queues.next_for(worker)
            assert request is not None
            queues.remove(request)
            queues.charge(request)
            request.output.total = 10
            queues.settle(request)
    finally:
        sys.settrace(before)
    return (Counted.comparisons + lines) / dispatches


@pytest.mark.parametrize("many", [1, 1_000, 100_000])
def test_dispatch_costs_no_more_than_the_logarithm_of_the_queue(many: int) -> None:
    """With 100 000 queued, of one client or of as many, it takes at most log2(100 000) / log2(10) = 5 times as much."""
    few = operations_per_dispatch(100, min(many, 10))
    long = operations_per_dispatch(100_000, many)
    assert long < 5 * few
    assert long < 1_000  # a scan of the queue, or of a thousand clients' lines, would take more


def test_a_queue_gives_everybody_exactly_once_whatever_is_taken_out_in_between() -> None:
    dice = random.Random(2)
    queues = Queues(HeadStart(), lambda _: True)
    clients = [Client(n.to_bytes(16), None, "", Principal(), 0.0) for n in range(7)]
    worker = Worker(
        b"w", Register("worker", "w", b"b" * 16, VERSIONS, models=(ServedModel("m", "f"),), slots=1), 0.0, 0.0, 0, ""
    )
    waiting: dict[bytes, Request] = {}
    for n in range(4000):
        if dice.random() < 0.5 or not waiting:
            submit = Submit("m", priority=dice.randint(-2, 2), continues=dice.random() < 0.3)
            request = Request(n.to_bytes(16), dice.choice(clients), submit, b"", dice.random(), 1.0, Output(1))
            waiting[request.id] = request
            queues.push(request)
        elif dice.random() < 0.3:
            queues.remove(waiting.pop(dice.choice(list(waiting))))
        else:
            taken = queues.next_for(worker)
            assert taken is waiting.pop(taken.id)
            mine = [r for r in waiting.values() if r.client is taken.client]
            assert all(r.rank < taken.rank for r in mine)
            queues.remove(taken)
            queues.charge(taken)
            taken.output.total = dice.randint(0, 300)
            queues.settle(taken)
        assert queues.length == queues.waiting("m") == len(waiting)
        assert all(1 <= queues.position(r) <= len(waiting) for r in list(waiting.values())[:3])
    assert sorted(r.id for r in queues.of_model("m")) == sorted(waiting)


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


def ended(core: Core, request: bytes, worker: bytes) -> None:
    core.worker(say(Kind.RUNACK, request, attempt=1), worker)
    core.worker(end(request, 0), worker)
    core.client(say(Kind.ENDACK, request))


def place(core: Core, *hashes: bytes, **route: Any) -> bytes:
    """Where a request with these beginnings goes and ends."""
    [worker] = receivers(core.submit(ONE, hashes=hashes, **route))
    ended(core, ONE, worker)
    return worker


def test_of_equally_free_workers_the_one_that_knows_most_of_the_prompt(core: Core) -> None:
    core.register(WORKER, slots=2)
    core.register(SECOND, slots=2)
    assert receivers(core.submit(ONE, hashes=(b"system", b"long"))) == [WORKER]
    assert receivers(core.submit(TWO, hashes=(b"system", b"other"))) == [SECOND]
    ended(core, ONE, WORKER)
    ended(core, TWO, SECOND)
    for _ in range(3):
        assert place(core, b"system", b"long", b"long, and more") == WORKER
        assert place(core, b"system", b"other", b"other, and more") == SECOND
    assert place(core, b"system", b"new") == SECOND  # it was given this beginning last
    assert place(core, b"foreign") == WORKER  # nobody knows it: to the one that has served less


def test_no_prompt_makes_up_for_more_load(core: Core) -> None:
    core.register(WORKER, slots=2)
    core.register(SECOND, slots=2)
    assert receivers(core.submit(ONE, hashes=(b"system",))) == [WORKER]
    assert receivers(core.submit(TWO, hashes=(b"system",))) == [SECOND]
    ended(core, ONE, WORKER)
    assert receivers(core.submit(THREE, hashes=(b"system",))) == [WORKER]  # SECOND had it last, and runs one


@pytest.mark.parametrize("route", [{"model": "n"}, {"adapter": "a"}], ids=str)
def test_the_beginnings_of_another_model_or_adapter_are_others(core: Core, route: dict[str, str]) -> None:
    core.register(WORKER, slots=2, models=("m", "n"), adapters=("a",))
    core.register(SECOND, slots=2, models=("m", "n"), adapters=("a",))
    assert place(core, b"system") == place(core, b"system") == WORKER
    assert place(core, b"system", **route) == SECOND


def test_no_more_beginnings_are_remembered_than_so_many(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_BEGINNINGS", 100)
    core.register(WORKER, slots=1)
    for n in range(10):
        place(core, *(bytes([n, i]) for i in range(64)))
        assert len(core.tables.affinity._began) <= 100


def test_of_one_session_no_more_models_are_remembered_than_so_many(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MODELS", 3)
    core.register(WORKER, slots=2, models=("a", "b", "c", "d"))
    for model in ("a", "b", "a", "c", "d"):
        place(core, model=model, session="s")
    assert list(core.tables.affinity._last[instance(CLIENT), "s"]) == ["a", "c", "d"]


def test_a_session_of_short_prompts_does_not_wait_for_its_worker(core: Core) -> None:
    core.register(WORKER)
    core.register(SECOND)
    core.submit(ONE, session="s")
    assert core.submit(TWO, session="s")[0] == run(TWO, SECOND, session="s")


OTHER_TURN = b"t" * 16
LONG = 4_000
"""Characters of a prompt."""


def busy_home(core: Core, took: float = 0.4, slots: int = 1) -> None:
    """WORKER ran the session s and is full; SECOND is free, and is known to take so long for a LONG prompt."""
    core.register(WORKER)
    core.register(SECOND, slots=slots)
    for request, worker, route in ((ONE, WORKER, {"session": "s"}), (TWO, SECOND, {})):
        assert receivers(core.submit(request, prompt_size=LONG, **route)) == [worker]
        core.now += took
        core.worker(tok(request, 0), worker)
        core.worker(end(request, 1), worker)
        core.client(say(Kind.CREDIT, request, seq=10, arg=1))
        core.client(say(Kind.ENDACK, request))
    assert receivers(core.submit(THREE)) == [WORKER]
    core.worker(say(Kind.RUNACK, THREE, attempt=1))


def next_turn(core: Core) -> list[Action]:
    return core.submit(FOUR, session="s", continues=True, prompt_size=LONG)


def test_a_session_waits_for_its_worker_as_long_as_its_prompt_takes_elsewhere(core: Core) -> None:
    busy_home(core)
    assert next_turn(core) == [accepted(FOUR, 1)]
    assert receivers(core.wait(0.3)) == []
    assert receivers(core.wait(0.2)) == [SECOND]


def test_and_goes_there_before_others_if_that_has_a_slot_in_time(core: Core) -> None:
    busy_home(core)
    next_turn(core)
    core.now += 0.3
    assert receivers(core.worker(end(THREE, 0))) == [WORKER]
    assert receivers(core.wait(0.5)) == []


@pytest.mark.parametrize(("slots", "there"), [(1, WORKER), (2, SECOND)])
def test_and_waits_no_second_time_where_another_turn_took_the_session_meanwhile(
    core: Core, slots: int, there: bytes
) -> None:
    busy_home(core, slots=slots)
    next_turn(core)
    assert receivers(core.submit(OTHER_TURN, session="s")) == [SECOND]
    assert (there, FOUR, 1) in runs(core.worker(end(THREE, 0)))


@pytest.mark.parametrize("leaves", [Kind.DRAIN, Kind.BYE, None])
def test_a_worker_that_leaves_is_not_waited_for(core: Core, leaves: Kind | None) -> None:
    busy_home(core)
    next_turn(core)
    actions = core.worker(say(leaves, arg=2000)) if leaves else core.lose(WORKER)
    assert (SECOND, FOUR, 1) in runs(actions)


@pytest.mark.parametrize("limits", [Limits(queued=1), Limits(client_queued=1)])
def test_nor_where_the_queue_is_full(limits: Limits) -> None:
    core = Core(limits=limits)
    core.hello()
    busy_home(core)
    assert next_turn(core) == [accepted(FOUR, 1)]
    assert receivers(core.submit(TWO, session="s", continues=True, prompt_size=LONG)) == [SECOND]
    assert core.tables.admission.queued == 1


def test_nor_one_where_nobody_knows_how_long_a_prompt_takes(core: Core) -> None:
    busy_home(core, took=0.0)
    assert receivers(next_turn(core)) == [SECOND]


def test_nor_one_that_has_not_the_adapter_that_it_wants_now(core: Core) -> None:
    busy_home(core)
    core.register(SECOND, adapters=("a",))
    assert receivers(core.submit(FOUR, session="s", continues=True, prompt_size=LONG, adapter="a")) == [SECOND]


@pytest.mark.parametrize("again", [{"session": "s"}, {"hashes": (b"begun",)}], ids=["its session", "its beginning"])
def test_how_long_a_prompt_takes_is_not_learnt_where_its_state_is(core: Core, again: dict[str, Any]) -> None:
    core.register()
    for request, took in ((ONE, 0.4), (TWO, 0.001)):
        core.submit(request, prompt_size=LONG, **again)
        core.now += took
        core.worker(tok(request, 0))
        core.worker(end(request, 1))
    assert core.tables.pool.workers[WORKER].pace == pytest.approx(0.4 / LONG)


def test_no_wait_is_longer_than_two_seconds(core: Core) -> None:
    busy_home(core, took=60.0)
    next_turn(core)
    assert receivers(core.wait(1.75)) == []
    assert receivers(core.wait(0.5)) == [SECOND]


def test_a_request_that_waits_for_its_session_s_worker_can_be_cancelled(core: Core) -> None:
    busy_home(core)
    next_turn(core)
    assert core.tables.queues.length == 1
    core.client(say(Kind.CANCEL, FOUR))
    core.client(say(Kind.ENDACK, FOUR))
    assert receivers(core.wait(3)) == []
    core.worker(end(THREE, 0))
    core.client(say(Kind.ENDACK, THREE))
    core.assert_empty()


def test_when_its_time_is_over_and_nobody_is_free_it_waits_like_the_others(core: Core) -> None:
    busy_home(core)
    next_turn(core)
    assert receivers(core.submit(TWO)) == [SECOND]
    core.wait(1)
    assert core.tables.queues.position(core.tables.requests[FOUR]) == 1
    assert receivers(core.worker(end(TWO, 0), SECOND)) == [SECOND]


def full_house(core: Core, took: float = 0.0) -> tuple[bytes, bytes]:
    """Two workers with a slot each and a session each, ``here`` and ``there``, both taken by others' requests since.

    A prompt takes them so long.
    """
    core.register(WORKER)
    core.register(SECOND)
    others = bytes([8]) * 16, bytes([9]) * 16
    for request, worker, session in ((ONE, WORKER, "here"), (TWO, SECOND, "there")):
        assert receivers(core.submit(request, session=session)) == [worker]
    for request, other, worker in ((ONE, others[0], WORKER), (TWO, others[1], SECOND)):
        core.now += took
        core.worker(tok(request, 0), worker)
        core.worker(end(request, 1), worker)
        core.client(say(Kind.CREDIT, request, seq=10, arg=1))
        core.client(say(Kind.ENDACK, request))
        assert receivers(core.submit(other)) == [worker]
        core.worker(say(Kind.RUNACK, other, attempt=1), worker)
    return others


def test_in_a_full_house_a_slot_goes_to_one_whose_session_is_there(core: Core) -> None:
    mine, theirs = full_house(core)
    core.submit(THREE, session="there", continues=True)
    core.wait(1.5)
    core.submit(FOUR, session="here", continues=True)
    assert runs(core.worker(end(mine, 0))) == [(WORKER, FOUR, 1)]
    assert runs(core.worker(end(theirs, 0), SECOND)) == [(SECOND, THREE, 1)]


def test_but_nobody_is_passed_by_one_that_came_much_later(core: Core) -> None:
    mine, _ = full_house(core)
    core.submit(THREE, session="there", continues=True)
    core.wait(2.5)
    core.submit(FOUR, session="here", continues=True)
    assert runs(core.worker(end(mine, 0))) == [(WORKER, THREE, 1)]


def test_a_free_slot_is_left_alone_for_as_long_as_the_prompt_takes_there(core: Core) -> None:
    mine, theirs = full_house(core, took=0.4)
    core.submit(THREE, session="there", continues=True)
    core.wait(0.25)
    assert runs(core.worker(end(mine, 0))) == []
    assert runs(core.submit(FOUR)) == [(WORKER, FOUR, 1)], "others may have it"
    assert runs(core.worker(end(theirs, 0), SECOND)) == [(SECOND, THREE, 1)]


def test_and_no_longer(core: Core) -> None:
    mine, _ = full_house(core, took=0.4)
    core.submit(THREE, session="there", continues=True)
    core.wait(0.25)
    core.worker(end(mine, 0))
    assert runs(core.wait(0.25)) == [(WORKER, THREE, 1)]


def test_what_counts_is_when_it_came(core: Core) -> None:
    mine, _ = full_house(core, took=0.4)
    core.submit(THREE, session="there", continues=True)
    core.wait(0.5)
    assert runs(core.worker(end(mine, 0))) == [(WORKER, THREE, 1)]


def test_of_those_that_may_pass_the_first_goes_first(core: Core) -> None:
    mine, _ = full_house(core)
    core.submit(THREE, session="there", continues=True)
    core.submit(TWO, continues=True)
    core.submit(FOUR, session="here", continues=True)
    assert runs(core.worker(end(mine, 0))) == [(WORKER, TWO, 1)]


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


def test_ends_that_are_not_acknowledged_count_and_the_refusal_says_so() -> None:
    core = Core(limits=Limits(client_queued=1))
    core.hello()
    core.register(slots=4)
    for n in range(1, 5):
        core.submit(bytes([n]) * 16)
    [answer] = core.submit(bytes(16 * [9]))
    found = "4 requests of this client are queued, run or wait for ENDACK, the most allowed for one client"
    assert failure(answer)[3].message == f"{found}: try again later"


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
    account = core.tables.clients.by_peer[CLIENT].principal
    assert admission.retry_after() == 0.1
    for _ in range(100):
        core.now += 2
        admission.ended(account, 0, core.now)
    admission.queued = 50
    assert admission.retry_after() == pytest.approx(10, rel=0.01)
    admission.queued = 5000
    assert admission.retry_after() == 30
