"""Where the broker listens: what is named on its command line, handed over, or set; and who has it when it dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from brokerwire import plain
from loopmux.claims import BusyError
from loopmux.endpoints import admin_endpoint
from loopmux.listening import Listening
from loopmux_broker.config import BrokerConfig
from loopmux_broker.doors import Side
from loopmux_broker.inherited import Listener
from loopmux_broker.listeners import Listeners


def test_sockets_beside_a_port_that_the_system_chose_are_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    opened = Listeners(["tcp://127.0.0.1:0"], [], BrokerConfig(), [])
    clients, workers, admins = opened.all
    port = clients.endpoint.removeprefix("tcp://127.0.0.1:")
    assert int(port) > 0
    assert workers.endpoint == f"ipc://{tmp_path}/loopmux/tcp-{port}.work"
    assert admins.endpoint == f"ipc://{tmp_path}/loopmux/tcp-{port}.admin"
    assert [one.side for one in opened.all] == [Side.CLIENTS, Side.WORKERS, Side.ADMINS]
    for each in opened.all:
        plain(each.endpoint).close()
    opened.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_handed_over_is_served_too_and_its_file_left_alone(tmp_path: Path) -> None:
    theirs = Listening(f"ipc://{tmp_path}/a.ipc")
    given = Listener(Side.CLIENTS, os.dup(theirs.fileno()), theirs.endpoint)
    opened = Listeners([f"ipc://{tmp_path}/b.ipc"], [], BrokerConfig(), [given])
    own, other, workers, admins = opened.all
    assert (own.endpoint, other) == (f"ipc://{tmp_path}/b.ipc", given)
    assert (workers.endpoint, admins.endpoint) == (f"{own.endpoint}.work", admin_endpoint(own.endpoint))
    opened.close()
    plain(theirs.endpoint).close()
    theirs.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_taken_is_given_back_where_something_cannot_be_had(tmp_path: Path) -> None:
    theirs = Listening(f"ipc://{tmp_path}/theirs.ipc")
    with pytest.raises(BusyError):
        Listeners([f"ipc://{tmp_path}/ours/b.ipc"], [theirs.endpoint], BrokerConfig(), [])
    theirs.close()
    assert list(tmp_path.iterdir()) == []
