"""Stories of workers, launchers and models: joining, replacing, catalogue, phases, status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from brokerkit import (
    BODY,
    CLIENT,
    EPOCH,
    FOUR,
    LAUNCHER,
    ONE,
    SECOND,
    THREE,
    TWO,
    WORKER,
    Core,
    accepted,
    end,
    failure,
    held,
    instance,
    kinds,
    pushed,
    run,
    runs,
    tok,
)
from loopmux import codec, wire
from loopmux.messages import Heartbeat, ModelStatus, Phase, Register, ServedModel, Status, Welcome
from loopmux.wire import Header, Kind, Message
from loopmux_broker import membership
from loopmux_broker.events import Action, LoopStalled, Send, TimerDue, say
from loopmux_broker.requests import State


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    return core


def phases(actions: list[Action]) -> list[Phase]:
    return [
        codec.unpack(Phase, a.message.route) for a in actions if isinstance(a, Send) and a.message.kind is Kind.PHASE
    ]


def status_of(core: Core) -> Status:
    [answer] = core.client(say(Kind.STATUS, FOUR))
    assert isinstance(answer, Send)
    return codec.unpack(Status, answer.message.body, codec.BODY_LIMITS)


# --- joining


def test_a_worker_is_welcomed(core: Core) -> None:
    route = codec.pack(Welcome(wire.VERSION, EPOCH, 1.0, wire.WORKER_BODY_LIMIT, 1024, "loopmux"))
    assert core.register() == [Send(WORKER, Message(Header(Kind.WELCOME), route=route))]


def test_strangers_are_asked_who_they_are(core: Core) -> None:
    beat = Message(Header(Kind.HB), route=codec.pack(Heartbeat()))
    assert core.worker(beat, SECOND) == [Send(SECOND, say(Kind.WHO))]
    assert core.worker(tok(ONE, 0), SECOND) == [Send(SECOND, say(Kind.WHO))]
    assert core.client(say(Kind.PING), b"c9") == [Send(b"c9", say(Kind.WHO))]
    assert core.submit(ONE, b"c9") == [Send(b"c9", say(Kind.WHO))]


def test_no_common_version(core: Core) -> None:
    register = Register("worker", "w", bytes(16), (7, 8), models=(ServedModel("m", "f"),), slots=1)
    [answer] = core.worker(Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({})))
    peer, kind, _, body = failure(answer)
    assert (peer, kind, body.code) == (WORKER, Kind.ERROR, "protocol")
    assert "speaks 7, 8, the broker 3" in body.message
    hello = Message(Header(Kind.HELLO), route=codec.pack({"versions": [9], "instance": bytes(16)}))
    [answer] = core.client(hello, b"c9")
    assert "speaks 9, the broker 3" in failure(answer)[3].message
    assert core.counted == {}


@pytest.mark.parametrize(
    "wrong", [{"slots": 0}, {"models": ()}, {"boot": b"short"}, {"name": ""}, {"models": tuple(map(str, range(65)))}]
)
def test_a_registration_that_cannot_be(core: Core, wrong: dict[str, object]) -> None:
    register = {
        "role": "worker",
        "name": "w",
        "boot": bytes(16),
        "versions": wire.VERSIONS,
        "slots": 1,
        "models": ("m",),
    }
    register |= wrong
    register["models"] = [{"id": m, "fingerprint": "f"} for m in register["models"]]  # type: ignore[attr-defined]
    [answer] = core.worker(Message(Header(Kind.REGISTER), codec.pack(register), codec.pack({})))
    assert failure(answer)[3].code == "protocol"
    assert core.tables.pool.workers == {}


def test_the_same_worker_over_a_new_connection_keeps_its_requests(core: Core) -> None:
    core.register()
    core.running()
    core.worker(tok(ONE, 0))
    core.register(b"w1'", name="w1", boot=instance(WORKER), held=1)
    held(core, ONE, 0, 2, worker=b"w1'")
    assert core.worker(tok(ONE, 1)) == [Send(WORKER, say(Kind.WHO))]
    assert core.worker(tok(ONE, 0), b"w1'") == []  # sent again, because it cannot know what arrived
    assert core.worker(tok(ONE, 1), b"w1'") == [pushed(tok(ONE, 1))]
    assert core.lose(WORKER) == []
    assert core.wait(5) == []


def test_a_registration_that_is_read_late_does_not_take_the_place_of_a_newer_one(core: Core) -> None:
    core.register(introduction=1)
    core.running()
    core.worker(tok(ONE, 0))
    core.register(b"w1'", name="w1", boot=instance(WORKER), held=1, introduction=2)
    held(core, ONE, 0, 1, worker=b"w1'")
    assert core.register(introduction=1) == []
    assert core.lose(WORKER) == []
    assert core.worker(tok(ONE, 1), b"w1'") == [pushed(tok(ONE, 1))]
    assert core.counted["outdated"] == 1


@pytest.mark.parametrize("introduction", [0, 1])
def test_of_registrations_with_the_same_number_the_last_one_counts(core: Core, introduction: int) -> None:
    core.register(introduction=introduction)
    core.register(b"w1'", name="w1", boot=instance(WORKER), introduction=introduction)
    assert list(core.tables.pool.workers) == [b"w1'"]


def test_the_answer_names_the_introduction_that_it_is_for(core: Core) -> None:
    for answer in (core.register(introduction=7), core.hello(b"c9", introduction=7)):
        assert [a.message.header for a in answer if isinstance(a, Send)] == [Header(Kind.WELCOME, seq=7)]


def test_another_process_of_the_same_name_waits_until_the_first_is_lost(core: Core) -> None:
    core.register()
    core.running()
    assert core.register(SECOND, name="w1") == []
    assert kinds(core.lose(WORKER)) == [(CLIENT, Kind.PHASE)]
    assert core.register(SECOND, name="w1")[1:] == [run(ONE, SECOND, attempt=2)]


def test_another_process_of_the_same_name_is_told_when_the_first_lives(core: Core) -> None:
    core.register()
    assert core.register(SECOND, name="w1") == []
    core.wait(1, silent=(SECOND,))
    [answer] = core.register(SECOND, name="w1")
    peer, kind, _, body = failure(answer)
    assert (peer, kind, body.code) == (SECOND, Kind.ERROR, "bad_request")
    assert "'w1' is taken" in body.message


def test_another_process_on_the_same_connection_replaces_the_first(core: Core) -> None:
    core.register(name="w1")
    core.running()
    assert core.register(name="w1", boot=b"another boot id!")[0] == Send(
        CLIENT, Message(Header(Kind.PHASE, ONE), route=codec.pack(Phase("queued", 1)))
    )
    assert list(core.tables.pool.workers) == [WORKER]
    assert core.tables.requests[ONE].attempt == 2


def test_a_worker_may_change_what_it_serves(core: Core) -> None:
    core.register(models=("m",))
    core.register(models=("m", "n"))
    assert core.submit(ONE, model="n")[0] == run(ONE, model="n")
    core.register(models=("n",))
    [answer] = core.submit(TWO, model="m")
    assert failure(answer)[3].code == "model_not_found"


# --- models


def test_an_unknown_model(core: Core) -> None:
    [answer] = core.submit(ONE, model="tols")
    assert "no launcher and no worker is with the broker" in failure(answer)[3].message
    core.register(models=("default", "tools"))
    core.launcher()
    core.declare("cold", "idle")
    [answer] = core.submit(ONE, model="tols")
    _, kind, _, body = failure(answer)
    assert (kind, body.code, body.model) == (Kind.ERROR, "model_not_found", "tols")
    assert body.message == "model 'tols' is not known, expected one of cold, default, tools; did you mean 'tools'?"
    core.assert_empty()


def test_a_request_waits_for_a_declared_model_and_is_told_how_it_goes(core: Core) -> None:
    core.launcher()
    core.declare("m", "idle")
    actions = core.submit(ONE)
    assert actions[0] == accepted(ONE, 1)
    assert phases(actions) == [Phase("idle", 1)]
    core.submit(TWO)
    core.wait(1)
    actions = core.declare("m", "loading", elapsed=3.0, detail="weights 40 %")
    assert phases(actions) == [Phase("loading", 1, 3.0, "weights 40 %"), Phase("loading", 2, 3.0, "weights 40 %")]
    assert core.register(slots=2)[1:] == [run(ONE, timeout=599.0), run(TWO, timeout=599.0)]


def test_a_request_that_does_not_wait(core: Core) -> None:
    core.launcher()
    core.declare("m", "loading")
    [answer] = core.submit(ONE, wait=False)
    body = failure(answer)[3]
    assert (body.code, body.retryable, body.retry_after) == ("overloaded", True, 1.0)
    core.register()
    assert core.submit(ONE, wait=False)[0] == run(ONE)
    assert core.submit(TWO, wait=False) == [accepted(TWO, 1)]  # it waits for a slot, not for loading


def test_a_model_whose_worker_does_not_answer_is_not_ready(core: Core) -> None:
    why = "its launcher calls it ready, but the broker has no word from its workers"
    core.launcher()
    core.declare("m", "ready", workers=1)
    core.register()
    core.submit(ONE)
    core.wait(2)
    actions = core.wait(4, silent=(WORKER,))
    assert phases(actions) == [Phase("queued", 1, 0.0, why)]
    assert status_of(core).models == (ModelStatus("m", "queued", 0, 1, 0, why),)
    [answer] = core.submit(TWO, wait=False)
    body = failure(answer)[3]
    assert (body.code, body.retryable) == ("overloaded", True)
    assert f"has no worker now (it is queued: {why}) and the request does not wait" in body.message
    core.register()
    assert [(m.phase, m.workers) for m in status_of(core).models] == [("ready", 1)]


def test_a_model_that_failed_to_start(core: Core) -> None:
    core.launcher()
    core.declare("m", "loading")
    core.submit(ONE)
    [told] = core.declare("m", "failed", detail="no such file: weights.safetensors")
    _, kind, _, body = failure(told)
    assert (kind, body.code) == (Kind.ERROR, "engine")
    assert body.message == "model 'm' failed to start: no such file: weights.safetensors"
    [refused] = core.submit(TWO)
    assert failure(refused)[3].message == body.message


def test_a_failed_model_with_a_worker_works(core: Core) -> None:
    core.register()
    core.launcher()
    core.declare("m", "failed", detail="the second worker does not start")
    assert core.submit(ONE)[0] == run(ONE)
    [answer] = core.lose(WORKER)
    assert failure(answer)[3].code == "engine"


def test_the_most_hopeful_launcher_counts(core: Core) -> None:
    core.launcher()
    core.launcher(b"l2", "other")
    core.declare("m", "failed")
    core.declare("m", "loading", b"l2")
    assert phases(core.submit(ONE)) == [Phase("loading", 1)]


def test_a_launcher_that_leaves_takes_its_models_along(core: Core) -> None:
    core.launcher()
    core.declare("m", "loading")
    core.declare("n", "ready")
    core.register(models=("n",))
    core.submit(ONE)
    [answer] = core.worker(say(Kind.BYE), LAUNCHER)
    assert failure(answer)[3].code == "model_not_found"
    assert core.tables.pool.known() == ["n"]
    assert core.submit(TWO, model="n")[0] == run(TWO, model="n")


@pytest.mark.parametrize(
    "go",
    [
        lambda core: core.lose(LAUNCHER),
        lambda core: core.worker(say(Kind.BYE, arg=1_000_000), LAUNCHER),
    ],
)
def test_of_many_launchers_that_are_gone_the_longest_gone_are_not_waited_for(
    core: Core, monkeypatch: pytest.MonkeyPatch, go: Callable[[Core], list[Action]]
) -> None:
    monkeypatch.setattr(membership, "_LOST_LAUNCHERS", 2)
    answers: list[Action] = []
    for n in range(4):
        core.launcher(name=f"host{n}")
        core.declare(f"m{n}", "idle")
        if n == 0:
            core.submit(ONE, model="m0")
        answers += go(core)
        core.launcher(name="host1")  # this one comes back each time
        core.declare("m1", "idle")
        answers += go(core)
    assert core.tables.pool.known() == ["m1", "m3"]
    [answer] = answers
    assert failure(answer)[3].code == "model_not_found"


@pytest.mark.parametrize("first", ["launcher", "worker"])
def test_who_waits_for_what_leaves_with_its_launcher_is_told_at_once(core: Core, first: str) -> None:
    """What runs may take minutes to end; who waits behind it waits in vain."""
    core.launcher()
    core.declare("m", "ready")
    core.register()
    core.running(ONE)
    core.submit(TWO)
    byes = [(say(Kind.BYE), LAUNCHER), (say(Kind.DRAIN, arg=240_000), WORKER)]
    one, other = (core.worker(*bye) for bye in (byes if first == "launcher" else byes[::-1]))
    assert Kind.ERROR not in {kind for _, kind in kinds(one)}
    assert [failure(a)[3].code for a in other if kinds([a]) == [(CLIENT, Kind.ERROR)]] == ["model_not_found"]
    [refused] = core.submit(THREE)
    assert "'m' is gone: its launcher left, or has it no more" in failure(refused)[3].message
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]


def test_who_waits_for_what_a_launcher_leaves_behind_has_the_time_that_it_names(core: Core) -> None:
    """It is started again, after an update, say: its models are on the way, and nobody is refused meanwhile."""
    core.launcher()
    core.declare("m", "ready")
    core.register()
    core.running(ONE)
    core.submit(TWO)
    left = core.worker(say(Kind.DRAIN, arg=1_000)) + core.worker(say(Kind.BYE, arg=10_000), LAUNCHER)
    left += core.worker(say(Kind.BYE)) + core.submit(THREE) + core.wait(9.9)
    assert Kind.ERROR not in {kind for _, kind in kinds(left)}
    core.launcher(boot=b"b" * 16)
    core.declare("m", "ready")
    assert Kind.ERROR not in {kind for _, kind in kinds(core.wait(9.9))}
    core.worker(say(Kind.BYE, arg=10_000), LAUNCHER)
    assert Kind.ERROR not in {kind for _, kind in kinds(core.wait(9.9))}
    ended = core.wait(0.2)
    assert sorted(failure(a)[3].code for a in ended if kinds([a]) == [(CLIENT, Kind.ERROR)]) == ["model_not_found"] * 3


def test_a_launcher_that_is_lost_within_its_time_to_declare_leaves_what_it_declared(core: Core) -> None:
    core.launcher()
    core.declare("m", "ready")
    core.submit(ONE)
    core.lose(LAUNCHER)
    assert Kind.ERROR not in {kind for _, kind in kinds(core.wait(10))}
    assert core.tables.pool.known() == ["m"]


def test_with_a_launcher_that_stays_who_waits_goes_on_waiting_while_the_worker_leaves(core: Core) -> None:
    core.launcher()
    core.declare("m", "ready")
    core.register()
    core.running(ONE)
    core.submit(TWO)
    core.worker(say(Kind.DRAIN, arg=240_000))
    assert Kind.ERROR not in {kind for _, kind in kinds(core.submit(THREE))}
    assert core.tables.queues.length == 2


def test_names_that_were_taken_back_are_not_kept_for_ever(core: Core) -> None:
    core.launcher()
    core.register(models=("kept",))
    for name in ("kept", *map(str, range(3_000))):
        core.declare(name, "ready")
        core.declare(name, "ready", removed=True)
    assert len(core.tables.pool.withdrawn) <= 1_001
    assert core.tables.pool.known() == ["kept"]
    core.worker(say(Kind.DRAIN))
    assert failure(core.submit(ONE, model="kept")[0])[3].code == "model_not_found"


def test_a_removed_model(core: Core) -> None:
    core.launcher()
    core.declare("m", "idle")
    core.submit(ONE)
    [answer] = core.declare("m", "idle", removed=True)
    assert failure(answer)[3].code == "model_not_found"


def test_requests_outlive_a_killed_launcher(core: Core) -> None:
    core.launcher()
    core.declare("m", "loading")
    core.submit(ONE)
    assert core.lose(LAUNCHER) == []
    assert core.wait(20) == []
    core.launcher(b"l2", "host", boot=b"the second boot!")
    assert phases(core.declare("m", "building", b"l2")) == [Phase("building", 1)]
    assert core.wait(6) == []
    assert core.tables.pool.known() == ["m"]


def test_a_new_launcher_process_says_what_is_still_declared(core: Core) -> None:
    core.launcher()
    core.declare("m", "loading")
    core.declare("n", "loading")
    core.submit(ONE, model="n")
    core.lose(LAUNCHER)
    core.launcher(b"l2", "host", boot=b"the second boot!")
    core.declare("m", "loading", b"l2")
    assert core.tables.pool.known() == ["m", "n"]
    [answer] = core.wait(5)
    assert failure(answer)[3].code == "model_not_found"
    assert core.tables.pool.known() == ["m"]


# --- models that a worker left out


REASON = "the tensor q has shape (4, 64), expected (4, 32)"


def test_a_model_that_a_worker_left_out_fails_at_once_with_the_reason_and_the_others_are_served(core: Core) -> None:
    core.register(left_out={"bad": REASON})
    [answer] = core.submit(ONE, model="bad")
    _, kind, _, body = failure(answer)
    assert (kind, body.code, body.model, body.retryable) == (Kind.ERROR, "engine", "bad", False)
    assert body.message == f"model 'bad' failed to start: {REASON}"
    assert core.submit(TWO)[0] == run(TWO)


def test_who_waits_for_a_model_hears_that_it_was_left_out() -> None:
    core = Core(settle=3.0)
    core.hello()
    core.submit(ONE, model="bad")
    _, answer = core.register(left_out={"bad": REASON})
    assert failure(answer)[3].code == "engine"
    core.client(say(Kind.ENDACK, ONE))
    core.assert_empty()


def test_a_model_left_out_by_one_worker_and_served_by_another_is_served(core: Core) -> None:
    core.register(left_out={"n": REASON})
    core.register(SECOND, models=("m", "n"))
    assert core.submit(ONE, model="n")[0] == run(ONE, SECOND, model="n")
    core.lose(SECOND)
    assert failure(core.submit(TWO, model="n")[0])[3].code == "engine"


def test_a_model_left_out_that_a_launcher_still_loads_is_waited_for(core: Core) -> None:
    core.launcher()
    core.declare("bad", "loading")
    core.register(left_out={"bad": REASON})
    assert phases(core.submit(ONE, model="bad")) == [Phase("loading", 1)]
    [answer] = core.declare("bad", "failed", detail="in its own, longer words")
    assert failure(answer)[3].message == "model 'bad' failed to start: in its own, longer words"


def test_a_worker_takes_what_it_left_out_along(core: Core) -> None:
    core.register(left_out={"bad": REASON})
    assert core.tables.pool.known() == ["bad", "m"]
    core.register(b"w1'", name="w1", boot=instance(WORKER), left_out={"bad": REASON})
    assert core.tables.pool.known() == ["bad", "m"]
    core.lose(b"w1'")
    assert core.tables.pool.known() == []
    assert failure(core.submit(ONE, model="bad")[0])[3].code == "model_not_found"


def test_status_shows_a_model_left_out_as_failed(core: Core) -> None:
    core.register(left_out={"bad": REASON})
    core.now += 2
    [answer] = core.client(say(Kind.STATUS, ONE))
    assert isinstance(answer, Send)
    models = codec.unpack(Status, answer.message.body, codec.BODY_LIMITS).models
    assert models == (ModelStatus("bad", "failed", 0, 0, 0, REASON, 2.0), ModelStatus("m", "ready", 1))


# --- adapters


def test_a_request_for_an_adapter_goes_where_it_is(core: Core) -> None:
    core.register(WORKER)
    core.register(SECOND, adapters=("shout",))
    assert core.submit(ONE, adapter="shout")[0] == run(ONE, SECOND, adapter="shout")
    assert core.submit(TWO, adapter="shout") == [accepted(TWO, 1)]
    assert core.submit(THREE)[0] == run(THREE)


def test_a_long_reason_fits_into_what_the_client_reads_of_the_phase(core: Core) -> None:
    core.launcher()
    detail = "building: " + "x" * 4030 + ": nearly done"
    core.declare("m", "building", detail=detail)
    core.now += 1.5
    said = [wire.from_bytes(a.data) for a in core.submit(ONE) if isinstance(a, Send)]
    [told] = [codec.unpack(Phase, m.route).detail for m in said if m.kind is Kind.PHASE]
    assert (told[:10], told[-14:]) == (detail[:10], detail[-14:])


def test_what_workers_say_of_themselves_is_left_out_where_all_of_it_is_too_long(core: Core) -> None:
    report = codec.pack({"notes": ["x" * 16_000] * 2})
    for i in range(140):
        route = Register("worker", f"w{i}", i.to_bytes(16), wire.VERSIONS, models=(ServedModel("m", "f"),), slots=1)
        core.worker(Message(Header(Kind.REGISTER), codec.pack(route), report), b"w%d" % i)
        if i in (9, 139):
            assert {bool(worker.report) for worker in status_of(core).workers} == {i == 9}
    assert len(status_of(core).workers) == 140


def test_an_unknown_adapter(core: Core) -> None:
    core.register(adapters=("shout", "tools"))
    [answer] = core.submit(ONE, adapter="shuot")
    body = failure(answer)[3]
    assert (body.code, body.message) == (
        "adapter_not_found",
        "model 'm' has no adapter 'shuot', loaded are: shout, tools",
    )


def test_an_adapter_that_was_left_out(core: Core) -> None:
    core.register(adapters=("shout",), left_out={"bad": REASON})
    [answer] = core.submit(ONE, adapter="bad")
    body = failure(answer)[3]
    assert body.code == "adapter_not_found"
    assert body.message == f"model 'm' has no adapter 'bad', loaded are: shout; 'bad' failed: {REASON}"


def test_an_adapter_that_the_model_turns_out_not_to_have(core: Core) -> None:
    core.launcher()
    core.declare("m", "loading")
    core.submit(ONE, adapter="shout")
    answer = core.register()[1]
    assert failure(answer)[3].code == "adapter_not_found"


# --- the broker's own absence


def test_nobody_is_lost_because_the_broker_was_away(core: Core) -> None:
    core.register()
    core.running()
    core.now += 10
    core.handle(LoopStalled(10))
    assert core.wait(2) == []
    assert core.wait(4, silent=(WORKER,))  # but later silence counts


def test_run_is_not_given_up_because_the_broker_was_away(core: Core) -> None:
    core.register()
    core.submit(ONE)
    core.now += 10
    core.handle(LoopStalled(10))
    assert core.wait(0.5) == []
    assert kinds(core.wait(0.5)) == [(WORKER, Kind.RUN)]


# --- status


def test_status(core: Core) -> None:
    core.launcher()
    core.declare("m", "ready")
    core.declare("cold", "building", elapsed=2.0, detail="torch")
    core.register()
    core.running(ONE)
    core.worker(tok(ONE, 0, 3))
    core.submit(TWO)
    core.submit(THREE, model="what")
    beat = Heartbeat(running=1, tokens_per_second=12.5, cached_tokens=300, computed_tokens=50)
    core.worker(Message(Header(Kind.HB, seq=9), route=codec.pack(beat)))
    core.now += 1
    question = bytes(range(16))
    [answer] = core.client(say(Kind.STATUS, question))
    assert isinstance(answer, Send)
    assert answer.message.header == Header(Kind.REPORT, question)
    status = codec.unpack(Status, answer.message.body, codec.BODY_LIMITS)
    assert (status.epoch, status.uptime, status.clients, status.queued, status.running) == (EPOCH, 1.0, 1, 1, 1)
    assert status.models == (
        ModelStatus("cold", "building", 0, 0, 0, "torch", 3.0),
        ModelStatus("m", "ready", 1, 1, 1, "", 1.0),
    )
    [worker] = status.workers
    assert (worker.name, worker.models, worker.slots, worker.running, worker.state) == ("w1", ("m",), 1, 1, "ready")
    assert (worker.tokens, worker.tokens_per_second, worker.uptime) == (3, 12.5, 1.0)
    assert (worker.cached_tokens, worker.computed_tokens) == (300, 50)
    assert status.launchers == ("host",)
    assert status.counters == {"submitted": 2, "refused": 1}


def test_status_shows_what_is_held_and_that_it_goes(core: Core) -> None:
    core.register(models=("m",))
    core.submit(ONE)
    core.worker(tok(ONE, 0))
    tables = status_of(core).tables
    assert (tables["requests"], tables["leases"], tables["held"]) == (1, 1, len(BODY))
    assert tables["output"] > 0
    core.worker(end(ONE, 1))
    core.client(say(Kind.ENDACK, ONE))
    assert {name: size for name, size in status_of(core).tables.items() if size} == {"clients": 1}


def test_status_shows_silence_and_what_was_served(core: Core) -> None:
    core.register()
    core.running(ONE)
    core.worker(end(ONE, 0))
    core.wait(2, silent=(WORKER,))
    [worker] = status_of(core).workers
    assert (worker.state, worker.served, worker.running) == ("silent", 1, 0)


# --- just started


def test_a_broker_that_has_just_started_waits_for_who_belongs_to_it() -> None:
    core = Core(settle=3.0)
    core.hello()
    assert kinds(core.submit(ONE)) == [(CLIENT, Kind.ACCEPTED), (CLIENT, Kind.PHASE)]
    assert not status_of(core).settled
    core.wait(1.0)
    assert (WORKER, Kind.RUN) in kinds(core.register())


def test_a_model_that_is_still_unknown_when_the_broker_has_settled_is_refused() -> None:
    core = Core(settle=3.0)
    core.hello()
    core.submit(ONE, model="tols")
    (refusal,) = [failure(a) for a in core.wait(3.25) if kinds([a]) == [(CLIENT, Kind.ERROR)]]
    assert (refusal[1], refusal[3].code) == (Kind.ERROR, "model_not_found")
    assert status_of(core).settled
    assert failure(core.submit(TWO, model="tols")[0])[3].code == "model_not_found"


def test_a_model_whose_last_worker_has_lost_its_connection_is_still_known() -> None:
    core = Core(settle=3.0)
    core.hello()
    core.register()
    core.wait(3.25)
    core.lose(WORKER)
    assert kinds(core.submit(ONE)) == [(CLIENT, Kind.ACCEPTED), (CLIENT, Kind.PHASE)]
    assert core.wait(1.0) == []
    assert runs(core.register()) == [(WORKER, ONE, 1)]
    core.worker(say(Kind.RUNACK, ONE, attempt=1))
    assert core.wait(3.0) == []
    assert not core.tables.missed


def test_who_waited_when_it_was_lost_waits_until_it_is_back() -> None:
    """It may take a minute to load."""
    core = Core(settle=3.0)
    core.hello()
    core.register()
    core.wait(3.25)
    core.submit(ONE)
    core.submit(TWO)
    core.wait(0.25)
    core.lose(WORKER)
    core.submit(THREE)
    (refusal,) = [failure(a) for a in core.wait(3.0) if kinds([a]) == [(CLIENT, Kind.ERROR)]]
    assert refusal[3].code == "model_not_found"
    core.client(say(Kind.ENDACK, THREE))
    assert core.wait(60.0) == []
    assert {core.tables.requests[r].state for r in (ONE, TWO)} == {State.QUEUED}
    assert (SECOND, TWO, 1) in runs(core.register(SECOND, slots=2))


def test_and_so_may_an_adapter_be_that_none_of_its_workers_has_yet() -> None:
    """Another one that is to come back may have it."""
    core = Core(settle=3.0)
    core.hello()
    core.register(adapters=("a",))
    core.wait(3.25)
    core.lose(WORKER)
    core.register(SECOND)
    assert kinds(core.submit(ONE, adapter="a")) == [(CLIENT, Kind.ACCEPTED)]
    (refusal,) = [failure(a) for a in core.wait(3.0) if kinds([a]) == [(CLIENT, Kind.ERROR)]]
    assert refusal[3].code == "adapter_not_found"


def test_one_whose_worker_stays_away_or_has_left_is_not() -> None:
    core = Core(settle=3.0)
    core.hello()
    core.register()
    core.wait(3.25)
    core.lose(WORKER)
    core.submit(ONE)
    (refusal,) = [failure(a) for a in core.wait(3.0) if kinds([a]) == [(CLIENT, Kind.ERROR)]]
    assert refusal[3].code == "model_not_found"
    assert failure(core.submit(TWO)[0])[3].code == "model_not_found"
    core.register()
    core.worker(say(Kind.BYE))
    assert failure(core.submit(THREE)[0])[3].code == "model_not_found"


def test_who_waits_when_the_last_worker_leaves_waits_on() -> None:
    core = Core(settle=3.0)
    core.hello()
    core.register(slots=1)
    core.wait(3.25)
    core.submit(ONE)
    core.submit(TWO)
    assert (CLIENT, Kind.ERROR) not in kinds(core.worker(say(Kind.BYE)))
    assert failure(core.submit(THREE)[0])[3].code == "model_not_found"
    assert (CLIENT, Kind.ERROR) not in kinds(core.wait(60.0))
    assert {core.tables.requests[r].state for r in (ONE, TWO)} == {State.QUEUED}
    assert {request for _, request, _ in runs(core.register(slots=2))} == {ONE, TWO}


def test_one_lost_before_may_still_be_back_when_another_one_leaves() -> None:
    core = Core(settle=3.0)
    core.hello()
    core.register()
    core.wait(3.25)
    core.lose(WORKER)
    core.register(SECOND)
    core.worker(say(Kind.BYE), peer=SECOND)
    assert kinds(core.submit(ONE)) == [(CLIENT, Kind.ACCEPTED), (CLIENT, Kind.PHASE)]
    assert runs(core.register()) == [(WORKER, ONE, 1)]


# --- many who wait


def test_who_waits_is_told_in_slices() -> None:
    """Ten thousand told in one go would hold up everybody else for a fifth of a second."""
    core = Core()
    core.hello()
    core.launcher()
    core.declare("m", "loading")
    waiting = [n.to_bytes(16) for n in range(1, 201)]
    for request in waiting:
        core.submit(request)
    rounds = [core.declare("m", "warming"), *core.at_once()]
    assert [len(r) for r in rounds] == [64, 64, 64, 8]
    told = [a.message.header.request for r in rounds for a in r if isinstance(a, Send)]
    assert sorted(told) == waiting


def test_who_waits_for_one_of_many_models_is_told_in_slices_of_them_all() -> None:
    core = Core()
    core.hello()
    models = tuple(f"m{n}" for n in range(60))
    core.register(models=models)
    waiting = [n.to_bytes(16) for n in range(1, 60 * 20)]
    for request in waiting:
        core.submit(request, model=models[request[-1] % 60])
    rounds = [core.lose(WORKER), *core.at_once()]
    assert max(map(len, rounds)) < 256 + 64
    told = [a.message.header.request for r in rounds for a in r if isinstance(a, Send)]
    assert sorted(told) == waiting


def test_unknown_models_are_refused_one_by_one() -> None:
    core = Core(settle=3.0)
    core.hello()
    waiting = [n.to_bytes(16) for n in range(1, 201)]
    for request in waiting:
        core.submit(request, model=f"m{request[-1]}")
    core.now += 3.0
    core.keep_alive(())
    rounds = core.at_once()
    assert {len(r) for r in rounds} == {0, 1}
    assert {kind for r in rounds for _, kind in kinds(r)} == {Kind.ERROR}
    assert core.tables.queues.length == 0


def test_a_model_that_comes_while_others_are_refused_is_not_unknown() -> None:
    core = Core(settle=3.0)
    core.hello()
    waiting = [n.to_bytes(16) for n in range(1, 201)]
    for request in waiting:
        core.submit(request, model="late" if request == waiting[-1] else f"m{request[-1]}")
    core.now += 3.0
    core.keep_alive(())
    core.handle(TimerDue())
    assert (WORKER, waiting[-1], 1) in runs(core.register(models=("late",)))
    core.at_once()
    assert [r.id for r in core.tables.requests.values() if r.state is not State.DONE] == [waiting[-1]]


def test_news_about_a_model_take_the_place_of_older_ones() -> None:
    core = Core()
    core.hello()
    core.launcher()
    core.declare("m", "loading")
    for n in range(1, 101):
        core.submit(n.to_bytes(16))
    core.declare("m", "warming")
    assert [p.phase for p in phases(core.declare("m", "loading"))] == ["loading"] * 64
    assert [p.phase for p in phases(core.wait(0.25))] == ["loading"] * 36


def test_who_has_a_worker_or_an_end_before_their_turn_is_not_told() -> None:
    core = Core()
    core.hello()
    core.launcher()
    core.declare("m", "loading")
    for n in range(1, 71):
        core.submit(n.to_bytes(16))
    core.declare("m", "warming")
    for n in range(65, 71):
        core.client(say(Kind.CANCEL, n.to_bytes(16)))
    assert phases(core.wait(0.25)) == []


def test_a_model_that_is_gone_ends_all_who_wait_for_it() -> None:
    core = Core()
    core.hello()
    core.launcher()
    core.declare("m", "loading")
    for n in range(1, 101):
        core.submit(n.to_bytes(16))
    actions = core.declare("m", "loading", removed=True)
    actions += core.client(say(Kind.CANCEL, (90).to_bytes(16))) + core.wait(0.25)
    assert Counter(failure(a)[3].code for a in actions) == {"model_not_found": 99, "cancelled": 1}
