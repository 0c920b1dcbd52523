"""Stories of adapters that are loaded at run time: by all workers or none, remembered by launchers, said until done."""

from __future__ import annotations

import pytest

from brokerkit import (
    CLIENT,
    FOUR,
    LAUNCHER,
    ONE,
    OTHER,
    SECOND,
    THIRD,
    THREE,
    TWO,
    WORKER,
    Core,
    failure,
    instance,
    runs,
)
from loopmux import codec, wire
from loopmux.messages import AdapterOrder, AdapterStatus, Done, Failure, ServedModel, Status
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import Action, Push, Send, say

LOUD = ServedModel("loud", "f-loud", "loud")
LOADED = Done(content="c0ffee", served=LOUD)
FAILED = Done(Failure("config", "it does not fit"))
ORDER = AdapterOrder("m", "loud", "/adapters/loud")


@pytest.fixture
def core() -> Core:
    """Two workers of ``m``, declared by a launcher, and a client."""
    core = Core()
    core.hello()
    core.launcher()
    core.declare("m", "ready")
    core.register(WORKER)
    core.register(SECOND)
    return core


def load(core: Core, id_: bytes = ONE, order: AdapterOrder = ORDER, peer: bytes = CLIENT) -> list[Action]:
    return core.client(Message(Header(Kind.LOAD, id_), codec.pack(order)), peer)


def unload(core: Core, id_: bytes = TWO, model: str = "m", name: str = "loud") -> list[Action]:
    return core.client(Message(Header(Kind.UNLOAD, id_), codec.pack(AdapterOrder(model, name))))


def done(core: Core, peer: bytes, id_: bytes = ONE, what: Done = LOADED) -> list[Action]:
    return core.worker(Message(Header(Kind.DONE, id_), body=codec.pack(what)), peer)


def told(actions: list[Action], kind: Kind) -> dict[bytes, bytes]:
    """Who is told something, and under which id."""
    return {a.peer: a.message.header.request for a in actions if isinstance(a, Send) and a.message.kind is kind}


def answers(actions: list[Action]) -> list[Done]:
    """What the client is told."""
    return [
        codec.unpack(Done, a.message.body)
        for a in actions
        if isinstance(a, Send) and a.message.kind is Kind.DONE and a.peer == CLIENT
    ]


def why(actions: list[Action]) -> Failure:
    [answer] = answers(actions)
    assert answer.failure is not None
    return answer.failure


def refusal(actions: list[Action]) -> Failure:
    """Why a request ended, of those that did."""
    [found] = terminals(actions).values()
    return found


def terminals(actions: list[Action]) -> dict[bytes, Failure]:
    """Why requests ended, by id."""
    found = {}
    for action in actions:
        if isinstance(action, (Push, Send)) and wire.from_bytes(action.data).kind is Kind.ERROR:
            id_ = wire.from_bytes(action.data).header.request
            found[id_] = failure(action)[3]
    return found


def adapters(core: Core) -> tuple[AdapterStatus, ...]:
    [answer] = core.client(say(Kind.STATUS, FOUR))
    assert isinstance(answer, Send)
    return codec.unpack(Status, answer.message.body, codec.BODY_LIMITS).adapters


def loaded(core: Core) -> None:
    """``loud`` is loaded everywhere and remembered."""
    load(core)
    done(core, WORKER)
    done(core, SECOND)
    remembered(core, ONE)


def remembered(core: Core, id_: bytes) -> list[Action]:
    """The launcher declares it, then answers."""
    return core.declare("loud", "ready", onto="m", folder=ORDER.folder) + done(core, LAUNCHER, id_, Done())


def forgotten(core: Core, id_: bytes = TWO) -> list[Action]:
    return core.declare("loud", "idle", removed=True) + done(core, LAUNCHER, id_, Done())


def unloaded(core: Core) -> list[Action]:
    unload(core)
    actions = forgotten(core)
    return actions + done(core, WORKER, TWO, Done()) + done(core, SECOND, TWO, Done())


# --- loading


def test_all_workers_load_it_then_the_launcher_remembers_it_then_the_client_hears(core: Core) -> None:
    assert told(load(core), Kind.LOAD) == {WORKER: ONE, SECOND: ONE}
    assert done(core, WORKER) == []
    assert refusal(core.submit(THREE, model="loud")).code == "model_not_found"  # in all of them or in none
    remember = done(core, SECOND)
    assert told(remember, Kind.LOAD) == {LAUNCHER: ONE}
    assert answers(remembered(core, ONE)) == [Done(content="c0ffee", workers=("w1", "w2"), remembered=True)]
    assert adapters(core) == (AdapterStatus("loud", 2, ("c0ffee",), "m", "/adapters/loud"),)
    assert runs(core.submit(TWO, model="loud")) != []
    assert runs(core.submit(THREE, adapter="loud")) != []


def test_without_a_launcher_it_is_loaded_and_said_to_be_forgotten(core: Core) -> None:
    core.worker(say(Kind.BYE), LAUNCHER)
    load(core)
    done(core, WORKER)
    assert answers(done(core, SECOND)) == [Done(content="c0ffee", workers=("w1", "w2"))]


def test_one_that_fails_is_reason_to_take_it_back_from_the_others(core: Core) -> None:
    load(core)
    done(core, WORKER)
    actions = done(core, SECOND, what=FAILED)
    assert why(actions) == Failure(
        "config", "adapter 'loud' was loaded nowhere: w2: it does not fit; taken back from w1", model="m"
    )
    [(peer, id_)] = told(actions, Kind.UNLOAD).items()
    assert peer == WORKER
    assert done(core, WORKER, id_, Done()) == []
    assert adapters(core) == ()
    assert refusal(core.submit(THREE, model="loud")).code == "model_not_found"


def test_the_same_reason_from_all_is_told_once(core: Core) -> None:
    load(core)
    done(core, WORKER, what=FAILED)
    actions = done(core, SECOND, what=FAILED)
    assert why(actions).message == "adapter 'loud' was loaded nowhere: w1, w2: it does not fit"
    assert told(actions, Kind.UNLOAD) == {}


def test_a_launcher_that_cannot_write_is_reason_to_take_it_back(core: Core) -> None:
    load(core)
    done(core, WORKER)
    done(core, SECOND)
    actions = done(core, LAUNCHER, what=Done(Failure("config", "the disk is full")))
    assert why(actions).message == ("adapter 'loud' was loaded nowhere: host: the disk is full; taken back from w1, w2")
    assert set(told(actions, Kind.UNLOAD)) == {WORKER, SECOND}


def test_a_worker_that_is_lost_meanwhile_has_failed_to_load_it(core: Core) -> None:
    load(core)
    done(core, WORKER)
    actions = core.lose(SECOND)
    assert why(actions).retryable
    assert "w2: it lost its connection while it loaded it" in why(actions).message
    assert set(told(actions, Kind.UNLOAD)) == {WORKER}


def test_a_worker_that_comes_meanwhile_has_to_load_it_too(core: Core) -> None:
    load(core)
    done(core, WORKER)
    assert told(core.register(THIRD), Kind.LOAD) == {THIRD: ONE}
    assert done(core, SECOND) == []
    done(core, THIRD)
    assert answers(remembered(core, ONE))[0].workers == ("w1", "w2", "w3")


def test_it_is_said_again_until_it_is_answered_and_not_for_ever(core: Core) -> None:
    load(core)
    done(core, WORKER)
    assert set(told(core.wait(1.25), Kind.LOAD)) == {SECOND}
    actions = core.wait(core.config.stall.adapter)
    assert why(actions).message == (
        "adapter 'loud' was loaded nowhere: w2: the worker did not answer within 120 s; taken back from w1"
    )
    late = done(core, SECOND)  # it has it after all, and nobody wants it there any more
    assert set(told(late, Kind.UNLOAD)) == {SECOND}


def test_one_that_is_remembered_can_be_unloaded_while_no_worker_runs(core: Core) -> None:
    loaded(core)
    core.lose(WORKER)
    core.lose(SECOND)
    assert set(told(unload(core), Kind.UNLOAD)) == {LAUNCHER}
    assert answers(forgotten(core)) == [Done(remembered=True)]
    assert adapters(core) == ()


def test_the_time_in_which_the_broker_itself_was_away_is_nobodys_silence(core: Core) -> None:
    load(core)
    done(core, WORKER)
    core.sleep(core.config.stall.adapter)
    assert set(told(core.wait(1.25), Kind.LOAD)) == {SECOND}
    done(core, SECOND)
    assert answers(remembered(core, ONE))[0].workers == ("w1", "w2")


def test_a_client_that_asks_again_is_answered_again_and_nothing_is_done_twice(core: Core) -> None:
    load(core)
    assert load(core) == []
    done(core, WORKER)
    done(core, SECOND)
    remembered(core, ONE)
    assert [answer.workers for answer in answers(load(core))] == [("w1", "w2")]
    assert done(core, WORKER) == []  # a repeated LOAD was answered as well


def test_what_is_loaded_already_is_for_the_workers_to_judge_and_stays_where_one_fails(core: Core) -> None:
    loaded(core)
    assert set(told(load(core, THREE), Kind.LOAD)) == {WORKER, SECOND}
    done(core, WORKER, THREE)
    actions = done(core, SECOND, THREE, FAILED)
    assert why(actions).code == "config"
    assert told(actions, Kind.UNLOAD) == {}
    assert [one.workers for one in adapters(core)] == [2]


@pytest.mark.parametrize(
    ("order", "code", "words"),
    [
        (AdapterOrder("x", "loud", "/a"), "model_not_found", "model 'x' is not known, expected one of"),
        (AdapterOrder("cold", "loud", "/a"), "overloaded", r"no worker now (it is idle): adapters are loaded into"),
        (AdapterOrder("m", "n", "/a"), "bad_request", "found a model of that name already"),
        (AdapterOrder("m", "cold", "/a"), "bad_request", "found a model of that name already"),
        (AdapterOrder("m", "", "/a"), "bad_request", "expected 1 to 100 bytes"),
        (AdapterOrder("m", "loud", "a/b"), "bad_request", "found 'a/b', expected an absolute path"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(core: Core, order: AdapterOrder, code: str, words: str) -> None:
    core.declare("cold", "idle")
    core.declare("n", "ready")
    core.register(THIRD, models=("n",))
    actions = load(core, order=order)
    assert told(actions, Kind.LOAD) == {}
    assert why(actions).code == code
    assert words in why(actions).message


def test_for_a_model_on_demand_without_a_worker_it_is_remembered_and_the_next_one_has_it(core: Core) -> None:
    core.declare("cold", "idle", scales=True)
    order = AdapterOrder("cold", "loud", "/adapters/loud")
    assert told(load(core, order=order), Kind.LOAD) == {LAUNCHER: ONE}
    core.register(THIRD, models=("cold",))  # one that was on its way
    actions = core.declare("loud", "idle", onto="cold", folder=order.folder, scales=True)
    actions += done(core, LAUNCHER, ONE, Done())
    assert answers(actions) == [Done(remembered=True)]
    assert set(told(actions, Kind.LOAD)) == {THIRD}


def test_for_one_that_cannot_be_started_it_is_refused_with_that_reason(core: Core) -> None:
    core.declare("cold", "failed", scales=True, detail="no such folder")
    refused = why(load(core, order=AdapterOrder("cold", "loud", "/a")))
    assert "no worker now (it is failed: no such folder)" in refused.message


def test_an_adapter_is_loaded_for_a_model_not_for_an_adapter(core: Core) -> None:
    loaded(core)
    refused = why(load(core, THREE, AdapterOrder("loud", "louder", "/a")))
    assert "'loud' is an adapter that was loaded for 'm': name that one" in refused.message


def test_one_at_a_time_for_a_name(core: Core) -> None:
    core.hello(OTHER)
    load(core)
    [answer] = load(core, TWO, peer=OTHER)
    assert isinstance(answer, Send)
    failed = codec.unpack(Done, answer.message.body).failure
    assert failed is not None
    assert (failed.code, failed.retryable) == ("overloaded", True)


def test_an_engine_that_loads_is_not_taken_for_one_that_hangs(core: Core) -> None:
    core.running(TWO)
    core.wait(core.config.stall.prefill - 10)
    load(core)
    core.wait(core.config.stall.prefill + 10)
    assert WORKER in core.tables.pool.workers
    done(core, WORKER)
    done(core, SECOND)
    core.wait(core.config.stall.prefill + 10)
    assert WORKER not in core.tables.pool.workers


def test_one_that_hangs_over_it_is_lost_as_soon_as_it_is_not_waited_for_any_more(core: Core) -> None:
    core.running(TWO)
    load(core)
    done(core, SECOND)
    core.wait(core.config.stall.adapter - 1)
    assert WORKER in core.tables.pool.workers
    assert "did not answer within 120 s" in why(core.wait(1.5)).message
    assert WORKER not in core.tables.pool.workers


# --- what launchers remember


def test_a_worker_that_comes_without_it_is_told_to_load_it(core: Core) -> None:
    loaded(core)
    [(peer, id_)] = told(core.register(THIRD), Kind.LOAD).items()
    assert peer == THIRD
    done(core, THIRD, id_)
    assert [one.workers for one in adapters(core)] == [3]


def test_one_that_cannot_load_it_has_left_it_out_and_is_not_asked_again(core: Core) -> None:
    loaded(core)
    [(_, id_)] = told(core.register(THIRD), Kind.LOAD).items()
    done(core, THIRD, id_, FAILED)
    assert told(core.declare("loud", "ready", onto="m", folder=ORDER.folder), Kind.LOAD) == {}
    assert [one.workers for one in adapters(core)] == [2]
    assert any("it does not fit" in line.event for line in core.logged)


@pytest.mark.parametrize("how", ["it is unloaded", "its launcher comes without it", "it is forgotten meanwhile"])
def test_one_that_a_worker_could_not_load_is_unknown_once_nobody_remembers_it(core: Core, how: str) -> None:
    core.declare("loud", "ready", onto="m", folder=ORDER.folder)
    core.lose(SECOND)
    [(_, id_)] = told(core.register(THIRD), Kind.LOAD).items()
    match how:
        case "it is unloaded":
            done(core, THIRD, id_, FAILED)
            unloaded(core)
        case "its launcher comes without it":
            done(core, THIRD, id_, FAILED)
            core.lose(LAUNCHER)
            core.launcher(b"l2", boot=instance(LAUNCHER), introduction=1)
            core.declare("m", "ready", b"l2")
            core.wait(5.5)
        case _:
            core.declare("loud", "idle", removed=True)
            done(core, THIRD, id_, FAILED)
    assert core.tables.pool.known() == ["m"]
    assert refusal(core.submit(THREE, model="loud")).code == "model_not_found"


def test_a_broker_that_was_started_again_learns_it_from_launcher_and_workers() -> None:
    core = Core()
    core.hello()
    core.register(WORKER, models=("m", "loud"), adapters=("loud",))
    core.register(SECOND)
    core.launcher()
    core.declare("m", "ready")
    actions = core.declare("loud", "ready", onto="m", folder="/adapters/loud")
    assert set(told(actions, Kind.LOAD)) == {SECOND}
    assert adapters(core) == (AdapterStatus("loud", 1, (), "m", "/adapters/loud"),)


# --- unloading


def test_the_launcher_forgets_it_first_then_the_workers_unload_it(core: Core) -> None:
    loaded(core)
    assert told(unload(core), Kind.UNLOAD) == {LAUNCHER: TWO}
    actions = forgotten(core)
    assert told(actions, Kind.UNLOAD) == {WORKER: TWO, SECOND: TWO}
    done(core, WORKER, TWO, Done())
    assert answers(done(core, SECOND, TWO, Done())) == [Done(workers=("w1", "w2"), remembered=True)]
    assert adapters(core) == ()
    assert refusal(core.submit(THREE, model="loud")).code == "model_not_found"
    assert refusal(core.submit(FOUR, adapter="loud")).code == "adapter_not_found"


def test_what_waits_for_it_is_told_that_it_is_gone(core: Core) -> None:
    loaded(core)
    core.submit(THREE)
    core.submit(FOUR)  # both slots
    core.submit(b"q" * 16, model="loud")
    core.submit(b"r" * 16, adapter="loud")
    ends = {id_: failed.message for id_, failed in terminals(unloaded(core)).items()}
    assert "'loud' is gone: it was unloaded" in ends[b"q" * 16]
    assert "has no adapter 'loud'" in ends[b"r" * 16]


def test_a_launcher_that_cannot_write_leaves_it_where_it_is(core: Core) -> None:
    loaded(core)
    unload(core)
    actions = done(core, LAUNCHER, TWO, Done(Failure("config", "the disk is full")))
    assert why(actions).message == "adapter 'loud' was not unloaded: host: the disk is full"
    assert told(actions, Kind.UNLOAD) == {}
    assert runs(core.submit(THREE, model="loud")) != []


def test_a_worker_that_does_not_have_it_any_more_has_unloaded_it(core: Core) -> None:
    loaded(core)
    unload(core)
    forgotten(core)
    done(core, WORKER, TWO, Done(Failure("adapter_not_found", "it is not loaded")))
    assert answers(core.lose(SECOND)) == [Done(workers=("w1",), remembered=True)]


def test_a_worker_that_was_away_meanwhile_is_told_when_it_is_back(core: Core) -> None:
    loaded(core)
    core.lose(SECOND)
    unload(core)
    forgotten(core)
    done(core, WORKER, TWO, Done())
    core.wait(5.5)  # its launcher has declared all that it knows
    back = core.register(THIRD, name="w2", boot=instance(SECOND), models=("m", "loud"), adapters=("loud",))
    assert set(told(back, Kind.UNLOAD)) == {THIRD}


@pytest.mark.parametrize("declared", [True, False])
def test_what_a_worker_has_stays_while_its_launcher_declares_its_models(declared: bool) -> None:
    core = Core()
    core.launcher()
    core.declare("m", "ready")
    came = core.register(WORKER, models=("m", "loud"), adapters=("loud",))
    assert told(came, Kind.UNLOAD) == {}
    if declared:
        core.declare("loud", "ready")
    assert set(told(core.wait(5.5), Kind.UNLOAD)) == (set() if declared else {WORKER})


def test_it_stays_when_the_launcher_is_lost_before_it_has_declared_all_until_that_is_back() -> None:
    core = Core()
    core.launcher()
    core.declare("m", "ready")
    core.lose(LAUNCHER)
    came = core.register(WORKER, models=("m", "loud"), adapters=("loud",))
    assert told(came + core.wait(20.0), Kind.UNLOAD) == {}
    core.launcher(b"l2", boot=instance(LAUNCHER))
    core.declare("m", "ready", b"l2")
    assert set(told(core.wait(5.5), Kind.UNLOAD)) == {WORKER}


def test_what_a_launcher_does_not_name_any_more_when_it_is_back_is_not_remembered_though_it_never_said_so() -> None:
    core = Core()
    core.launcher()
    core.declare("m", "ready")
    core.declare("loud", "ready", onto="m", folder="/adapters/loud")
    core.register(WORKER, models=("m", "loud"), adapters=("loud",))
    core.lose(LAUNCHER)  # with its word that it has forgotten it
    core.launcher(b"l2", boot=instance(LAUNCHER), introduction=1)
    core.declare("m", "ready", b"l2")
    assert set(told(core.wait(5.5), Kind.UNLOAD)) == {WORKER}


def test_only_the_launcher_of_its_host_says_that_nobody_remembers_what_a_worker_has() -> None:
    core = Core()
    core.launcher(name="alpha", host="alpha")
    core.declare("m", "ready")
    core.register(WORKER, models=("m", "loud"), adapters=("loud",), host="beta")
    assert told(core.wait(20.0), Kind.UNLOAD) == {}
    core.launcher(b"l2", "beta", host="beta")
    core.declare("m", "ready", b"l2")
    assert set(told(core.wait(5.5), Kind.UNLOAD)) == {WORKER}


@pytest.mark.parametrize(
    ("model", "name", "code", "words"),
    [
        ("m", "quiet", "adapter_not_found", "model 'm' has no adapter 'quiet', loaded are: loud"),
        ("m", "m", "adapter_not_found", "has no adapter 'm'"),
        ("n", "loud", "adapter_not_found", "model 'n' has no adapter 'loud', loaded are: none"),
        ("x", "loud", "model_not_found", "model 'x' is not known"),
        ("a", "a", "bad_request", "'a' is one of the configuration: take it out there"),
    ],
)
def test_what_cannot_be_unloaded(core: Core, model: str, name: str, code: str, words: str) -> None:
    loaded(core)
    core.declare("n", "ready")
    core.declare("a", "ready")
    core.register(THIRD, models=("n",))
    core.register(b"w4", models=("a",), adapters=("a",))
    refused = why(unload(core, THREE, model, name))
    assert refused.code == code
    assert words in refused.message


def test_no_id_and_no_sense_are_strikes(core: Core) -> None:
    load(core)
    before = core.counted.get("strikes", 0)
    done(core, WORKER, what=Done(content="c", served=ServedModel("other", "f")))
    done(core, WORKER, what=Done())
    load(core, bytes(16), AdapterOrder("m", "two", "/a"))
    assert core.counted["strikes"] == before + 3
