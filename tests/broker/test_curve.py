"""Keys at the broker's doors: who comes in, as whom, and what they share; over real sockets, and in the core."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq

import loopmux
from brokerkit import CLIENT, FOUR, ONE, OTHER, SECOND, THREE, TWO, WORKER, Core, end, failure, instance, tok
from brokerwire import Peer, Process, broker, fails, settings, until
from loopmux import codec, keys, wire
from loopmux.errors import AuthError, ConfigError
from loopmux.keys import Credentials, Key
from loopmux.messages import Failure, Hello, Register, ServedModel
from loopmux.wire import Header, Kind, Message
from loopmux_broker.admission import Limits
from loopmux_broker.config import ClientKey
from loopmux_broker.configfile import load
from loopmux_broker.events import ClientSent, KeyRefused, Log, WorkerSent, say
from loopmux_broker.listeners import Listeners
from loopmux_broker.zap import judge, listed


@dataclass
class House:
    """A running broker with keys, and the folder with everybody's: ``broker``, ``desk``, ``lab``, ``gpu``."""

    folder: Path
    process: Process

    def key(self, name: str) -> Key:
        return keys.read(self.folder / f"{name}.key")

    def shown(self, name: str, server: str = "broker") -> Credentials:
        return Credentials(self.key(name), self.key(server).public)

    def peer(self, name: str, *, workers: bool = False) -> Peer:
        return Peer(self.process.workers if workers else self.process.clients, self.shown(name))

    def client(self, name: str, server: str = "broker", **options: Any) -> loopmux.Client:
        shown = {"key": self.folder / f"{name}.key", "server_key": self.key(server).public}
        return loopmux.Client(self.process.clients, model="m", **shown, **options)


def furnished(folder: Path, **more: Any) -> Path:
    """A settings file with keys on tcp, one for each name."""
    for name in ("broker", "desk", "lab", "gpu", "nobody"):
        keys.new(name, folder)
    public = {name: keys.read(folder / f"{name}.key").public for name in ("desk", "lab", "gpu")}
    named: dict[str, Any] = {
        "endpoints": ["tcp://127.0.0.1:0"],
        "worker_endpoints": ["tcp://127.0.0.2:0"],
        "key": "broker.key",
        "client_keys": {"desk": public["desk"], "lab": {"key": public["lab"], "weight": 2.0}},
        "worker_keys": {"gpu": public["gpu"]},
    }
    return settings(folder, **named | more)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("keys")
    with broker("--config", str(furnished(folder))) as process:
        yield House(folder, process)


# --- over real sockets


def test_a_whole_request_over_tcp_with_keys(house: House) -> None:
    with house.peer("desk") as client, house.peer("gpu", workers=True) as worker:
        client.hello()
        worker.register()
        client.submit(ONE)
        worker.take()
        worker.send(tok(ONE, 0))
        worker.send(end(ONE, 1))
        assert [client.expect(Kind.TOK), client.receive()] == [tok(ONE, 0), end(ONE, 1)]
        client.send(say(Kind.ENDACK, ONE))
        assert worker.expect(Kind.ENDACK).header.attempt == 1


def test_the_longest_message_is_not_too_long_because_it_is_sealed(house: House) -> None:
    with house.peer("desk") as client:
        client.hello()
        client.raw(bytes(wire.message_limit(wire.CLIENT_BODY_LIMIT)))
        assert codec.unpack(Failure, client.expect(Kind.ERROR).body).code == "protocol"
        assert client.alive()


def test_a_worker_process_and_a_client_by_their_variables(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"name": "echo", "endpoint": house.process.workers, "models": [{"id": "echo"}], "engine": "echo"}
    (house.folder / "spec.json").write_text(json.dumps(spec))
    monkeypatch.setenv("LOOPMUX_SERVER_KEY", house.key("broker").public)
    variables = {**os.environ, "LOOPMUX_KEY": str(house.folder / "gpu.key")}
    command = [sys.executable, "-m", "loopmux_worker", "--parent-pid", str(os.getpid())]
    worker = subprocess.Popen([*command, "--spec", str(house.folder / "spec.json")], env=variables)
    monkeypatch.setenv("LOOPMUX_KEY", str(house.folder / "desk.key"))
    try:
        with loopmux.Client(house.process.clients) as client:
            assert client.generate("hello", model="echo", timeout=20, max_new_tokens=5).usage.completion_tokens == 5
    finally:
        worker.terminate()
        assert worker.wait(10) == 0


@pytest.mark.parametrize("name", ["nobody", "gpu"])
def test_a_key_that_is_not_listed_for_this_side_ends_in_a_clear_error_and_may_try_again(
    house: House, name: str
) -> None:
    with house.client("desk") as other, house.client(name) as client:
        before = other.status().counters.get("keys_refused", 0)

        def refused() -> int:
            with pytest.raises(AuthError, match=r"refused the key .* \(\$LOOPMUX_KEY\): have its public part"):
                client.generate("hello", timeout=10)
            return other.status().counters["keys_refused"] - before

        until(lambda: refused() >= 2, "another try asks the broker anew")
        assert other.status().clients == 1


def test_a_clients_key_opens_no_worker_door(house: House) -> None:
    worker = subprocess.run(
        [sys.executable, "-m", "loopmux_worker", "--spec", "-"],
        input=json.dumps({"name": "w", "endpoint": house.process.workers, "models": [{"id": "m"}], "engine": "echo"}),
        env={
            **os.environ,
            "LOOPMUX_KEY": str(house.folder / "desk.key"),
            "LOOPMUX_SERVER_KEY": str(house.folder / "broker.key"),
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (worker.returncode, "refused the key 'desk' ($LOOPMUX_KEY)" in worker.stderr) == (1, True), worker.stderr


def test_without_a_key_or_with_another_brokers_nobody_comes_in(house: House) -> None:
    with loopmux.Client(house.process.clients) as client, pytest.raises(AuthError, match="lets in keys only"):
        client.generate("hello", model="m", timeout=10)
    with house.client("desk", server="lab") as client, pytest.raises(AuthError, match="LOOPMUX_SERVER_KEY"):
        client.generate("hello", timeout=10)


def test_an_instance_belongs_to_the_key_that_it_came_with(house: House) -> None:
    with house.peer("desk") as desk, house.peer("lab") as lab:
        desk.hello(TWO)
        lab.send(Message(Header(Kind.HELLO), route=codec.pack(Hello(wire.VERSIONS, TWO))))
        refused = codec.unpack(Failure, lab.expect(Kind.ERROR).body)
        assert (refused.code, "under another key" in refused.message) == ("auth", True)
        assert desk.alive()


def test_a_killed_broker_is_followed_by_one_with_the_same_keys(tmp_path: Path) -> None:
    with broker("--config", str(furnished(tmp_path))) as process:
        house = House(tmp_path, process)
        with house.client("desk") as client:
            first = client.status()
            until(lambda: client.status().uptime > 1.1, "a broker that has served")  # else its parent gives up
            os.kill(process.serving, signal.SIGKILL)
            until(lambda: client.status().epoch != first.epoch, "the client is with the next broker")
        with house.client("nobody") as client, pytest.raises(AuthError):
            client.status()


def test_an_asyncio_client_hears_it_too_each_time_it_tries(house: House) -> None:
    async def main() -> None:
        shown = {"key": house.folder / "nobody.key", "server_key": house.key("broker").public}
        async with loopmux.AsyncClient(house.process.clients, **shown) as client:  # type: ignore[arg-type]
            for _ in range(2):
                with pytest.raises(AuthError, match="refused the key"):
                    await client.generate("hello", model="m", timeout=10)

    asyncio.run(main())


# --- settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": ""}, "found 2 keys, expected none without a `key` of the broker"),
        ({"key": "nowhere.key"}, "key: found 'nowhere.key' (cannot read the key file"),
        ({"key": "x" * 40}, "key: found 40 characters that name no file and may hold a key itself, expected the name"),
        ({"worker_keys": {}}, "found no worker_keys in the settings, expected the public key of everybody"),
        ({"client_keys": {"desk": "short"}}, "client_keys.desk: found a text of 5 characters that is no part of a key"),
        ({"client_keys": {"a b": "x" * 40}}, "client_keys.a b: found 'a b' (str), expected up to 64 letters"),
        ({"client_keys": {"d": {"key": "x" * 40, "weight": 0}}}, "client_keys.d.weight: found 0.0 (float), expected a"),
        ({"worker_keys": {"a": "x" * 40, "b": "x" * 40}}, "worker_keys.b: found the key of a, expected one of its own"),
    ],
)
def test_what_is_wrong_with_keys_is_said_before_anything_starts(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = furnished(tmp_path, **change)
    with pytest.raises(ConfigError) as caught:
        Listeners([], [], load(file), [])
    assert words in str(caught.value)
    assert "x" * 40 not in str(caught.value)


def test_a_broker_with_wrong_keys_does_not_start(tmp_path: Path) -> None:
    path = furnished(tmp_path)
    (tmp_path / "broker.key").chmod(0o644)
    code, written = fails("--config", str(path))
    assert (code, "can be read by others (mode 644)" in written) == (78, True), written


def test_with_a_key_other_hosts_may_connect(tmp_path: Path) -> None:
    with broker("--config", str(furnished(tmp_path, endpoints=["tcp://0.0.0.0:0"]))) as process:
        assert process.clients.startswith("tcp://0.0.0.0:")


def test_a_next_broker_whose_settings_lost_the_key_keeps_to_it_before_other_hosts(tmp_path: Path) -> None:
    path = furnished(tmp_path, endpoints=["tcp://0.0.0.0:0"])
    with broker("--config", str(path)) as process:
        house = House(tmp_path, process)
        settings(tmp_path)
        with house.client("desk") as client:
            until(lambda: client.status().uptime > 1.1, "a broker that has served")
            os.kill(process.serving, signal.SIGKILL)
            said = {line["event"]: line for line in (process.line() for _ in range(3))}
            assert list(said) == ["broker died", "settings refused, the former ones stay in force", "ready"]
            assert "tcp://0.0.0.0" in said["settings refused, the former ones stay in force"]["reason"]
            assert client.status().pid == said["ready"]["pid"]
        with house.client("nobody") as client, pytest.raises(AuthError):
            client.status()


# --- the answer to a question about a key

RAW = bytes(range(32))
PUBLIC = zmq.utils.z85.encode(RAW).decode()
NAMES = listed(clients={"desk": PUBLIC}, workers={})
ASKED = [b"1.0", b"7", b"clients", b"10.0.0.1", b"", b"CURVE", RAW]


def test_a_listed_key_is_let_in_by_its_name() -> None:
    verdict = judge(ASKED, NAMES)
    assert (verdict.answer, verdict.refused) == ([b"1.0", b"7", b"200", b"OK", b"desk", b""], None)


@pytest.mark.parametrize(
    "question",
    [
        [*ASKED[:2], b"workers", *ASKED[3:]],
        [*ASKED[:2], b"\xff", *ASKED[3:]],
        [*ASKED[:6], bytes(32)],
        [*ASKED[:6], b"short"],
        [*ASKED[:5], b"NULL"],
        [*ASKED[:5], b"PLAIN", RAW],
        [b"2.0", *ASKED[1:]],
        [b""],
        [],
    ],
)
def test_anything_else_is_refused_and_told(question: list[bytes]) -> None:
    verdict = judge(question, NAMES)
    assert verdict.answer[2:3] + verdict.answer[4:5] == [b"400", b""]
    assert verdict.refused is not None


# --- the core


def keyed(**config: Any) -> Core:
    named = {"desk": "x", "lab": ClientKey("y", 3.0)}
    return Core(**{"client_keys": named, "worker_keys": {"gpu": "z", "cpu": "u"}} | config)


def hello(core: Core, peer: bytes, key: str, who: bytes | None = None) -> Any:
    route = codec.pack(Hello(wire.VERSIONS, who or instance(peer)))
    return core.handle(ClientSent(peer, wire.to_bytes(Message(Header(Kind.HELLO), route=route)), key))


def register(core: Core, peer: bytes, key: str, name: str = "w") -> Any:
    served = (ServedModel("m", "f"),)
    route = Register("worker", name, peer.ljust(16), wire.VERSIONS, models=served, slots=1)
    return core.handle(WorkerSent(peer, wire.to_bytes(Message(Header(Kind.REGISTER), codec.pack(route))), key))


def test_another_key_gets_neither_a_clients_instance_nor_a_workers_name() -> None:
    core = keyed()
    hello(core, CLIENT, "desk")
    register(core, WORKER, "gpu")
    for [answer] in (hello(core, OTHER, "lab", instance(CLIENT)), register(core, SECOND, "cpu")):
        assert failure(answer)[3].code == "auth"
    assert [log.event for log in core.logged].count("another key") == 2
    assert core.counted["other_keys"] == 2
    assert (list(core.tables.clients.by_peer), list(core.tables.pool.workers)) == ([CLIENT], [WORKER])


def test_limits_are_those_of_a_key_however_many_clients_have_it() -> None:
    core = keyed(limits=Limits(client_queued=1))
    for peer, key in ((CLIENT, "desk"), (b"c3", "desk"), (OTHER, "lab")):
        hello(core, peer, key)
    register(core, WORKER, "gpu")
    core.submit(FOUR)
    core.submit(ONE)
    [refused] = core.submit(TWO, peer=b"c3")
    assert "1 requests of key 'desk' are queued" in failure(refused)[3].message
    [accepted] = core.submit(THREE, peer=OTHER)
    assert accepted.message.kind is Kind.ACCEPTED


def test_a_key_that_weighs_three_is_served_three_times_as_much() -> None:
    core = keyed()
    register(core, WORKER, "gpu")
    served = {"desk": 0, "lab": 0}
    for peer, key in ((CLIENT, "desk"), (OTHER, "lab")):
        hello(core, peer, key)
        for n in range(40):
            core.submit(key.encode().ljust(8) + n.to_bytes(8), peer=peer, max_new_tokens=10)
    for _ in range(40):
        [lease] = core.tables.pool.leases.values()
        served[lease.request.client.principal.name] += 1
        core.worker(tok(lease.request.id, 0, 10))
        core.worker(end(lease.request.id, 10))
    assert 28 <= served["lab"] <= 32


def test_what_only_a_worker_has_named_belongs_to_the_key_that_comes_with_it() -> None:
    core = keyed()
    client = core.tables.clients.expect(instance(CLIENT), core.now)
    hello(core, CLIENT, "desk")
    assert (client.key, client.principal.name) == ("desk", "desk")
    [answer] = hello(core, OTHER, "lab", instance(CLIENT))
    assert failure(answer)[3].code == "auth"


def test_refused_keys_are_counted_and_told_once_in_a_while() -> None:
    core = keyed()
    for _ in range(5):
        assert core.handle(KeyRefused("clients", "10.0.0.1", "k")) == []
    fields = {"side": "clients", "address": "10.0.0.1", "key": "k", "so_far": 1}
    assert core.logged == [Log("warning", "a key was refused", fields)]
    assert core.counted["keys_refused"] == 5
