"""In which order one turn of the broker's loop hands things to the core."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from loopmux_broker.config import BrokerConfig
from loopmux_broker.events import Action, ConnectionLost, Event, LoopStalled
from loopmux_broker.lifeline import Lifeline
from loopmux_broker.server import Server

PEER = b"\0peer\1"


def test_a_sleep_amid_a_turn_is_known_before_the_connections_that_closed_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, events = SimpleNamespace(now=100.0), list[Event]()

    def handle(event: Event, now: float) -> list[Action]:
        events.append(event)
        return []

    def receive() -> None:
        clock.now += 5.0

    monkeypatch.setattr("loopmux_broker.server.time", SimpleNamespace(monotonic=lambda: clock.now))
    config = BrokerConfig(endpoints=(f"ipc://{tmp_path}/b.ipc",), worker_endpoints=(f"ipc://{tmp_path}/w.ipc",))
    with Lifeline() as lifeline:
        server = Server(config, structlog.get_logger(), lifeline)
        server._broker = SimpleNamespace(handle=handle, next_timer=lambda: None)  # type: ignore[assignment]
        [_, workers, _] = server.doors
        workers.receive = receive  # type: ignore[method-assign]
        workers.lost.append(PEER)
        server._turn(set())
        server.close()
    assert events == [LoopStalled(5.0), ConnectionLost(PEER)]
