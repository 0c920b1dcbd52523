"""What peers should not send: strikes, and the choke point that keeps the loop alive."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brokerkit import BODY, CLIENT, LAUNCHER, ONE, WORKER, Core, end, failure, pushed, run, stopped, tok
from loopmux import codec, wire
from loopmux.messages import Catalogue, Evict, Held, Register, ServedModel, Submit
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import (
    AdminSent,
    ClientSent,
    ConnectionLost,
    Event,
    FramesSent,
    Log,
    Send,
    TimerDue,
    WorkerSent,
    say,
)
from loopmux_broker.timers import Timers

ROUTE = codec.pack(Submit("m"))
SUBMIT = wire.to_bytes(Message(Header(Kind.SUBMIT, ONE), ROUTE, BODY))
MOST = wire.WORKER_BODY_LIMIT


def sized(data: bytes) -> str:
    """A case by name: the whole of it may be megabytes."""
    return f"{len(data)} bytes"


def submit(route: bytes, body: bytes = BODY) -> bytes:
    return wire.to_bytes(Message(Header(Kind.SUBMIT, ONE), route, body))


def registered(report: bytes) -> bytes:
    route = Register("worker", "w1", bytes(16), wire.VERSIONS, models=(ServedModel("m", "f"),), slots=1)
    return wire.to_bytes(Message(Header(Kind.REGISTER), codec.pack(route), report))


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    core.register()
    return core


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"XX" + SUBMIT[2:],
        SUBMIT[:2] + b"\x09" + SUBMIT[3:],
        SUBMIT[:3] + b"\xff" + SUBMIT[4:],
        SUBMIT[: -len(BODY) - 1],
        SUBMIT[: wire.HEADER_SIZE],
        wire.to_bytes(Message(Header(Kind.SUBMIT, ONE), ROUTE, BODY, bytes(4))),
        submit(b"\xc1"),
        submit(b""),
        submit(codec.pack([1, 2])),
        submit(codec.pack({"model": 1})),
        submit(codec.pack({})),
        submit(codec.pack({"model": "m" * 5000})),
        submit(b"\x81\xa5model" + b"\x91" * 1000 + b"\xc0"),
        submit(codec.pack({"model": "m", "hashes": [b""] * 65})),
        submit(ROUTE, bytes(wire.CLIENT_BODY_LIMIT + 1)),
        wire.to_bytes(Message(Header(Kind.SUBMIT), ROUTE, BODY)),
        wire.to_bytes(say(Kind.RUNACK, ONE)),
        wire.to_bytes(tok(ONE, 0)),
        wire.to_bytes(Message(Header(Kind.ATTACH, ONE, seq=1), ROUTE, BODY)),
        wire.to_bytes(Message(Header(Kind.ATTACH), ROUTE, BODY)),
        wire.to_bytes(Message(Header(Kind.HELLO), route=codec.pack({"versions": wire.VERSIONS, "instance": b"short"}))),
        wire.to_bytes(Message(Header(Kind.SESSION), route=codec.pack({"session": "s", "state": "asleep"}))),
    ],
    ids=sized,
)
def test_what_a_client_may_not_send(core: Core, data: bytes) -> None:
    [answer] = core.handle(ClientSent(CLIENT, data))
    peer, kind, _, body = failure(answer)
    assert (peer, kind, body.code) == (CLIENT, Kind.ERROR, "protocol")
    assert body.message
    assert core.counted == {"strikes": 1}
    assert core.submit(ONE)[0] == run(ONE)  # nothing else is the worse for it


@pytest.mark.parametrize(
    "data",
    [
        SUBMIT,
        wire.to_bytes(say(Kind.PING)),
        wire.to_bytes(Message(Header(Kind.TOK, ONE, 0, 0, 1))),
        wire.to_bytes(Message(Header(Kind.TOK, ONE, 0, 3, 1), tokens=bytes(8))),
        wire.to_bytes(Message(Header(Kind.TOK, ONE, 0, 1, 1), tokens=bytes(4)))[:-1],
        wire.to_bytes(Message(Header(Kind.TOK, ONE, 2**32 - 1, 1, 1), tokens=bytes(4))),
        wire.to_bytes(Message(Header(Kind.EXPIRED, ONE, attempt=1))),
        wire.to_bytes(Message(Header(Kind.TOK, ONE, 0, 1, 1), body=bytes(MOST + 1), tokens=bytes(4))),
        wire.to_bytes(Message(Header(Kind.TOK, ONE, 0, MOST // 4 + 1, 1), tokens=bytes(MOST + 4))),
        wire.to_bytes(Message(Header(Kind.END, ONE, attempt=1), body=bytes(MOST + 1))),
        wire.to_bytes(Message(Header(Kind.HB), route=b"\xc1")),
        wire.to_bytes(Message(Header(Kind.CATALOGUE), route=codec.pack(Catalogue("m", "ready")))),
        wire.to_bytes(Message(Header(Kind.REGISTER), route=b"")),
        registered(b"\x91\x01"),
        registered(b"\x81\xa1r" + b"\x91" * 600 + b"\xc0"),
        registered(codec.pack({"r": ["x" * 9999] * 7})),
    ],
    ids=sized,
)
def test_what_a_worker_may_not_send(core: Core, data: bytes) -> None:
    core.running()
    [answer] = core.handle(WorkerSent(WORKER, data))
    assert failure(answer)[0] == WORKER
    assert failure(answer)[3].code == "protocol"
    assert core.counted["strikes"] == 1
    assert core.worker(tok(ONE, 0)) == [pushed(tok(ONE, 0))]


def test_a_launcher_may_not_send_output(core: Core) -> None:
    core.launcher()
    [answer] = core.worker(tok(ONE, 0), LAUNCHER)
    assert failure(answer)[3].code == "protocol"


def test_what_is_too_large_is_said_with_what_would_not_be(core: Core) -> None:
    core.launcher()
    [answer] = core.worker(Message(Header(Kind.DONE, ONE), body=bytes(MOST + 1)), LAUNCHER)
    found = f"DONE has a BODY of {MOST + 1} bytes and TOKENS of 0: workers and launchers may send {MOST} of each"
    assert failure(answer)[3].message == found
    largest = Message(Header(Kind.TOK, ONE, 0, 1, 1), body=bytes(MOST), tokens=bytes(4))
    core.running()
    assert core.worker(largest) == [pushed(largest)]


def test_the_answer_names_the_request(core: Core) -> None:
    [answer] = core.handle(ClientSent(CLIENT, submit(b"\xc1")))
    assert wire.from_bytes(answer.data).header.request == ONE  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [Kind.SUBMIT, Kind.ATTACH])
def test_whatever_is_taken_from_a_client_fits_into_what_a_worker_takes(core: Core, kind: Kind) -> None:
    def routed(size: int) -> Message:
        short = codec.pack(Submit("m", session="", timeout=99, trace="t" * 1000))
        trace = "t" * (1000 + size - len(short))
        return Message(Header(kind, ONE), codec.pack(Submit("m", session="", timeout=99, trace=trace)), BODY)

    largest = wire.SUBMIT_ROUTE_LIMIT
    _, _, _, refused = failure(core.client(routed(largest + 1))[0])
    assert f"{kind.name} has a ROUTE of {largest + 1} bytes, at most {largest} are accepted" in refused.message
    actions = core.client(routed(largest)) + core.wait(10)
    [given] = [action.data for action in actions if isinstance(action, Send) and action.peer == WORKER][:1]
    assert wire.from_bytes(given).kind is Kind.RUN


def test_a_message_has_one_frame(core: Core) -> None:
    """The first of several is no message either, however well it reads."""
    [answer] = core.handle(FramesSent(CLIENT, SUBMIT))
    peer, kind, _, body = failure(answer)
    assert (peer, kind, body.message) == (CLIENT, Kind.ERROR, "SUBMIT came in several frames, expected one")
    assert wire.from_bytes(answer.data).header.request == ONE  # type: ignore[union-attr]
    assert core.counted == {"strikes": 1}


def test_a_peer_of_another_release_is_told_of_and_named_in_the_log(core: Core) -> None:
    """What version 1 sent: a header in a frame of its own. The answer is nothing that it could read."""
    old = b"LM\x01" + bytes([Kind.HELLO]) + bytes(30)
    for _ in range(3):
        [answer] = core.handle(FramesSent(b"c9", old))
        assert "version 1 is not spoken here (spoken: 3)" in failure(answer)[3].message
    [log] = core.logged[-1:]
    assert "version 1 is not spoken here" in str(log.fields["reason"])


def test_three_strikes_and_the_peer_is_ignored_for_a_minute(core: Core) -> None:
    core.hello(b"c2")
    for _ in range(3):
        assert len(core.handle(ClientSent(b"c2", b"junk"))) == 1
    assert core.handle(ClientSent(b"c2", b"junk")) == []
    assert core.client(say(Kind.PING), b"c2") == []
    assert core.client(say(Kind.PING)) == [Send(CLIENT, say(Kind.PONG))]
    core.wait(59, silent=(b"c2",))
    assert core.client(say(Kind.PING), b"c2") == []
    core.wait(1, silent=(b"c2",))
    assert core.client(say(Kind.PING), b"c2") == [Send(b"c2", say(Kind.WHO))]
    core.wait(61, silent=(b"c2",))
    assert core.tables.strikes.records == {}


def test_very_many_that_are_ignored_are_counted_and_seldom_said() -> None:
    core = Core()
    for minute in range(3):
        for n in range(100):
            for _ in range(3):
                core.handle(ClientSent(bytes([minute, n]), b"junk"))
        core.now += 60.0
    assert [line.fields["so_far"] for line in core.logged] == [1, 101, 201]
    assert core.counted["ignored"] == 300


def test_strikes_far_apart_do_not_add_up(core: Core) -> None:
    for _ in range(6):
        assert len(core.handle(ClientSent(CLIENT, b"junk"))) == 1
        core.wait(31)
    assert core.client(say(Kind.PING)) == [Send(CLIENT, say(Kind.PONG))]


def test_strikes_go_with_the_connection(core: Core) -> None:
    core.handle(ClientSent(b"c9", b"junk"))
    core.lose(b"c9")
    assert core.tables.strikes.records == {}


def test_a_bug_is_logged_and_counted_and_the_loop_lives(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a planted bug")

    monkeypatch.setattr(core.tables.admission, "refusal", broken)
    actions = core.broker.handle(ClientSent(CLIENT, SUBMIT), core.now)
    [log] = [a for a in actions if isinstance(a, Log)]
    assert (log.level, log.event) == ("error", "internal error")
    assert "a planted bug" in str(log.fields["traceback"])
    assert core.tables.counters["internal_errors"] == 1
    monkeypatch.undo()
    assert core.submit(ONE)[0] == run(ONE)


def test_memory_that_runs_out_is_no_bug_and_whoever_asks_again_is_served(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: bytes) -> Message:
        raise MemoryError

    with monkeypatch.context() as scarce:
        scarce.setattr(wire, "from_bytes", full)
        logged = [core.broker.handle(ClientSent(CLIENT, SUBMIT), core.now) for _ in range(3)]
    assert [[(a.level, a.event) for a in actions if isinstance(a, Log)] for actions in logged] == [
        [("warning", "out of memory")],
        [],
        [],
    ]
    assert core.counted["out_of_memory"] == 3
    assert "internal_errors" not in core.counted
    assert core.submit(ONE)[0] == run(ONE)


# --- what it costs

NESTED = b"\x91" * 4000 + b"\x00"
WIDE = codec.pack({"model": "m", "hashes": [bytes(32)] * 64, "trace": "t" * 1200})
DEEP_MAP = b"\x81\xa1a" * 1300 + b"\x00"


@pytest.mark.parametrize(
    "data",
    [
        b"junk" * 1000,
        submit(NESTED),
        submit(DEEP_MAP),
        submit(b"\x81\xa5model" + b"\x91" * 1000 + b"\xc0"),
        submit(WIDE, bytes(wire.CLIENT_BODY_LIMIT)),
        submit(bytes(1024 * 1024)),
        submit(b"\xdd\xff\xff\xff\xff"),
        wire.to_bytes(Message(Header(Kind.HELLO), NESTED)),
        wire.to_bytes(Message(Header(Kind.ATTACH, ONE, 1000, 0, 65535), ROUTE, BODY, bytes(4000))),
        wire.to_bytes(say(Kind.CREDIT, ONE, seq=2**32 - 1, arg=2**32 - 1)),
        wire.to_bytes(say(Kind.CANCEL, ONE)),
        wire.to_bytes(Message(Header(Kind.REGISTER), NESTED, DEEP_MAP)),
        wire.to_bytes(Message(Header(Kind.REGISTER), codec.pack({"role": "worker"}), bytes(MOST))),
        wire.to_bytes(Message(Header(Kind.TOK, ONE, 0, MOST // 4, 1), body=bytes(MOST), tokens=bytes(MOST))),
        wire.to_bytes(Message(Header(Kind.HELD, ONE, 2**32 - 1, 2**32 - 1, 65535), NESTED)),
        wire.to_bytes(Message(Header(Kind.CATALOGUE), DEEP_MAP)),
    ],
    ids=sized,
)
@pytest.mark.parametrize("said", [partial(ClientSent, CLIENT), partial(WorkerSent, WORKER), partial(AdminSent, b"a1")])
def test_no_bad_message_takes_long(core: Core, data: bytes, said: Callable[[bytes], Event]) -> None:
    """Counted in lines of Python: a slow machine runs a hundred thousand in the 10 ms that a turn may take."""
    lines = 0

    def count(frame: FrameType, event: str, _: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        core.broker.handle(said(data), core.now)
    finally:
        sys.settrace(before)
    assert 0 < lines < 2_000
    assert core.tables.counters["internal_errors"] == 0


# --- anything at all

JUNK = st.binary(max_size=80)
HEADERS = st.builds(
    Header,
    st.sampled_from(list(Kind)),
    st.sampled_from([wire.NO_ID, ONE, b"\2" * 16]),
    st.sampled_from([0, 1, 2, 2**32 - 1]),
    st.sampled_from([0, 1, 2, 2**32 - 1]),
    st.sampled_from([0, 1, 2, 65535]),
)
ROUTES = st.one_of(
    JUNK,
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats()
        | st.text(max_size=5)
        | st.binary(max_size=16),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["model", "timeout", "versions", "instance", "name", "role", "boot", "slots", "models", "phase"]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=8,
    ).map(codec.pack),
    st.sampled_from([ROUTE, codec.pack(Catalogue("m", "failed")), codec.pack(Catalogue("m", "ready"))]),
)


def _fitting(header: Header, route: bytes, body: bytes, tokens: bytes) -> bytes:
    """With no part but those that the kind has."""
    parts = wire.PARTS[header.kind]
    kept = [part if parts & flag else b"" for flag, part in zip(wire.Part, (route, body, tokens), strict=True)]
    return wire.to_bytes(Message(header, *kept))


TOKENS = st.sampled_from([b"", bytes(4), bytes(8)])
MESSAGES = st.one_of(
    JUNK,
    st.builds(lambda *parts: wire.to_bytes(Message(*parts)), HEADERS, ROUTES, ROUTES, TOKENS),
    st.builds(_fitting, HEADERS, ROUTES, ROUTES, TOKENS),
    st.sampled_from(
        [
            wire.to_bytes(m)
            for m in (
                Message(Header(Kind.SUBMIT, ONE), ROUTE, BODY),
                say(Kind.RUNACK, ONE, attempt=1),
                tok(ONE, 0),
                tok(ONE, 1),
                end(ONE, 1),
                stopped(ONE, 1),
                say(Kind.CREDIT, ONE, seq=9, arg=1),
                say(Kind.CANCEL, ONE),
                say(Kind.ENDACK, ONE),
                say(Kind.BYE),
                Message(Header(Kind.ATTACH, ONE, 1, 9, 1), ROUTE, BODY, wire.pack_tokens([0])),
                Message(Header(Kind.HELD, ONE, 0, 1, 1), codec.pack(Held(CLIENT.ljust(16, b"."), "m"))),
                Message(Header(Kind.HELD, b"\2" * 16, 1, 2, 3), codec.pack(Held(b"unknown", "m"))),
                say(Kind.RESET, ONE, attempt=1),
                say(Kind.DRAIN, arg=500),
                Message(Header(Kind.EVICT, b"q" * 16), codec.pack(Evict("w1", 0.5))),
                Message(Header(Kind.STATUS, b"q" * 16)),
            )
        ]
    ),
)
EVENTS = st.one_of(
    st.builds(ClientSent, st.sampled_from([CLIENT, b"c9"]), MESSAGES),
    st.builds(WorkerSent, st.sampled_from([WORKER, LAUNCHER, b"w9"]), MESSAGES),
    st.builds(AdminSent, st.sampled_from([b"a1", b"a2"]), MESSAGES),
    st.builds(FramesSent, st.sampled_from([CLIENT, WORKER, b"a1"]), MESSAGES),
    st.builds(ConnectionLost, st.sampled_from([CLIENT, WORKER, b"c9"])),
    st.just(TimerDue()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.sampled_from([0.0, 0.01, 0.6, 1.0, 5.0])), max_size=30))
def test_no_sequence_of_messages_meets_a_bug_or_leaves_anything_behind(story: list[tuple[object, float]]) -> None:
    core = Core()
    core.hello()
    core.register()
    core.launcher()
    for event, pause in story:
        core.now += pause
        core.handle(event)  # type: ignore[arg-type]  # fails on a bug
    for _ in range(3):
        core.now += 601
        core.handle(TimerDue())
    core.assert_empty()
    assert core.tables.clients.by_instance == {}
    assert core.tables.pool.workers == {}
    assert core.tables.strikes.records == {}


# --- timers


def test_timers_ring_in_order_and_once() -> None:
    timers: Timers[str] = Timers()
    for key, due in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        timers.set(key, due)
    timers.cancel("c")
    timers.set("a", 2.5)
    assert timers.next() == 2.0
    assert list(timers.due(1.9)) == []
    assert list(timers.due(9.0)) == ["b", "a"]
    assert timers.next() is None


def test_cancelled_timers_take_no_room() -> None:
    timers: Timers[int] = Timers()
    for n in range(10_000):
        timers.set(n, 600.0 + n)
        timers.cancel(n)
    assert len(timers) == 0
    assert len(timers._heap) < 1000


def test_delayed_timers() -> None:
    timers: Timers[str] = Timers()
    timers.set("near", 1.0)
    timers.set("far", 2.0)
    timers.delay(lambda key: key == "near", 5.0)
    assert list(timers.due(4.0)) == ["far"]
    assert list(timers.due(6.0)) == ["near"]
