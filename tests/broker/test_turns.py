"""What the broker's loop hands to its core, in which order, and what it does about a bug in there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from brokerwire import PATIENCE, Peer, until
from loopmux.pulse import Pulse
from loopmux.wire import Kind
from loopmux_broker.config import BrokerConfig
from loopmux_broker.events import (
    Action,
    ClientSent,
    ConnectionLost,
    Event,
    LoopStalled,
    Push,
    PushBlocked,
    Send,
    Sent,
    TimerDue,
    say,
)
from loopmux_broker.inherited import Listener
from loopmux_broker.lifeline import Lifeline
from loopmux_broker.listeners import Listeners
from loopmux_broker.logs import Logger
from loopmux_broker.server import Server

PEER, OTHER = b"\0peer\1", b"\0other\1"


@pytest.fixture
def listeners(tmp_path: Path) -> Iterator[list[Listener]]:
    opened = Listeners([f"ipc://{tmp_path}/b.ipc"], [f"ipc://{tmp_path}/w.ipc"], BrokerConfig(), [])
    yield opened.all
    opened.close()


def test_a_sleep_amid_a_turn_is_known_before_the_connections_that_closed_in_it(
    listeners: list[Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, events = SimpleNamespace(now=100.0), list[Event]()

    def handle(event: Event, now: float) -> list[Action]:
        events.append(event)
        return []

    def receive() -> list[Sent]:
        clock.now += 5.0
        return []

    monkeypatch.setattr("loopmux_broker.server.time", SimpleNamespace(monotonic=lambda: clock.now))
    with Lifeline() as lifeline:
        server = Server(BrokerConfig(), Logger("json", "error"), lifeline, listeners, Pulse())
        server._broker = SimpleNamespace(handle=handle, next_timer=lambda: None)  # type: ignore[assignment]
        [_, workers, _] = server.doors
        workers.receive = receive  # type: ignore[method-assign]
        workers.lost.append(PEER)
        server._turn(set())
        server.close()
    assert events == [LoopStalled(5.0), ConnectionLost(PEER)]


@pytest.mark.parametrize("together", [1, 50], ids=["in frames of their own", "together"])
def test_a_flood_at_one_door_leaves_the_others_their_turns(
    listeners: list[Listener], monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    clock, handled = SimpleNamespace(now=100.0), list[Event]()

    def handle(event: Event, now: float) -> list[Action]:
        handled.append(event)
        clock.now += 0.0002
        return []

    with Lifeline() as lifeline:
        server = Server(BrokerConfig(), Logger("json", "error"), lifeline, listeners, Pulse())
        server._broker = SimpleNamespace(handle=handle, next_timer=lambda: None)  # type: ignore[assignment]
        door = server.doors[0]
        with Peer(door.endpoint) as flood:
            for _ in range(200 // together):
                flood.together(*[say(Kind.PING)] * together)
            until(lambda: bool(door.monitor.poll(0)), "the connection is there")
            door.watch()
            flood.socket.close(int(1000 * PATIENCE))
        until(lambda: bool(door.monitor.poll(0)), "all of it has come in, and the connection closed behind it")
        monkeypatch.setattr("loopmux_broker.server.time", SimpleNamespace(monotonic=lambda: clock.now))
        turns = []
        while len(handled) < 200:
            before = len(handled)
            server._turn(server._wait())
            turns.append(len(handled) - before)
        server.close()
    assert max(turns) == 8, "1.5 ms of them"


def test_while_very_many_timers_ring_what_comes_in_is_heard(listeners: list[Listener]) -> None:
    rings, handled = iter(range(1, 6)), list[Event | int]()

    def handle(event: Event, now: float) -> list[Action]:
        handled.append(next(rings) if event == TimerDue() else event)
        return []

    with Lifeline() as lifeline:
        server = Server(BrokerConfig(), Logger("json", "error"), lifeline, listeners, Pulse())
        server._broker = SimpleNamespace(handle=handle, next_timer=lambda: 0.0)  # type: ignore[assignment]
        with Peer(server.doors[0].endpoint) as client:
            client.send(say(Kind.PING))
            until(lambda: server.doors[0].readable, "it has come in")
            while 5 not in handled:
                assert server._timeout(time.monotonic()) == 0, "it does not sleep where a timer is due"
                server._turn(server._wait())
        server.close()
    assert [type(event) for event in handled] == [ClientSent, int, int, int, int, int]


def test_a_full_pipe_is_told_once_of_each_request(listeners: list[Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of chunks may wait for who never reads: a word of each at every try would leave others no time."""
    pushes: list[Action] = [Push(PEER, b"", request, seq) for request in (b"1", b"2") for seq in range(1_000)]
    pushes += [Push(PEER, b"", b"again", seq) for seq in (7, 8, 5, 6, 7, 8)]
    events, tried = list[Event](), list[int]()

    def handle(event: Event, now: float) -> list[Action]:
        events.append(event)
        return pushes if event == TimerDue() else []

    def send(peer: bytes, messages: list[bytes]) -> int:
        tried.append(len(messages))
        return 1

    with Lifeline() as lifeline:
        server = Server(BrokerConfig(), Logger("json", "error"), lifeline, listeners, Pulse())
        server._broker = SimpleNamespace(handle=handle)  # type: ignore[assignment]
        monkeypatch.setattr(server.doors[PEER[-1]], "send", send)
        server._handle(TimerDue(), 0.0)
        server._flush()
        server.close()
    assert events == [
        TimerDue(),
        PushBlocked(PEER, b"1", 1),
        PushBlocked(PEER, b"2", 0),
        PushBlocked(PEER, b"again", 5),
    ]
    assert tried == [2_006]


def test_a_bug_in_the_core_is_logged_and_stops_nothing(
    listeners: list[Listener], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(event: Event, now: float) -> None:
        raise RuntimeError("a bug")

    with Lifeline() as lifeline:
        server = Server(BrokerConfig(), Logger("json", "info"), lifeline, listeners, Pulse())
        monkeypatch.setitem(server._broker._handlers, TimerDue, fail)
        server._handle(TimerDue(), 0.0)
        server.close()
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["event"], line["handled"]) == ("error", "internal error", "TimerDue")
    assert line["traceback"].endswith("RuntimeError: a bug\n")


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger("console", "warning")
    log.say("info", "ready")
    log.say("warning", "loop stalled", seconds=2.5)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("Z warning loop stalled  seconds=2.5")


def test_a_message_that_cannot_be_made_costs_its_peer_a_turn_and_is_logged_and_counted(
    listeners: list[Listener], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Peer] = []
    blocked: list[Event] = []
    with Lifeline() as lifeline:
        server = Server(BrokerConfig(), Logger("json", "info"), lifeline, listeners, Pulse())
        monkeypatch.setitem(server._broker._handlers, PushBlocked, lambda event, _: blocked.append(event))
        monkeypatch.setattr(server.doors[1], "send", lambda peer, messages: sent.append(peer) or len(messages))
        bad = Send(PEER, say(Kind.STOP, b"1" * 16, attempt=65_536))
        server._said = {PEER: [bad, Push(PEER, b"tok", b"1", 7)], OTHER: [Send(OTHER, say(Kind.PONG))]}
        server._flush()
        assert server._broker.tables.counters["internal_errors"] == 1
        server.close()
    assert sent == [OTHER]
    assert blocked == [PushBlocked(PEER, b"1", 7)]
    [line] = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "internal error"
    assert "struct.error" in json.loads(line)["traceback"]


def test_a_socket_whose_file_somebody_removed_is_said_and_now_and_then_again(
    listeners: list[Listener], capsys: pytest.CaptureFixture[str]
) -> None:
    with Lifeline() as lifeline:
        server = Server(BrokerConfig(), Logger("json", "info"), lifeline, listeners, Pulse())
        server._look_for_files(0.0)
        assert capsys.readouterr().err == ""
        Path(listeners[0].endpoint.removeprefix("ipc://")).unlink()
        server._look_for_files(10.0)
        [line] = capsys.readouterr().err.splitlines()
        assert server._look_at == 70.0
        server.close()
    said = json.loads(line)
    assert (said["level"], said["event"], said["endpoints"]) == ("error", "socket gone", [listeners[0].endpoint])
    assert said["remedy"] == "stop the broker and start it again"
