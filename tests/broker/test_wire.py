"""The broker's process over real sockets, spoken to by raw peers."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from brokerkit import end, stopped, tok
from brokerwire import BODY, PATIENCE, Peer, Process, broker, settings, until
from loopmux import codec, wire
from loopmux.messages import Failure, Held, Submit
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import say

ONE, TWO = b"1" * 16, b"2" * 16
PING = wire.to_bytes(say(Kind.PING))


@pytest.fixture(params=["ipc", "tcp"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    """A broker on ipc, and one on tcp."""
    if request.param == "ipc":
        arguments = ["--endpoint", f"ipc://{tmp_path}/b.ipc"]
    else:
        arguments = ["--endpoint", "tcp://127.0.0.1:0", "--worker-endpoint", "tcp://[::1]:0"]
    with broker("--config", str(settings(tmp_path)), *arguments) as running:
        yield running


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Process]:
    """A broker on ipc that is quick to give lost clients up."""
    path = settings(tmp_path, closed_grace=0.1)
    with broker("--config", str(path), "--endpoint", f"ipc://{tmp_path}/b.ipc") as process:
        yield process


def test_a_whole_request(anywhere: Process) -> None:
    with Peer(anywhere.clients) as client, Peer(anywhere.workers) as worker:
        assert client.hello().max_body == wire.CLIENT_BODY_LIMIT
        assert worker.register().max_body == wire.WORKER_BODY_LIMIT
        client.submit(ONE)
        run = worker.take()
        assert client.expect(Kind.ACCEPTED).header.arg == 0
        assert run.header == Header(Kind.RUN, ONE, attempt=1)
        assert run.body == codec.pack({"prompt": "hello"})
        for seq in range(5):
            worker.send(tok(ONE, seq))
        worker.send(end(ONE, 5))
        assert [client.receive() for _ in range(6)] == [*(tok(ONE, seq) for seq in range(5)), end(ONE, 5)]
        client.send(say(Kind.ENDACK, ONE))
        assert worker.expect(Kind.ENDACK).header.attempt == 1
        assert client.status().counters == {"submitted": 1, "finished": 1}


def test_what_is_said_together_travels_together(running: Process) -> None:
    """The frames between a client with many requests and their worker are few, whatever goes through them."""
    ids = [bytes([n]) * 16 for n in range(1, wire.FRAME_MESSAGES + 1)]
    with Peer(running.clients) as client, Peer(running.workers) as worker:
        client.hello()
        worker.register(slots=len(ids))
        client.together(*(Message(Header(Kind.SUBMIT, id_), codec.pack(Submit("m")), BODY) for id_ in ids))
        assert [worker.expect(Kind.RUN).header for _ in ids] == [Header(Kind.RUN, id_, attempt=1) for id_ in ids]
        worker.together(*(tok(id_, 0) for id_ in ids))
        assert [client.expect(Kind.TOK) for _ in ids] == [tok(id_, 0) for id_ in ids]
        worker.together(*(end(id_, 1) for id_ in ids))
        assert [client.expect(Kind.END) for _ in ids] == [end(id_, 1) for id_ in ids]
        assert max(client.frames, worker.frames) < len(ids) / 2, "as many as a turn has time for share one"


def test_what_stands_before_garbage_in_a_frame_counts(running: Process) -> None:
    with Peer(running.clients) as client, Peer(running.workers) as worker:
        client.hello()
        worker.register()
        submit = Message(Header(Kind.SUBMIT, ONE), codec.pack(Submit("m")), BODY)
        client.raw(wire.to_bytes(submit) + b"garbage" + wire.to_bytes(say(Kind.CANCEL, ONE)))
        failure = codec.unpack(Failure, client.expect(Kind.ERROR).body)
        assert "a message starts with b'ga', expected b'LM'" in failure.message
        worker.send(tok(worker.take().header.request, 0))
        assert client.expect(Kind.TOK) == tok(ONE, 0)
        assert client.status().counters["strikes"] == 1


def test_two_doors_of_a_kind(tmp_path: Path) -> None:
    doors = ["--endpoint", f"ipc://{tmp_path}/b.ipc", "--endpoint", "tcp://127.0.0.1:0"]
    with broker("--config", str(settings(tmp_path)), *doors) as running:
        near, far = running.ready["endpoints"]
        with Peer(near) as first, Peer(far) as second, Peer(running.workers) as worker:
            first.hello()
            second.hello()
            worker.register()
            for client, request in ((first, ONE), (second, TWO)):
                client.submit(request)
                worker.send(tok(worker.take().header.request, 0))
                assert client.expect(Kind.TOK).header.request == request


def test_a_worker_whose_connection_breaks_is_replaced_at_once(running: Process) -> None:
    """By its silence it would be known in minutes."""
    with Peer(running.clients) as client, Peer(running.workers) as second:
        client.hello()
        first = Peer(running.workers)
        first.register("w1")
        client.submit(ONE)
        first.take()
        second.register("w2")
        first.close()
        assert second.take().header == Header(Kind.RUN, ONE, attempt=2)
        second.send(tok(ONE, 0, attempt=2))
        assert client.expect(Kind.TOK).header.attempt == 2


def test_a_worker_lost_mid_stream(running: Process) -> None:
    with Peer(running.clients) as client:
        client.hello()
        with Peer(running.workers) as worker:
            worker.register()
            client.submit(ONE)
            worker.take()
            worker.send(tok(ONE, 0, 2))
            client.expect(Kind.TOK)
        with Peer(running.workers) as second:
            second.register("w2")
            run = second.take()
            assert (run.header.attempt, run.tokens) == (2, wire.pack_tokens([0, 1]))
            second.send(tok(ONE, 2, attempt=2))
            second.send(end(ONE, 3, attempt=2))
            assert client.expect(Kind.TOK) == tok(ONE, 2, attempt=2)
            assert client.expect(Kind.END) == end(ONE, 3, attempt=2)


def test_the_last_words_of_a_worker_count(running: Process) -> None:
    """What came in before a connection closed is handled before its loss."""
    with Peer(running.clients) as client:
        client.hello()
        for n in range(20):
            request = bytes([65 + n]) * 16
            with Peer(running.workers, LINGER=1000) as worker:
                worker.register(f"w{n}")
                client.submit(request)
                worker.take()
                for seq in range(200):
                    worker.send(tok(request, seq))
                worker.send(end(request, 200))
                worker.socket.close(1000)
            assert client.expect(Kind.END).header.request == request
            client.send(say(Kind.ENDACK, request))
        counters = client.status().counters
        assert (counters["finished"], "failed" in counters) == (20, False)


def test_a_client_whose_connection_breaks_loses_its_requests_after_the_grace(running: Process) -> None:
    with Peer(running.workers) as worker:
        worker.register()
        with Peer(running.clients) as client:
            client.hello()
            client.submit(ONE)
            worker.take()
        stop = worker.expect(Kind.STOP)
        assert stop.header == Header(Kind.STOP, ONE, arg=1, attempt=1)
        worker.send(stopped(ONE))
        worker.expect(Kind.ENDACK)


def test_a_request_that_is_not_to_outlive_its_client_is_stopped_at_once(tmp_path: Path) -> None:
    path = settings(tmp_path, closed_grace=600)
    doors = ("--config", str(path), "--endpoint", f"ipc://{tmp_path}/b.ipc")
    with broker(*doors) as process, Peer(process.workers) as worker:
        worker.register()
        with Peer(process.clients) as client:
            client.hello()
            client.submit(ONE)
            client.submit(TWO, cancel_on_disconnect=True)
            assert {worker.take().header.request for _ in range(2)} == {ONE, TWO}
        stop = worker.expect(Kind.STOP)  # the other one has minutes
        assert stop.header == Header(Kind.STOP, TWO, arg=1, attempt=1)


def test_a_client_goes_on_over_a_new_connection(running: Process) -> None:
    me = wire.new_id()
    with Peer(running.workers) as worker, Peer(running.clients) as first:
        worker.register()
        first.hello(me)
        first.submit(ONE)
        worker.take()
        worker.send(tok(ONE, 0, 3))
        first.expect(Kind.TOK)
        with Peer(running.clients) as second:
            second.hello(me)
            first.close()
            worker.send(tok(ONE, 3))
            second.send(say(Kind.CREDIT, ONE, seq=100, arg=0))
            assert [second.receive(), second.receive()] == [tok(ONE, 0, 3), tok(ONE, 3)]


def test_strangers_are_asked_who_they_are(running: Process) -> None:
    with Peer(running.clients) as client, Peer(running.workers) as worker:
        client.submit(ONE)
        assert client.receive() == say(Kind.WHO)
        worker.beat()
        assert worker.receive() == say(Kind.WHO)


def test_a_client_that_does_not_read_for_a_while_loses_nothing(tmp_path: Path) -> None:
    """Its pipe fills up, the broker keeps what it cannot send, and another client never notices."""
    path = settings(tmp_path, window=8, request_output=4_000_000)
    with (
        broker("--config", str(path), "--endpoint", f"ipc://{tmp_path}/b.ipc") as running,
        Peer(running.clients, RCVHWM=1, RCVBUF=4096) as slow,
        Peer(running.clients) as quick,
        Peer(running.workers) as worker,
    ):
        slow.hello()
        quick.hello()
        worker.register()
        slow.submit(ONE)
        worker.take()
        slow.send(say(Kind.CREDIT, ONE, seq=10_000, arg=0))
        quick.submit(TWO)
        worker.take()
        for seq in range(400):
            worker.send(tok(ONE, seq, text="x" * 5_000))  # some 30 frames of 64 KiB at least: the pipe has room for 16
        worker.send(end(ONE, 400))
        worker.send(tok(TWO, 0))
        assert quick.expect(Kind.TOK).header.request == TWO
        until(lambda: quick.status().counters.get("blocked", 0) > 0, "a push met a full pipe")
        slow.expect(Kind.ACCEPTED)
        assert [slow.receive().header.seq for _ in range(401)] == [*range(401)]


def test_a_client_that_never_reads_is_cancelled(tmp_path: Path) -> None:
    path = settings(tmp_path, request_output=20_000)
    with (
        broker("--config", str(path), "--endpoint", f"ipc://{tmp_path}/b.ipc") as running,
        Peer(running.clients) as client,
        Peer(running.workers) as worker,
    ):
        client.hello()
        worker.register()
        client.submit(ONE)
        worker.take()
        for seq in range(100):
            worker.send(tok(ONE, seq, text="x" * 1000))
        assert worker.expect(Kind.STOP).header.arg == 1
        cancelled = client.expect(Kind.CANCELLED)
        assert "slow_client" in codec.unpack(Failure, cancelled.body).message


def test_the_brokers_own_sleep_costs_nobody_their_place(tmp_path: Path) -> None:
    path = settings(tmp_path, heartbeat=1.0)
    with (
        broker("--config", str(path), "--endpoint", f"ipc://{tmp_path}/b.ipc") as running,
        Peer(running.clients) as client,
        Peer(running.workers) as worker,
    ):
        client.hello()
        worker.register()
        os.kill(running.serving, signal.SIGSTOP)
        until_stopped(running.serving)
        deadline = time.monotonic() + 4.0
        until(lambda: time.monotonic() > deadline, "four heartbeats")
        os.kill(running.serving, signal.SIGCONT)
        client.send(say(Kind.PING))
        assert client.receive() == say(Kind.PONG)
        worker.beat()
        assert worker.receive() == say(Kind.PONG)
        assert client.status().counters["stalls"] == 1


def test_who_took_the_sleeping_broker_for_dead_goes_on_where_it_was(tmp_path: Path) -> None:
    path = settings(tmp_path, heartbeat=1.0)
    impatient = {"HEARTBEAT_IVL": 500, "HEARTBEAT_TIMEOUT": 2000}
    boot, instance = wire.new_id(), wire.new_id()
    with (
        broker("--config", str(path), "--endpoint", f"ipc://{tmp_path}/b.ipc") as running,
        Peer(running.clients, **impatient) as client,
        Peer(running.workers, **impatient) as worker,
    ):
        client.hello(instance)
        worker.register(boot=boot)
        client.submit(ONE)
        worker.take()
        worker.send(tok(ONE, 0))
        client.expect(Kind.TOK)
        with left(client), left(worker):
            os.kill(running.serving, signal.SIGSTOP)
            until_stopped(running.serving)
            time.sleep(3.0)  # two heartbeats and more, or it was no stall
        os.kill(running.serving, signal.SIGCONT)
        worker.register(boot=boot, held=1)
        worker.send(Message(Header(Kind.HELD, ONE, 0, 1, 1), codec.pack(Held(instance, "m"))))
        assert worker.expect(Kind.REPLAY).header.seq == 1
        client.hello(instance)
        assert client.status().counters == {"submitted": 1, "stalls": 1}


@contextmanager
def left(peer: Peer) -> Iterator[None]:
    """Until the end of the block, and longer if need be, a peer takes its broker for dead and leaves it."""
    with peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        yield
        assert monitor.poll(int(1000 * PATIENCE))
        peer.socket.disable_monitor()


def until_stopped(process: int) -> None:
    until(lambda: Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "stopped")


# --- what should not be sent


def test_an_oversized_message_cuts_its_sender_off_and_nobody_else(running: Process) -> None:
    with Peer(running.clients) as client, Peer(running.clients) as big, Peer(running.workers) as worker:
        client.hello()
        worker.register()
        big.hello()
        limit = wire.message_limit(wire.CLIENT_BODY_LIMIT)
        big.send(Message(Header(Kind.SUBMIT, ONE), codec.pack(Submit("m")), bytes(limit)))
        until(lambda: client.status().clients == 1, "the sender of too much is gone")
        client.submit(TWO)
        assert worker.take().header.request == TWO


def test_the_largest_allowed_message_passes(running: Process) -> None:
    with Peer(running.clients) as client, Peer(running.workers) as worker:
        client.hello()
        worker.register()
        body = os.urandom(wire.CLIENT_BODY_LIMIT)
        client.send(Message(Header(Kind.SUBMIT, ONE), codec.pack(Submit("m")), body))
        assert worker.take().body == body


def test_bytes_that_are_no_zeromq(running: Process) -> None:
    path = running.clients.removeprefix("ipc://")
    for junk in (
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        os.urandom(300),
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" * 8,
    ):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            raw.sendall(junk)
    with Peer(running.clients) as client:
        client.hello()
        assert client.alive()


def zmtp_frame(body: bytes, *, more: bool = False, command: bool = False, long: bool = False) -> bytes:
    flags = more | (2 if long else 0) | (4 if command else 0)
    size = len(body).to_bytes(8) if long else bytes([len(body)])
    return bytes([flags]) + size + body


READY = zmtp_frame(b"\x05READY" + b"\x0bSocket-Type" + (6).to_bytes(4) + b"DEALER", command=True)
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)

PIECES = st.one_of(
    st.binary(max_size=120),
    st.builds(zmtp_frame, st.binary(max_size=80), more=st.booleans(), command=st.booleans(), long=st.booleans()),
    st.sampled_from(
        [
            GREETING,
            READY,
            zmtp_frame(b"\x04PING" + b"\x00\x01" + b"ctx", command=True),
            zmtp_frame(b"\x05ERROR\x03bad", command=True),
            b"\x02" + (2**63 - 1).to_bytes(8),  # a frame longer than anything
            b"\x02" + (2**64 - 1).to_bytes(8),
            zmtp_frame(PING, more=True),
            zmtp_frame(PING),
        ]
    ),
)


@pytest.fixture(scope="module")
def sturdy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Peer, Peer]]:
    """One broker for many examples, with a client and a worker that must not notice any of them."""
    folder = tmp_path_factory.mktemp("sturdy")
    path = settings(folder)
    with (
        broker("--config", str(path), "--endpoint", f"ipc://{folder}/b.ipc") as running,
        Peer(running.clients) as client,
        Peer(running.workers) as worker,
    ):
        client.hello()
        worker.register()
        yield running, client, worker


HEADERS = st.builds(
    Header,
    st.sampled_from(list(Kind)),
    st.sampled_from([wire.NO_ID, ONE]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.just(1),
)
PARTS = st.binary(max_size=60) | st.builds(codec.pack, st.dictionaries(st.text(max_size=8), st.integers(0, 9)))
MESSAGES = st.builds(
    lambda *parts: wire.to_bytes(Message(*parts)), HEADERS, PARTS, PARTS, st.sampled_from([b"", bytes(8)])
)
FRAMES = st.binary(max_size=60) | MESSAGES
JUNK = st.lists(FRAMES, min_size=1, max_size=1) | st.lists(FRAMES, min_size=2, max_size=8)


def served(client: Peer, worker: Peer) -> None:
    """A request goes through, from its SUBMIT to its end."""
    request = wire.new_id()
    client.submit(request)
    assert worker.take().header.request == request
    worker.send(end(request, 0))
    client.expect(Kind.END)
    client.send(say(Kind.ENDACK, request))
    worker.expect(Kind.ENDACK)


@bounds(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JUNK, min_size=1, max_size=5), st.booleans())
def test_garbage_is_the_business_of_its_sender_alone(
    sturdy: tuple[Process, Peer, Peer], messages: list[list[bytes]], at_workers_door: bool
) -> None:
    running, client, worker = sturdy
    with Peer(running.workers if at_workers_door else running.clients) as stranger:
        for frames in messages:
            stranger.raw(*frames)
        served(client, worker)
    assert "internal_errors" not in client.status().counters


def test_no_frame_of_a_message_that_has_several_is_taken_for_the_beginning_of_another(running: Process) -> None:
    with Peer(running.clients) as client, Peer(running.clients) as other:
        client.hello()
        other.hello()
        other.raw(PING, PING, PING, PING)
        error = codec.unpack(Failure, other.expect(Kind.ERROR).body)
        assert error.message == "PING came in several frames, expected one"
        assert other.alive()
        assert client.status().counters == {"strikes": 1}


def test_three_strikes(running: Process) -> None:
    with Peer(running.clients) as client:
        for _ in range(3):
            client.raw(b"junk")
            assert client.receive().kind is Kind.ERROR
        client.raw(b"junk")
        client.send(Message(Header(Kind.HELLO), route=b""))
        with Peer(running.clients) as other:
            other.hello()
            assert other.status().counters["strikes"] == 3
        assert not client.socket.poll(0)


def shake_hands(raw: socket.socket) -> None:
    """The handshake of ZMTP. Whatever comes before the broker's READY is no message yet: it would cut us off."""
    raw.settimeout(10)
    raw.sendall(GREETING + READY)
    heard = b""
    while b"Socket-Type" not in heard:
        heard += hear(raw)


def hear(raw: socket.socket) -> bytes:
    """What comes next; the end of the connection is none of it."""
    heard = raw.recv(4096)
    assert heard, "the broker closed the connection"
    return heard


@bounds(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=8), st.sampled_from([b"", GREETING, GREETING + READY, None]), st.booleans())
def test_raw_bytes_of_a_plain_socket_are_nobody_elses_business(
    sturdy: tuple[Process, Peer, Peer], pieces: list[bytes], opening: bytes | None, at_workers_door: bool
) -> None:
    """No library between us and the broker: greetings, commands and frames of ZMTP, whole, broken and in any order."""
    running, client, worker = sturdy
    endpoint = running.workers if at_workers_door else running.clients
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(endpoint.removeprefix("ipc://"))
        try:
            if opening is None:
                shake_hands(raw)
            for piece in (opening or b"", *pieces):
                raw.sendall(piece)
        except OSError:
            pass  # it was cut off, as it should be
        served(client, worker)
    assert "internal_errors" not in client.status().counters


def test_a_plain_socket_that_speaks_zmtp_is_heard(running: Process) -> None:
    """The handshake of the fuzz above is a real one: behind it, a header of ours is understood."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(running.clients.removeprefix("ipc://"))
        shake_hands(raw)
        raw.sendall(zmtp_frame(PING))
        heard = b""
        while wire.to_bytes(say(Kind.WHO)) not in heard:
            heard += hear(raw)
