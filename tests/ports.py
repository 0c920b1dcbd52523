"""Ports for programs that are told theirs by number."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved() -> Iterator[int]:
    """A port of this host that the system gives to nobody else; who asks for it by number, as servers do, has it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))  # and does not listen: two may have a port as long as only one of them does
        yield held.getsockname()[1]
