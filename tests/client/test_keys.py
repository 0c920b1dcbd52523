"""Keys: their files, which ones a connection uses, and a socket's word about a broker that will not have it."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

import ports
from loopmux import keys
from loopmux.cli import main
from loopmux.errors import ConfigError
from loopmux.keys import Credentials, Key
from loopmux.sockets import Dealer

BEYOND = "tcp://broker.example.org:7750"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOOPMUX_KEY", raising=False)
    monkeypatch.delenv("LOOPMUX_SERVER_KEY", raising=False)


def test_a_new_key_is_its_owners_alone_and_printed_as_the_settings_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["keys", "new", "desk"]) == 0
    path = tmp_path / "loopmux" / "keys" / "desk.key"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent)] == [0o600, 0o700]
    key = keys.read(path)
    printed = capsys.readouterr()
    assert printed.out == f"desk: '{key.public}'\n"
    assert str(path) in printed.err
    assert key.secret not in printed.out + printed.err
    assert main(["keys", "show", str(path)]) == 0
    assert capsys.readouterr().out == f"{key.public}\n"
    assert main(["keys", "new", "desk"]) == 78
    assert "is there already: choose another name" in capsys.readouterr().err
    assert keys.read(path) == key
    assert key.secret not in repr(Credentials(key, key.public))


def test_a_key_that_a_full_disk_has_no_room_for_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: Path, flags: int, mode: int) -> int:
        os.close(real(path, flags, mode))
        return real("/dev/full", os.O_WRONLY)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        with pytest.raises(ConfigError, match=r"cannot write .*desk.key: No space left on device"):
            keys.new("desk", tmp_path)
    assert list(tmp_path.iterdir()) == []
    keys.new("desk", tmp_path)


@pytest.mark.parametrize("name", ["", ".key", "a/b", "ä", "a" * 65, "a b"])
def test_what_is_no_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected up to 64 letters, digits"):
        keys.new(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_libzmq_without_keys_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda _: False)
    with pytest.raises(ConfigError, match="has no CURVE, which keys need: install pyzmq"):
        keys.new("desk", tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot read the key file .*: No such file"),
        ("junk", "is no key file: Expecting value"),
        ('{"name": "desk", "public": "x"}', "secret: found nothing, expected a text"),
        ('{"name": "desk", "public": "x", "secret": "y"}', "found a text of 1 characters that is no part of a key"),
    ],
)
def test_what_is_no_key_file(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "k"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=words):
        keys.read(path)


def test_a_key_that_others_can_read_and_one_of_two_halves_are_refused(tmp_path: Path) -> None:
    path, key = keys.new("desk", tmp_path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 640\).*chmod 600"):
        keys.read(path)
    _, other = keys.new("other", tmp_path)
    mixed = tmp_path / "mixed"
    mixed.write_text(json.dumps({"name": "desk", "public": key.public, "secret": other.secret}))
    mixed.chmod(0o600)
    with pytest.raises(ConfigError, match="does not belong to the secret one") as caught:
        keys.read(mixed)
    assert other.secret not in str(caught.value)


def test_which_keys_a_connection_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = keys.new("desk", tmp_path)
    broker_file, broker = keys.new("broker", tmp_path)
    alone = tmp_path / "broker.pub"
    alone.write_text(broker.public + "\n")
    assert keys.credentials("tcp://127.0.0.1:7750") is keys.credentials("tcp://[::1]:7750") is None
    for given in (broker.public, str(alone), str(broker_file)):
        assert keys.credentials(BEYOND, path, given) == Credentials(key, broker.public)
    monkeypatch.setenv("LOOPMUX_KEY", str(path))
    monkeypatch.setenv("LOOPMUX_SERVER_KEY", broker.public)
    assert keys.credentials("tcp://127.0.0.1:7750") == keys.credentials(BEYOND) == Credentials(key, broker.public)
    assert keys.credentials("ipc:///tmp/s") is None
    other = keys.new("other", tmp_path)
    assert keys.credentials(BEYOND, other[0]) == Credentials(other[1], broker.public)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path, key = keys.new("desk", tmp_path)
    with pytest.raises(ConfigError, match=r"found neither, expected a key file .*keys new NAME"):
        keys.credentials(BEYOND)
    with pytest.raises(ConfigError, match=r"found \$LOOPMUX_KEY alone"):
        keys.credentials("tcp://127.0.0.1:7750", path)
    with pytest.raises(ConfigError, match=r"found \$LOOPMUX_SERVER_KEY alone"):
        keys.credentials("tcp://127.0.0.1:7750", None, key.public)
    with pytest.raises(ConfigError, match="public key: found a text of 7 characters"):
        keys.credentials(BEYOND, path, "nowhere")


@pytest.mark.parametrize("given", ["{secret}", " {secret}\n", "'{secret}',", "secret: {secret}", "{file}"])
def test_a_key_that_is_given_for_its_file_s_name_is_not_repeated(given: str, tmp_path: Path) -> None:
    path, key = keys.new("desk", tmp_path)
    text = given.format(secret=key.secret, file=path.read_text())
    with pytest.raises(ConfigError, match="may hold a key itself, expected the name of its file") as caught:
        keys.credentials(BEYOND, text, key.public)
    assert key.secret not in str(caught.value)


# --- sockets


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(0)  # where a test has failed, sockets are left


@pytest.fixture
def port() -> Iterator[int]:
    with ports.reserved() as port:
        yield port


def made(name: str) -> Key:
    return Key(name, *(part.decode() for part in zmq.curve_keypair()))


def barred(dealer: Dealer) -> str:
    for _ in range(1000):
        while dealer.news() is not None:
            if dealer.barred:
                return dealer.barred
        assert dealer.monitor.poll(30_000)
    raise AssertionError("never barred")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_broker_of_another_key_is_named_once_it_is_clear_and_left_alone(
    context: zmq.Context[zmq.Socket[bytes]], host: str
) -> None:
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.CURVE_SERVER, 1)
    router.setsockopt(zmq.CURVE_SECRETKEY, made("broker").secret.encode())
    monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dealer = Dealer(context, 1 << 20, Credentials(made("desk"), made("another").public))
    dealer.connect(f"tcp://{host}:{port}")
    assert "cannot read what is said to it with $LOOPMUX_SERVER_KEY" in barred(dealer)
    for _ in range(30):
        assert not list(dealer.arrived(1))  # what owns it looks: libzmq ends connections there
        if not monitor.poll(200):
            break
        monitor.recv_multipart()
    else:
        raise AssertionError("it goes on connecting")
    dealer.close()
    router.disable_monitor()
    monitor.close(0)
    router.close(0)


def test_who_has_no_key_is_told_to_get_one_and_who_has_one_that_none_is_wanted(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    broker, plain, keyed = made("broker"), context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    keyed.setsockopt(zmq.CURVE_SERVER, 1)
    keyed.setsockopt(zmq.CURVE_SECRETKEY, broker.secret.encode())
    ports = [router.bind_to_random_port("tcp://127.0.0.1") for router in (plain, keyed)]
    dealers = [Dealer(context, 1 << 20, Credentials(made("desk"), broker.public)), Dealer(context, 1 << 20)]
    for dealer, port in zip(dealers, ports, strict=True):
        dealer.connect(f"tcp://127.0.0.1:{port}")
    assert "has no key, and one was expected" in barred(dealers[0])
    assert "lets in keys only: set $LOOPMUX_KEY" in barred(dealers[1])
    for one in (*dealers, plain, keyed):
        one.close() if isinstance(one, Dealer) else one.close(0)


def cut_off(port: int, begun: bytes) -> None:
    """Take the port, and 15 connections that end amid the handshake, as those to a broker that is killed do."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        listening.settimeout(30)
        for _ in range(15):
            with listening.accept()[0] as one:
                one.sendall(begun)


def connects(dealer: Dealer, router: zmq.Socket[bytes], port: int) -> None:
    router.bind(f"tcp://127.0.0.1:{port}")
    while not dealer.connected:
        assert dealer.monitor.poll(30_000)
        dealer.news()
    assert dealer.barred == ""


GREETING = b"\xff" + bytes(7) + b"\1\x7f\3\0NULL" + bytes(48)


@pytest.mark.parametrize("begun", [b"", GREETING[:14], GREETING], ids=["nothing", "half a greeting", "a greeting"])
def test_without_a_key_nobody_is_barred_for_being_cut_off(
    context: zmq.Context[zmq.Socket[bytes]], port: int, begun: bytes
) -> None:
    dealer, router = Dealer(context, 1 << 20), context.socket(zmq.ROUTER)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    cut_off(port, begun)
    seen = set()
    while dealer.monitor.poll(0):
        seen.add(struct.unpack("=Hi", dealer.monitor.recv_multipart()[0])[0])
    assert seen == {zmq.EVENT_DISCONNECTED}
    connects(dealer, router, port)
    dealer.close()
    router.close(0)


def test_who_was_let_in_is_not_barred_for_being_cut_off_later(
    context: zmq.Context[zmq.Socket[bytes]], port: int
) -> None:
    broker = made("broker")
    routers = [context.socket(zmq.ROUTER) for _ in range(2)]
    for router in routers:
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, broker.secret.encode())
        router.setsockopt(zmq.LINGER, 0)
    dealer = Dealer(context, 1 << 20, Credentials(made("desk"), broker.public))
    dealer.connect(f"tcp://127.0.0.1:{port}")
    connects(dealer, routers[0], port)
    routers[0].unbind(f"tcp://127.0.0.1:{port}")
    routers[0].close()
    while dealer.connected:
        assert dealer.monitor.poll(30_000)
        dealer.news()
    cut_off(port, b"")
    connects(dealer, routers[1], port)
    dealer.close()
    routers[1].close()
