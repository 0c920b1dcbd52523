"""What a client's socket takes where the line does not."""

from __future__ import annotations

import contextlib
from pathlib import Path

import zmq

from brokerwire import until
from loopmux.events import Connected
from loopmux.link import Link
from loopmux.wire import Header, Kind, Message

SUBMIT = Message(Header(Kind.SUBMIT, b"1" * 16), body=bytes(256 * 1024))


def test_what_is_said_again_and_again_over_a_slow_line_is_sent_a_few_times(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as broker, contextlib.closing(Link(endpoint)) as link:
        broker.setsockopt(zmq.RCVHWM, 1)
        broker.setsockopt(zmq.LINGER, 0)
        broker.bind(endpoint)
        until(lambda: isinstance(link.news(), Connected), "a connection")
        for _ in range(200):
            link.send(SUBMIT)
            link.flush()
        assert link.blocked
        came: list[object] = []

        def sent() -> bool:
            link.flush()
            while broker.poll(100):
                came.append(broker.recv_multipart())
            return not link.blocked

        until(sent, "it is sent")
        assert 0 < len(came) < 50
