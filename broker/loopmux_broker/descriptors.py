"""How many connections there may be. libzmq ends its process where it cannot have a descriptor for one more.

So connections are closed again before that: of clients first, so that workers and administrators still come in.
"""

from __future__ import annotations

import os
import resource
import socket

_MOST = 65_536
"""Enough for anybody, and what the unit for systemd says; some hosts allow a billion."""
_RESERVE, _SHARE = 2048, 4
"""Descriptors that are kept free for those that libzmq accepts until this process hears of it, at most that share:
libzmq waits when so many are to be heard of (the pipe of a door's monitor holds 2 000)."""


def allow() -> None:
    """Let this process, and what it forks, open as many descriptors as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most(*, clients: bool) -> int:
    """The first number of a descriptor that is too high for a connection: the system gives out the lowest free one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST if soft == resource.RLIM_INFINITY else soft
    reserve = min(_RESERVE, limit // _SHARE)
    return limit - 2 * reserve if clients else limit - reserve


def turn_away(descriptor: int) -> None:
    """Have a connection closed; the descriptor is libzmq's, which notices."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # its other end was faster; or there is no descriptor to do it with, and libzmq finds none either
        return
