"""What administrators may say, above all that a worker is to leave."""

from __future__ import annotations

import pytest

from brokerkit import (
    ADMIN,
    CLIENT,
    FOUR,
    ONE,
    SECOND,
    TWO,
    WORKER,
    Core,
    end,
    failure,
    kinds,
    run,
    runs,
    stop,
    stopped,
    tok,
)
from loopmux import codec, wire
from loopmux.messages import Heartbeat, Hello, Status, Welcome
from loopmux.wire import Header, Kind, Message, StopReason
from loopmux_broker.events import Action, Send, say


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    core.register(slots=2)
    core.register(SECOND, slots=2)
    return core


def states(answer: Action) -> dict[str, str]:
    assert isinstance(answer, Send)
    assert (answer.peer, answer.message.header) == (ADMIN, Header(Kind.REPORT, FOUR))
    status = codec.unpack(Status, answer.message.body, codec.BODY_LIMITS)
    return {worker.name: worker.state for worker in status.workers}


def test_a_worker_is_told_to_leave_and_gets_nothing_new(core: Core) -> None:
    core.running(ONE)
    told, answer = core.evict("w1", 10)
    assert told == Send(WORKER, say(Kind.DRAIN, arg=10_000))
    assert states(answer) == {"w1": "draining", "w2": "ready"}
    assert runs(core.submit(TWO)) == [(SECOND, TWO, 1)]


def test_it_is_told_again_until_it_says_drain_itself(core: Core) -> None:
    core.evict("w1", 10)
    beat = Message(Header(Kind.HB), route=codec.pack(Heartbeat()))
    core.now += 1
    assert core.worker(beat) == [Send(WORKER, say(Kind.PONG)), Send(WORKER, say(Kind.DRAIN, arg=9_000))]
    core.worker(say(Kind.DRAIN, arg=9_000))
    assert core.worker(beat) == [Send(WORKER, say(Kind.PONG))]


def test_what_runs_has_half_of_the_time_and_goes_on_elsewhere_by_no_fault_of_its_own(core: Core) -> None:
    core.running(ONE)
    core.worker(tok(ONE, 0, 3))
    core.evict("w1", 10)
    core.worker(say(Kind.DRAIN, arg=10_000))
    assert runs(core.wait(4.5)) == []
    moved = core.wait(1)
    assert moved == [stop(ONE, StopReason.SUPERSEDED), run(ONE, SECOND, attempt=2, prefix=3, timeout=595.0)]
    core.worker(stopped(ONE, 3))
    core.worker(say(Kind.BYE))
    core.worker(tok(ONE, 3, attempt=2), SECOND)
    core.worker(end(ONE, 4, attempt=2), SECOND)
    core.client(say(Kind.ENDACK, ONE))
    assert (core.counted["migrated"], core.counted.get("requeued", 0)) == (1, 0)
    assert core.counted["workers_left"] == 1
    core.assert_empty()


def test_what_ends_in_time_ends_there(core: Core) -> None:
    core.running(ONE)
    core.evict("w1", 10)
    core.worker(say(Kind.DRAIN, arg=10_000))
    core.wait(4)
    assert (CLIENT, Kind.END) in kinds(core.worker(end(ONE, 0)))
    core.worker(say(Kind.BYE))
    assert core.counted.get("migrated", 0) == 0


def test_a_worker_that_is_not_there(core: Core) -> None:
    [answer] = core.evict("w3")
    assert failure(answer)[:2] == (ADMIN, Kind.ERROR)
    assert failure(answer)[3].code == "bad_request"
    assert failure(answer)[3].message == "worker: found 'w3', expected one of w1, w2"
    core.lose(WORKER)
    core.lose(SECOND)
    assert failure(core.evict("w1")[0])[3].message == "worker: found 'w1', expected one of none"


def test_of_very_many_workers_some_are_named(core: Core) -> None:
    for i in range(300):
        core.register(b"x%d" % i, name=f"qwen2.5-7b@host{i:03d}-1")
    [answer] = core.evict("w3")
    assert failure(answer)[3].message.endswith(", qwen2.5-7b@host049-1 and 252 more")


@pytest.mark.parametrize("within", [-1.0, 1e9, float("nan")])
def test_a_time_that_is_none(core: Core, within: float) -> None:
    [answer] = core.evict("w1", within)
    assert failure(answer)[3].message == f"within: found {within}, expected a value from 0 to 86400"
    assert not any(worker.draining for worker in core.tables.pool.workers.values())


def test_administrators_are_answered_without_being_known(core: Core) -> None:
    hello = Message(Header(Kind.HELLO), codec.pack(Hello(wire.VERSIONS, b"i" * 16)))
    [welcome] = core.admin(hello)
    assert isinstance(welcome, Send)
    assert codec.unpack(Welcome, welcome.message.route).version == wire.VERSION
    assert core.admin(say(Kind.PING)) == [Send(ADMIN, say(Kind.PONG))]
    assert states(core.admin(say(Kind.STATUS, FOUR))[0]) == {"w1": "ready", "w2": "ready"}
    assert core.admin(say(Kind.BYE)) == []
    [refused] = core.admin(Message(Header(Kind.HELLO), codec.pack(Hello((9,), b"i" * 16))))
    assert "no common protocol version" in failure(refused)[3].message
    assert ADMIN not in core.tables.clients.by_peer


def test_nobody_else_may_drain_and_administrators_nothing_else(core: Core) -> None:
    message = Message(Header(Kind.EVICT, FOUR), codec.pack({"worker": "w1"}))
    assert failure(core.client(message)[0])[3].message == "a client may not send EVICT"
    assert failure(core.worker(message)[0])[3].message == "a worker may not send EVICT"
    assert failure(core.admin(say(Kind.CANCEL, FOUR))[0])[3].message == "an administrator may not send CANCEL"
    assert core.counted["strikes"] == 3
