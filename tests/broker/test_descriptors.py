"""How many connections a broker takes. libzmq ends a process that cannot have a descriptor for one more."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from brokerkit import Core
from brokerwire import PATIENCE, Peer, broker, plain, settings
from loopmux_broker import descriptors
from loopmux_broker.events import ConnectionsRefused

ONE = b"1" * 16
FEW, FLOOD = 4096, 3000


@pytest.fixture
def open_files() -> Iterator[None]:
    """This process may open a flood of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FLOOD + 500
    if hard != resource.RLIM_INFINITY and hard < FEW:
        pytest.skip(f"the broker's flood is NOT TESTED: a process may open {hard} files here, {FEW} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_flood_of_connections_ends_no_broker(open_files: None, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/b.ipc"
    words = ("--config", str(settings(tmp_path)), "--endpoint", endpoint)
    with broker(*words, open_files=FEW) as running, ExitStack() as peers:
        client, worker = (peers.enter_context(Peer(each)) for each in (running.clients, running.workers))
        client.hello()
        worker.register()
        flood = [plain(endpoint) for _ in range(FLOOD)]
        client.submit(ONE)  # who was there is served
        assert worker.take().header.request == ONE
        peers.enter_context(Peer(running.workers)).register(name="w2")  # workers still come in
        assert ends(flood[-1])
        for one in flood:
            one.close()
        peers.enter_context(Peer(endpoint)).hello()
        code, written = running.stop()
        assert code == 0
        assert "too many connections" in written


def ends(connection: socket.socket) -> bool:
    """Whether the broker closes a connection; before, it may have said what libzmq begins with."""
    connection.settimeout(PATIENCE)
    while connection.recv(64):
        pass
    return True


def test_they_are_counted_and_seldom_said() -> None:
    core = Core()
    for count in (3, 4):
        assert core.handle(ConnectionsRefused("clients", count)) == []
    [line] = core.logged
    assert (line.event, line.fields["side"], line.fields["so_far"]) == ("too many connections", "clients", 3)
    assert core.counted["connections_refused"] == 7


@pytest.mark.parametrize(
    ("limits", "raised"),
    [
        ((1024, 524_288), (65_536, 524_288)),
        ((1024, 4096), (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), (65_536, resource.RLIM_INFINITY)),
        ((100_000, 524_288), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_a_broker_allows_itself_what_it_may(
    limits: tuple[int, int], raised: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: said.append(pair))
    descriptors.allow()
    assert said == ([raised] if raised else [])


@pytest.mark.parametrize("soft", [64, 1024, 4096, 65_536, resource.RLIM_INFINITY])
def test_workers_come_in_where_clients_no_longer_do(soft: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    limit = 65_536 if soft == resource.RLIM_INFINITY else soft
    assert limit // 2 <= descriptors.most(clients=True) < descriptors.most(clients=False) < limit
