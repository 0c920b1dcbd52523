"""Whose connection a closed one was: descriptors are used again, and messages are read late."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zmq

from brokerwire import PATIENCE, Peer, until
from loopmux import codec, wire
from loopmux.listening import Listening
from loopmux.messages import Hello
from loopmux.wire import Header, Kind, Message
from loopmux_broker.doors import Descriptors, Door, Side
from loopmux_broker.events import FramesSent, say

LAST = 2**32 - 1
MANY = 900
"""Messages, all of which a door takes in before anybody reads them."""


def peer(number: int) -> bytes:
    """A peer whose connection was the so-and-so many-th of door 3."""
    return b"\0" + number.to_bytes(4) + b"\3"


OLD, NEW = peer(7), peer(8)


def test_who_closes_is_who_introduced_itself() -> None:
    descriptors = Descriptors()
    assert descriptors.introduced(5, OLD) is None
    assert descriptors.introduced(5, OLD) is None  # it says so again
    assert descriptors.introduced(6, NEW) is None
    assert descriptors.closed(5) == OLD
    assert descriptors.closed(5) is None


def test_what_is_read_late_does_not_take_a_descriptor_from_its_next_user() -> None:
    descriptors = Descriptors()
    descriptors.introduced(5, NEW)
    assert descriptors.introduced(5, OLD) == OLD, "its connection is closed, or the other could not have its descriptor"
    assert descriptors.closed(5) == NEW


def test_the_next_user_of_a_descriptor_shows_that_the_one_before_is_gone() -> None:
    descriptors = Descriptors()
    descriptors.introduced(5, OLD)
    assert descriptors.introduced(5, NEW) == OLD
    assert descriptors.closed(5) == NEW


@pytest.mark.parametrize("number", [LAST, 2**31, 0])
def test_connections_are_counted_around_the_end_of_the_numbers(number: int) -> None:
    descriptors = Descriptors()
    descriptors.introduced(5, peer((number + 1) % 2**32))
    assert descriptors.introduced(5, peer(number)) == peer(number)


def test_a_peer_with_a_routing_id_of_its_own_is_gone_when_another_one_has_its_descriptor() -> None:
    descriptors = Descriptors()
    own = b"mine\3"
    descriptors.introduced(5, own)
    assert descriptors.introduced(5, OLD) == own
    assert descriptors.closed(5) == OLD


# --- what libzmq does


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = Door(context, 3, Side.CLIENTS, 16)
    listening = Listening(f"ipc://{tmp_path}/door.ipc")
    door.serve(listening.endpoint, listening.fileno())
    yield door
    door.close()
    context.term()
    listening.close()


def heard(door: Door) -> bytes:
    assert door.socket.poll(1000 * PATIENCE)
    [received] = door.receive()
    return received.peer


def disconnect(socket: zmq.Socket[bytes], door: Door) -> None:
    """Close a connection. The news of it are there, unread."""
    door.watch()  # that it is open was news, too
    socket.disconnect(door.endpoint)

    def heard_of() -> bool:
        socket.getsockopt(zmq.EVENTS)  # ØMQ closes the connection in its own time, with the help of such calls
        return bool(door.monitor.poll(0))

    until(heard_of, "the news that it is closed")


@pytest.mark.parametrize("version", [1, 2])
def test_a_peer_that_speaks_an_old_zmtp_is_heard_though_its_descriptor_is_not_known(door: Door, version: int) -> None:
    hello = wire.to_bytes(Message(Header(Kind.HELLO), route=codec.pack(Hello(wire.VERSIONS, b"i" * 16))))
    length = len(hello)
    said = {
        1: b"\x01\x00" + bytes([length + 1, 0]) + hello,  # an empty identity, a message
        2: b"\xff" + bytes(8) + b"\x7f\x01\x05" + b"\x00\x00" + bytes([0, length]) + hello,  # signature, DEALER
    }
    with socket.socket(socket.AF_UNIX) as old:
        old.connect(door.endpoint.removeprefix("ipc://"))
        old.sendall(said[version])
        assert heard(door)


def test_routing_ids_tell_who_connected_later(door: Door) -> None:
    peers = []
    for _ in range(5):
        with Peer(door.endpoint) as client:
            client.send(say(Kind.PING))
            peers.append(heard(door))
    numbers = [int.from_bytes(peer[1:5]) for peer in peers]
    assert {(b - a) % 2**32 for a, b in pairwise(numbers)} == {1}
    assert {(len(peer), peer[0], peer[-1]) for peer in peers} == {(6, 0, 3)}


def test_a_connection_to_a_host_that_is_gone_is_closed_within_a_minute() -> None:
    """The system does it, to which nobody can say what the time is."""
    with zmq.Context() as context, contextlib.closing(Listening("tcp://127.0.0.1:0")) as listening:
        door = Door(context, 3, Side.CLIENTS, 16)
        door.serve(listening.endpoint, listening.fileno())
        with contextlib.closing(door), Peer(door.endpoint) as client:
            client.send(say(Kind.PING))
            assert door.socket.poll(1000 * PATIENCE)
            door.socket.recv()
            descriptor = int(door.socket.recv(copy=False).get(zmq.SRCFD))
            with socket.socket(fileno=os.dup(descriptor)) as there:
                names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
                idle, interval, count, unacknowledged = (there.getsockopt(socket.IPPROTO_TCP, name) for name in names)
                assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert idle + count * interval <= 60
    assert 0 < unacknowledged <= 60_000


def test_a_message_of_very_many_frames_leaves_others_their_turns(door: Door) -> None:
    with Peer(door.endpoint) as client:
        client.raw(*[b"x"] * 10_000)
        client.send(say(Kind.PING))
        assert door.socket.poll(1000 * PATIENCE)
        turns = 0
        while not (received := door.receive()):
            assert door.amid is not None
            turns += 1
        assert turns > 100
        peer = received[0].peer
        assert received == [FramesSent(peer, b"x")]
        assert heard(door) == peer


@pytest.fixture
def dense() -> Iterator[None]:
    """Descriptors without a gap, so that what is opened next gets what was closed last."""
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    fillers = [os.dup(0)]
    while fillers[-1] < highest:
        fillers.append(os.dup(0))
    yield
    for filler in fillers:
        os.close(filler)


def test_the_late_word_of_a_closed_connection(door: Door, request: pytest.FixtureRequest) -> None:
    """The next connection has its descriptor, and was heard before it."""
    hello = wire.to_bytes(Message(Header(Kind.HELLO), codec.pack(Hello(wire.VERSIONS, wire.new_id()))))
    ping = wire.to_bytes(say(Kind.PING))
    with zmq.Context() as context, context.socket(zmq.DEALER) as old, context.socket(zmq.DEALER) as new:
        request.getfixturevalue("dense")
        old.connect(door.endpoint)
        old.send(ping)
        first = heard(door)
        for _ in range(MANY):
            old.send(ping)
        old.send(hello)
        disconnect(old, door)
        new.connect(door.endpoint)
        new.send(hello)
        heard_before = 0
        while (second := heard(door)) == first:
            heard_before += 1
            time.sleep(0.01)  # from now and then on there is something of both, who are heard in turns
        assert door.lost == []
        assert {heard(door) for _ in range(MANY - heard_before)} == {first}
        assert door.lost == []
        assert heard(door) == first
        assert door.lost == [first]
        door.lost.clear()
        disconnect(new, door)
        door.watch()
        assert door.lost == [second]


KILLED = """
import sys
import time

import zmq

from loopmux.listening import Listening
from loopmux.sockets import COMMON
from loopmux_broker.doors import Door, Side

COMMON[zmq.HEARTBEAT_IVL] = 100
door = Door(zmq.Context(), 0, Side.CLIENTS, 16)
listening = Listening(sys.argv[1])
door.serve(listening.endpoint, listening.fileno())
with zmq.Context() as context, context.socket(zmq.DEALER) as flood:
    flood.setsockopt(zmq.LINGER, 0)
    flood.setsockopt(zmq.SNDTIMEO, 200)
    flood.connect(sys.argv[1])
    try:
        while True:
            flood.send(bytes(1000))
    except zmq.Again:
        pass  # nothing more is read from it
time.sleep(0.4)
while door.receive():
    pass
print("unharmed")
"""


GUESSED = """
import ctypes
import sys

import zmq

from loopmux.listening import Listening
from loopmux_broker.doors import Door, Side

libc = ctypes.CDLL(None)
libc.srand(1)
guesses = [libc.rand() for _ in range(40)]
libc.srand(1)
door = Door(zmq.Context(), 0, Side.CLIENTS, 16)
listening = Listening(sys.argv[1])
door.serve(listening.endpoint, listening.fileno())
stay = []


def come(own=b""):
    peer = context.socket(zmq.DEALER)
    stay.append(peer)
    if own:
        peer.setsockopt(zmq.ROUTING_ID, own)
    peer.connect(sys.argv[1])
    peer.send(b"")
    door.socket.poll(10_000)
    door.receive()


with zmq.Context() as context:
    for low, high in zip(guesses, guesses[1:]):
        come(bytes(1) + ((low | high << 31) + 60 & 0xFFFFFFFF).to_bytes(4))
    for _ in range(100):
        come()
    print("unharmed")
    context.destroy(0)
"""


def test_nobody_guesses_the_routing_id_of_a_connection_to_come(tmp_path: Path) -> None:
    """A peer that brings it ends the process, so it is one of its own here."""
    command = [sys.executable, "-c", GUESSED, f"ipc://{tmp_path}/door.ipc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("unharmed\n", 0), done.stderr


def test_who_brings_the_routing_id_of_another_one_takes_nothing_over(door: Door) -> None:
    with Peer(door.endpoint) as client, zmq.Context() as context, context.socket(zmq.DEALER) as thief:
        client.send(say(Kind.PING))
        peer = heard(door)
        thief.setsockopt(zmq.ROUTING_ID, peer[:-1])
        thief.connect(door.endpoint)
        thief.send(wire.to_bytes(say(Kind.PING)))
        assert not door.socket.poll(200)
        assert door.send(peer, [wire.to_bytes(say(Kind.WHO))]) == 1
        assert client.receive().kind is Kind.WHO
        assert not thief.poll(0)
        thief.close(0)


def test_a_flood_that_is_killed_takes_no_broker_along(tmp_path: Path) -> None:
    """libzmq may end the process, so it is one of its own here."""
    command = [sys.executable, "-c", KILLED, f"ipc://{tmp_path}/door.ipc"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("unharmed\n", 0), done.stderr
