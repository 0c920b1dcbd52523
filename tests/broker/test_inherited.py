"""Listening sockets that outlive the broker: handed over by the launcher (--listen-fd) or by systemd (LISTEN_FDS)."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from brokerkit import end, tok
from brokerwire import PATIENCE, Peer, broker, fails, plain, settings
from loopmux.claims import BusyError
from loopmux.errors import ConfigError, LoopmuxError
from loopmux.listening import Listening, renew
from loopmux.wire import Kind
from loopmux_broker.config import BrokerConfig
from loopmux_broker.doors import Side
from loopmux_broker.inherited import Listener, inherited
from loopmux_broker.listeners import Listeners

ONE = b"1" * 16


@pytest.fixture(params=["ipc", "tcp"])
def sockets(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Listening, Listening]]:
    """A listening socket for clients and one for workers."""
    endpoints = [f"ipc://{tmp_path}/s/b.ipc", f"ipc://{tmp_path}/s/b.ipc.work"]
    if request.param == "tcp":
        endpoints = ["tcp://127.0.0.1:0", "tcp://[::1]:0"]
    clients, workers = map(Listening, endpoints)
    yield clients, workers
    workers.close()
    clients.close()
    assert list(tmp_path.iterdir()) == []


def arguments(clients: Listening, workers: Listening) -> list[str]:
    return ["--listen-fd", f"clients={clients.fileno()}", "--listen-fd", f"workers={workers.fileno()}"]


def test_nobody_is_refused_while_the_broker_is_started_again(
    sockets: tuple[Listening, Listening], tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = ("--config", str(settings(tmp_path_factory.mktemp("settings"))), *arguments(*sockets))
    descriptors = [one.fileno() for one in sockets]
    with Peer(sockets[0].endpoint) as early, Peer(sockets[1].endpoint) as worker:
        with broker(*words, descriptors=descriptors) as first:
            assert first.clients == sockets[0].endpoint
            early.hello()  # it connected before there was a broker
            worker.register()
            first.stop(signal.SIGKILL)
        with plain(sockets[0].endpoint), Peer(sockets[0].endpoint) as late:
            with broker(*words, descriptors=descriptors) as second:
                assert second.workers == sockets[1].endpoint
                late.hello()
                worker.register()
                late.submit(ONE)
                assert worker.take().header.request == ONE
                worker.send(tok(ONE, 0))
                worker.send(end(ONE, 1))
                assert late.expect(Kind.TOK) == tok(ONE, 0)
                second.stop()


def test_endpoints_of_the_settings_are_served_beside_what_was_handed_over(tmp_path: Path) -> None:
    path, settings = tmp_path / "b.ipc", tmp_path / "broker.yaml"
    own = f"ipc://{tmp_path}/own.ipc"
    settings.write_text(f"endpoints: ['{own}', 'ipc://{path}']\n")
    clients, workers = Listening(f"ipc://{path}"), Listening(f"ipc://{path}.work")
    try:
        words = (*arguments(clients, workers), "--config", str(settings))
        with broker(*words, descriptors=[clients.fileno(), workers.fileno()]) as running:
            for endpoint in (own, f"ipc://{path}"):
                with Peer(endpoint) as client:
                    client.hello()
            assert (tmp_path / "b.ipc.admin").is_socket()  # where the owner of the handed over one looks for it
            assert running.stop()[0] == 0
    finally:
        workers.close()
        clients.close()


def test_a_broker_that_ends_leaves_the_socket_s_file_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "b.ipc"
    clients, workers = Listening(f"ipc://{path}"), Listening(f"ipc://{path}.work")
    try:
        with broker(*arguments(clients, workers), descriptors=[clients.fileno(), workers.fileno()]) as running:
            assert running.stop()[0] == 0
        assert path.is_socket()
        assert oct(path.stat().st_mode)[-3:] == "700"
    finally:
        workers.close()
        clients.close()
    assert list(tmp_path.iterdir()) == []


def test_systemd_s_variables(tmp_path: Path) -> None:
    clients, workers = Listening(f"ipc://{tmp_path}/b.ipc"), Listening(f"ipc://{tmp_path}/b.ipc.work")
    try:
        command = f"export LISTEN_PID=$$; exec {sys.executable} -m loopmux_broker --log-format json "
        command += f"3<&{workers.fileno()} 4<&{clients.fileno()}"
        variables = os.environ | {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "workers:clients"}
        process = subprocess.Popen(
            ["bash", "-c", command],
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            pass_fds=[clients.fileno(), workers.fileno()],
        )
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert '"ready"' in line, line + process.stderr.read()
            with Peer(clients.endpoint) as client:
                client.hello()
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    finally:
        workers.close()
        clients.close()


def test_variables_that_were_for_somebody_else_are_ignored() -> None:
    assert inherited([], {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "clients"}) == []


@pytest.mark.parametrize("count", ["many", "-1", "1.5"])
def test_a_number_of_sockets_that_is_none(count: str) -> None:
    with pytest.raises(ConfigError, match=f"LISTEN_FDS: found '{count}', expected the number of descriptors"):
        inherited([], {"LISTEN_FDS": count, "LISTEN_PID": str(os.getpid())})


def test_what_is_handed_over_says_where_it_listens(tmp_path: Path) -> None:
    one = Listening(f"ipc://{tmp_path}/b.ipc")
    try:
        assert inherited([f"clients={one.fileno()}"], {}) == [Listener(Side.CLIENTS, one.fileno(), one.endpoint)]
    finally:
        one.close()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("clients", "expected clients=N or workers=N"),
        ("clients=x", "expected clients=N or workers=N"),
        ("friends=0", "expected clients or workers"),
        ("clients=987", "descriptor 987 is no socket"),
    ],
)
def test_what_is_no_listening_socket_is_refused(argument: str, words: str) -> None:
    code, written = fails("--listen-fd", argument)
    assert (code, words in written) == (78, True), written
    assert len(written.splitlines()) == 1


def test_a_socket_without_a_file_is_refused_as_where_it_is_named() -> None:
    name = f"loopmux-test-{os.getpid()}"  # such names are shared by the whole host
    with socket.socket(socket.AF_UNIX) as nobody_s:
        nobody_s.bind(f"\0{name}")
        nobody_s.listen()
        [given] = inherited([f"clients={nobody_s.fileno()}"], {})
        with pytest.raises(ConfigError, match=f"'ipc://@{name}' is neither ipc:///path/to/socket nor tcp"):
            Listeners([], [], BrokerConfig(), [replace(given, descriptor=os.dup(given.descriptor))])


def test_a_socket_that_does_not_listen() -> None:
    with socket.socket() as idle, pytest.raises(ConfigError, match="does not listen"):
        inherited([f"clients={idle.fileno()}"], {})


def test_a_second_one_on_the_same_endpoint_is_refused(tmp_path: Path) -> None:
    one = Listening(f"ipc://{tmp_path}/b.ipc")
    try:
        with pytest.raises(BusyError):
            Listening(one.endpoint)
    finally:
        one.close()
    near = Listening("tcp://127.0.0.1:0")
    try:
        with pytest.raises(BusyError, match="taken by another program"):
            Listening(near.endpoint)
    finally:
        near.close()
    with pytest.raises(ConfigError, match="loopback"):
        Listening("tcp://0.0.0.0:0")


def test_one_that_gets_no_descriptor_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as scarce:
        scarce.setattr(os, "open", refused)
        with pytest.raises(LoopmuxError, match="Too many open files"):
            Listening(f"ipc://{tmp_path}/some/sockets/b.ipc")
    assert list(tmp_path.iterdir()) == []


def test_one_whose_file_was_removed_listens_anew_as_soon_as_it_can(tmp_path: Path) -> None:
    path = tmp_path / "sockets" / "b.ipc"
    one = Listening(f"ipc://{path}")
    assert not one.file.gone
    shutil.rmtree(path.parent)
    path.parent.write_text("in the way")
    assert one.file.gone
    before = one.fileno()
    with pytest.raises(ConfigError, match="found the file"):
        renew([one])
    assert one.fileno() == before
    path.parent.unlink()
    renew([one])
    assert not one.file.gone
    plain(one.endpoint).close()
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_where_one_of_several_cannot_listen_anew_none_does(tmp_path: Path) -> None:
    """A new socket that its server does not know would take connections that nobody answers."""
    folders = [tmp_path / name for name in ("first", "second")]
    both = [Listening(f"ipc://{folder}/b.ipc") for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)
    folders[1].write_text("in the way")
    before = [one.fileno() for one in both]
    with pytest.raises(ConfigError, match="found the file"):
        renew(both)
    assert [(one.fileno(), one.file.gone) for one in both] == [(number, True) for number in before]
    assert list(tmp_path.iterdir()) == [folders[1]]
    folders[1].unlink()
    renew(both)
    for one in both:
        plain(one.endpoint).close()
        one.close()
    assert list(tmp_path.iterdir()) == []
