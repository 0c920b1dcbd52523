"""Listening sockets that outlive the process that serves them, so that nobody sees a refused connection meanwhile."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack

from loopmux.claims import BusyError, Claim
from loopmux.endpoints import check_local, ipc_path
from loopmux.errors import ConfigError

_BACKLOG = 1024
"""Connections that wait while nobody serves the socket; a thousand clients reconnect at once after a restart."""


class SocketFile:
    """The file by which others find an ipc socket that is listened on, as long as nobody removes it; tcp has none."""

    def __init__(self, endpoint: str) -> None:
        self._path = ipc_path(endpoint)
        self._there = self._found()

    def _found(self) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._path) if self._path else None
        except OSError:
            return None
        return (status.st_dev, status.st_ino) if status else None

    @property
    def gone(self) -> bool:
        """Whether somebody has removed it, perhaps with its folder, or put another one in its place."""
        return self._path is not None and (self._there is None or self._found() != self._there)


class Listening:
    """Listens on an endpoint for a child process to serve; connections wait until there is one.

    Attributes:
        endpoint: as it is known to those who connect (with the port that the system chose for port 0).
        file: by which they find it.

    Raises:
        BusyError: somebody else listens there.
        ConfigError: it cannot be listened on here.
    """

    def __init__(self, endpoint: str, *, keyed: bool = False) -> None:
        """``keyed`` where whoever serves it lets in no one without a key: it may then be reached by other hosts."""
        if not keyed:
            check_local(endpoint)
        path = ipc_path(endpoint)
        self._keyed = keyed
        self._claim = None if path is None else Claim(path)
        try:
            self.socket = _tcp(endpoint) if path is None else _unix(str(path))
        except OSError as error:
            self._release()
            if error.errno == errno.EADDRINUSE:
                raise BusyError(f"{endpoint} is taken by another program: stop it or choose another port") from error
            raise ConfigError(f"cannot listen on {endpoint}: {error.strerror}") from error
        self.socket.listen(_BACKLOG)
        self.socket.setblocking(False)  # else who is woken for a connection that is gone already would hang
        self.endpoint = endpoint_of(self.socket)
        self.file = SocketFile(self.endpoint)

    def fileno(self) -> int:
        """The descriptor, for a child to inherit."""
        return self.socket.fileno()

    def close(self) -> None:
        """Stop listening; the socket's file goes too."""
        self.socket.close()
        self._release()

    def _fresh(self) -> Listening:
        self._release()
        return Listening(self.endpoint, keyed=self._keyed)

    def _become(self, fresh: Listening) -> None:
        self.socket.close()
        self.socket, self.file, self._claim = fresh.socket, fresh.file, fresh._claim

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None


def renew(those: Iterable[Listening]) -> None:
    """Listen anew where the file is gone, everywhere or nowhere; who is connected stays so.

    Raises:
        BusyError, ConfigError: as when one is made. Then the former sockets stay, which nobody finds any more.
    """
    gone = [one for one in those if one.file.gone]
    with ExitStack() as undone:
        fresh: list[Listening] = []
        for one in gone:
            fresh.append(one._fresh())
            undone.callback(fresh[-1].close)
        undone.pop_all()
    for one, new in zip(gone, fresh, strict=True):
        one._become(new)


def _unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o077)
    try:
        made.bind(path)
    except OSError:
        made.close()
        raise
    finally:
        os.umask(before)
    return made


def _tcp(endpoint: str) -> socket.socket:
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def endpoint_of(listening: socket.socket) -> str:
    """The endpoint that a listening socket is bound to."""
    name = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        # A name without a file is bytes, and begins with a zero.
        return f"ipc://{os.fsdecode(name).replace(chr(0), '@')}"
    host = f"[{name[0]}]" if listening.family == socket.AF_INET6 else name[0]
    return f"tcp://{host}:{name[1]}"
