"""Bad neighbours, each a process of its own: ``python -m chaos.pests KIND CLIENT_ENDPOINT WORKER_ENDPOINT``.

They go on until they are killed, or their standard input ends because whoever started them is gone.

- ``stuck``: a client that grants endless credit, says that it is there, and never reads;
- ``flood``: clients that send what is allowed as fast as they can;
- ``garbage``: messages that are none, at both sockets, and bytes that are not even ZMTP.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from brokerwire import Peer
from chaos.house import FAST
from loopmux import codec, wire
from loopmux.endpoints import ipc_path
from loopmux.messages import SessionHint
from loopmux.wire import Header, Kind, Message
from loopmux_broker.events import say

ENDLESS = 2**31 - 1
_BODY = codec.pack({"prompt": "x", "max_new_tokens": ENDLESS, "ignore_eos": True})
_HUGE = bytes(wire.message_limit(wire.CLIENT_BODY_LIMIT))


def stuck(clients: str, _workers: str) -> None:
    """Eight streams at a time that are never read; new ones when the old must have been given up."""
    peer = Peer(clients, RCVHWM=1)
    peer.hello()
    while True:
        for _ in range(8):
            request = wire.new_id()
            peer.send(_submit(request, FAST))
            peer.send(say(Kind.CREDIT, request, seq=2**32 - 1, arg=0))
        for _ in range(20):
            peer.send(say(Kind.PING))
            time.sleep(0.25)


def flood(clients: str, workers: str) -> None:
    """Two clients and a launcher that talk without a pause; their answers are read, as far as that is quick."""
    peers = [Peer(clients), Peer(clients), Peer(workers)]
    for peer in peers[:2]:
        peer.hello()
    while True:
        for peer in peers[:2]:
            request = wire.new_id()
            messages = (
                say(Kind.PING),
                say(Kind.STATUS, request),
                say(Kind.CANCEL, request),
                say(Kind.CREDIT, wire.new_id(), seq=9, arg=3),
                _submit(request, "nobody has this"),
                Message(Header(Kind.SESSION), route=codec.pack(SessionHint("s", "done"))),
            )
            for message in messages:
                _try(peer.send, message)
            _try(peer.together, *messages * (wire.FRAME_MESSAGES // len(messages)))
        _try(peers[2].send, say(Kind.RUNACK, wire.new_id(), attempt=1))
        for peer in peers:
            while peer.socket.poll(0):
                peer.socket.recv()


def garbage(clients: str, workers: str) -> None:
    """A new connection for every few messages: whoever sends garbage is soon not listened to."""
    dice = random.Random(7)
    while True:
        endpoint = dice.choice((clients, workers))
        with Peer(endpoint, RECONNECT_IVL=10) as peer:
            if endpoint == clients and dice.random() < 0.5:
                peer.hello()
            for _ in range(4):
                _try(peer.raw, *_rubbish(dice))
        _raw_bytes(endpoint, dice)
        time.sleep(0.002)


def _rubbish(dice: random.Random) -> list[bytes]:
    header = Header(dice.choice(list(Kind)), wire.new_id(), dice.getrandbits(32), dice.getrandbits(32))
    deep = b"\x81\xa1a" * 1000 + b"\x01"
    message = wire.to_bytes(
        dice.choice(
            [
                Message(header),
                Message(header, deep),
                Message(header, deep, deep, b"1234"),
                Message(header, msgpack.packb({"model": ["x"] * 60, "versions": "a", "role": 5})),
                Message(header, dice.randbytes(200), dice.randbytes(200)),
                Message(header, b"", b"", bytes(4)),
                Message(header, b"\xc1" * 100, _HUGE),
            ]
        )
    )
    return dice.choice(
        [
            [message],
            [message[: dice.randrange(100)]],
            [message, message],
            [message * 3],
            [message + dice.randbytes(dice.randrange(64))],
            [wire.to_bytes(say(Kind.CANCEL, wire.new_id())) * 20_000],
            [dice.randbytes(dice.randrange(64)) for _ in range(dice.randrange(1, 6))],
            [dice.randbytes(wire.HEADER_SIZE)],
            [b"LM" + dice.randbytes(32), b"x" * 5_000],
            [b""] * 9,
        ]
    )


def _raw_bytes(endpoint: str, dice: random.Random) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(54, b"\0") + bytes(1)
    cut = greeting[: dice.randrange(len(greeting))]
    talk = dice.choice(
        [dice.randbytes(dice.randrange(300)), cut, greeting + dice.randbytes(100), greeting + b"\x04" * 9]
    )
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(0.2)
        try:
            raw.connect(str(ipc_path(endpoint)))
            raw.sendall(talk)
        except OSError:
            pass  # refused or cut off: that is what it is for


def _submit(request: bytes, model: str) -> Message:
    return Message(Header(Kind.SUBMIT, request), codec.pack({"model": model}), _BODY)


def _try(send: Callable[..., None], *what: Any) -> None:
    try:
        send(*what)
    except zmq.ZMQError:
        pass  # its pipe is full, or it is cut off: a pest goes on


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _rise_again() -> None:
    """Go on in a child, and in another one when libzmq has ended that.

    It does so now and then where a connection is cut off behind some frames of a message ("Resource temporarily
    unavailable", session_base.cpp). Messages of ours travel in frames of their own; only pests send more.
    """
    while child := os.fork():
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended != -signal.SIGABRT:
            sys.exit(ended)


if __name__ == "__main__":
    _rise_again()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    {"stuck": stuck, "flood": flood, "garbage": garbage}[sys.argv[1]](sys.argv[2], sys.argv[3])
