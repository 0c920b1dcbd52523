"""What launchers hear of the demand for models that scale, and what who waits for one of these is told."""

from __future__ import annotations

import pytest

from brokerkit import CLIENT, LAUNCHER, ONE, SECOND, THREE, TWO, WORKER, Core, end, tok
from loopmux import codec
from loopmux.messages import Demand, Heartbeat, Phase, Status, WorkerLoad
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import Action, Send, say


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    return core


def beat(core: Core, note: str = "") -> list[Action]:
    return core.worker(Message(Header(Kind.HB), codec.pack(Heartbeat(note=note))), LAUNCHER)


def scaled(actions: list[Action], peer: bytes = LAUNCHER) -> list[Demand]:
    sent = [a for a in actions if isinstance(a, Send) and a.message.kind is Kind.SCALE]
    assert all(a.peer == peer for a in sent)
    return [codec.unpack(Demand, a.message.body, codec.BODY_LIMITS) for a in sent]


def phases(actions: list[Action]) -> list[Phase]:
    return [
        codec.unpack(Phase, a.message.route) for a in actions if isinstance(a, Send) and a.message.kind is Kind.PHASE
    ]


def cold(core: Core) -> None:
    core.launcher()
    core.declare("m", "idle", scales=True)


def test_the_first_who_waits_for_a_cold_model_is_told_of_at_once_and_the_rest_with_the_heartbeat(core: Core) -> None:
    cold(core)
    assert scaled(core.submit(ONE)) == [Demand({"m": 1})]
    assert scaled(core.submit(TWO)) == []
    assert scaled(beat(core)) == [Demand({"m": 2})]
    assert scaled(core.submit(THREE, model="else")) == []


def test_who_waits_is_told_queued_for_as_long_as_it_waits_then_what_is_done_for_it(core: Core) -> None:
    cold(core)
    core.now += 100
    [first] = phases(core.submit(ONE))
    assert (first.phase, first.elapsed) == ("queued", 0.0)
    assert "because of this request" in first.detail
    told = [phases(core.declare("m", phase, scales=True))[0].phase for phase in ("building", "loading", "warming")]
    assert told == ["building", "loading", "warming"]


def test_a_launcher_whose_models_all_run_anyway_hears_nothing(core: Core) -> None:
    core.launcher()
    core.declare("m", "loading")
    assert scaled(core.submit(ONE)) == []
    assert scaled(beat(core)) == []


def test_it_hears_what_its_workers_have_to_do_and_since_when_nothing(core: Core) -> None:
    cold(core)
    core.register(WORKER, slots=2)
    core.register(SECOND, models=("other",))
    core.now += 5
    assert scaled(beat(core)) == [Demand({}, (WorkerLoad("w1", 2, 0, 5.0),))]
    core.running(ONE)
    core.now += 5
    assert scaled(beat(core)) == [Demand({}, (WorkerLoad("w1", 2, 1, 0.0),))]
    core.worker(tok(ONE, 0))
    core.worker(end(ONE, 1))
    core.now += 3
    assert scaled(beat(core)) == [Demand({}, (WorkerLoad("w1", 2, 0, 3.0),))]
    core.worker(say(Kind.DRAIN, arg=1500), WORKER)
    assert scaled(beat(core)) == [Demand()]


def test_a_request_that_comes_just_as_the_worker_leaves_has_the_model_started_again(core: Core) -> None:
    cold(core)
    core.register(WORKER)
    core.submit(ONE)
    assert scaled(core.worker(say(Kind.BYE), WORKER)) == [Demand({"m": 1})]


def test_a_model_that_is_declared_idle_while_somebody_waits(core: Core) -> None:
    """Its launcher stopped it before it heard of the request, or is a new one."""
    core.launcher()
    core.declare("m", "loading", scales=True)
    core.submit(ONE)
    assert scaled(core.declare("m", "idle", scales=True)) == [Demand({"m": 1})]


def test_a_request_that_does_not_wait_starts_nothing(core: Core) -> None:
    cold(core)
    [answer] = core.submit(ONE, wait=False)
    assert isinstance(answer, Send)
    assert answer.message.kind is Kind.ERROR
    assert scaled(beat(core)) == [Demand()]


def test_what_a_launcher_notes_is_in_the_status(core: Core) -> None:
    core.launcher()
    beat(core, "configuration: refused")
    assert status(core).notes == {"host": "configuration: refused"}
    beat(core)
    assert status(core).notes == {}


def status(core: Core) -> Status:
    [answer] = core.client(say(Kind.STATUS, ONE), CLIENT)
    assert isinstance(answer, Send)
    return codec.unpack(Status, answer.message.body, codec.BODY_LIMITS)
