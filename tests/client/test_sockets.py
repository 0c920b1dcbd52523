"""What a socket to the broker does when its connection goes."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
import zmq

from brokerwire import until
from loopmux import Client
from loopmux.cadence import HEARTBEAT, SILENT_HEARTBEATS
from loopmux.errors import ConnectionLostError
from loopmux.sockets import COMMON, Dealer, new_context

FLOOD = """
import sys
import zmq

router = zmq.Context().socket(zmq.ROUTER)
router.setsockopt(zmq.ROUTER_MANDATORY, 1)
router.bind(sys.argv[1])
peer, _ = router.recv_multipart()
while True:
    router.send_multipart([peer, b"h" * 34, b"b" * 20, b"t" * 4])
"""

READER = """
import subprocess
import sys
import threading
import time

import zmq
from loopmux.sockets import Dealer

endpoint, flood = sys.argv[1:]
dealer = Dealer(zmq.Context(), 1 << 20)
dealer.connect(endpoint)
for _ in range(20):
    broker = subprocess.Popen([sys.executable, "-c", flood, endpoint])
    while not dealer.send([b"here"]):
        dealer.monitor.poll(100)
        dealer.news()
    while not list(dealer.arrived(1)):
        time.sleep(0.001)
    threading.Timer(0.02, broker.kill).start()
    while dealer.connected:
        for data in dealer.arrived(10_000):
            assert data[:1] in b"hbt"
        time.sleep(0.001)
        dealer.news()
    broker.wait()
print("unharmed")
"""


def test_a_broker_that_is_killed_in_mid_message_takes_no_reader_along(tmp_path: Path) -> None:
    """libzmq may end the reader's process, so it is one of its own here."""
    command = [sys.executable, "-c", READER, f"ipc://{tmp_path}/s", FLOOD]
    reader = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert (reader.stdout, reader.returncode) == ("unharmed\n", 0), reader.stderr


@pytest.fixture
def context() -> zmq.Context[zmq.Socket[bytes]]:
    with zmq.Context() as context:
        yield context


def test_nothing_is_taken_without_a_connection(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    dealer = Dealer(context, 1 << 20)
    dealer.connect(endpoint)
    assert dealer.send([b"to nobody"]) == 0
    for _ in range(2):
        router = context.socket(zmq.ROUTER)
        router.bind(endpoint)
        assert dealer.monitor.poll(30_000)
        assert dealer.news() is True
        assert dealer.send([b"to ", b"the broker"]) == 2
        assert router.recv_multipart()[1:] == [b"to the broker"]
        router.close(0)
        assert dealer.monitor.poll(30_000)
        assert dealer.news() is False
        assert dealer.send([b"to nobody"]) == 0
    assert dealer.news() is None
    dealer.close()


def test_without_descriptors_for_it_nothing_is_opened_and_later_it_is() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(1)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, before[1]))
    try:
        with pytest.raises(
            ConnectionLostError, match=r"cannot connect to the broker at ipc:///nowhere: .*Too many open files; close"
        ) as told:
            Client("ipc:///nowhere").status()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert told.value.retryable
    new_context("ipc:///nowhere").term()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_keyboard_interrupt_in_the_search_for_descriptors_leaves_none_open() -> None:
    def interrupted(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0 and event == "line":
            raise KeyboardInterrupt
        return interrupted

    def opened() -> bool:
        sys.settrace(lambda frame, *_: interrupted if frame.f_code is new_context.__code__ else None)
        try:
            new_context("ipc:///nowhere").term()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True

    process = psutil.Process()
    before, begun, line, left = sys.gettrace(), process.num_fds(), 0, 0
    while not opened():
        assert process.num_fds() == begun
        left = line = line + 1
    assert line > 10


def test_a_connection_that_is_not_answered_is_tried_again_within_seconds(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    """The system would ask for two minutes by itself, at ever longer intervals: a line that was dead is found late."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        port = full.getsockname()[1]
        tries: set[int] = set()

        def tried_again() -> bool:
            asking = [one for one in psutil.Process().net_connections("tcp4") if one.status == psutil.CONN_SYN_SENT]
            tries.update(one.laddr.port for one in asking if one.raddr.port == port)
            return len(tries) > 1

        with contextlib.closing(Dealer(context, 1 << 20)) as dealer:
            dealer.connect(f"tcp://127.0.0.1:{port}")
            until(tried_again, "another try")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_who_is_cut_off_again_and_again_asks_ever_less_often_and_as_soon_as_ever_once_let_in(
    context: zmq.Context[zmq.Socket[bytes]], host: str
) -> None:
    """A proxy whose broker is down takes every connection, and closes it."""
    with contextlib.closing(Dealer(context, 1 << 20)) as dealer:
        with socket.create_server(("127.0.0.1", 0)) as proxy:
            proxy.settimeout(30)
            port = proxy.getsockname()[1]
            dealer.connect(f"tcp://{host}:{port}")
            intervals = [dealer.socket.getsockopt(zmq.RECONNECT_IVL)]
            while intervals[-1] < 1000:
                proxy.accept()[0].close()
                while dealer.news() is not None:
                    intervals.append(dealer.socket.getsockopt(zmq.RECONNECT_IVL))
        assert list(dict.fromkeys(intervals)) == [10, 100, 1000]
        for _ in range(2):
            router = context.socket(zmq.ROUTER)
            router.bind(f"tcp://127.0.0.1:{port}")
            until(lambda: dealer.news() is True, "a connection")
            assert dealer.send([b"to the broker"]) == 1
            assert router.recv_multipart()[1:] == [b"to the broker"]
            router.unbind(f"tcp://127.0.0.1:{port}")
            router.close(0)
            until(lambda: dealer.news() is False, "its end")
            assert dealer.socket.getsockopt(zmq.RECONNECT_IVL) == 10


def test_a_line_that_goes_dead_is_left_by_the_time_its_ends_count_as_lost() -> None:
    """Within one question of the last word the next one is asked, and the answer has its time from then on."""
    assert COMMON[zmq.HEARTBEAT_IVL] + COMMON[zmq.HEARTBEAT_TIMEOUT] <= 1000 * HEARTBEAT * SILENT_HEARTBEATS
