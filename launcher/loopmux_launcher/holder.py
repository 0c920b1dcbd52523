"""Who runs the stack of an endpoint: held by ``up`` for as long as it lives, asked by ``down`` and by a second ``up``.

It is a Unix socket without a file (Linux's abstract namespace): the kernel gives it to one process, tells others who
that is, and takes it back however the process ends, so no stale file has to be told from a living one.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import time

from loopmux import endpoints
from loopmux.errors import LoopmuxError

_CREDENTIALS = struct.Struct("3i")


class Held(LoopmuxError):
    """Another ``up`` runs the stack of this endpoint."""

    code = "busy"


class Holder:
    """This process's claim on an endpoint.

    Raises:
        Held: another process has it.
    """

    def __init__(self, endpoint: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(_address(endpoint))
            self._socket.listen()
        except OSError:
            self._socket.close()
            with Watch(endpoint) as watch:
                who = f"process {watch.pid}" if watch.pid else "a process that has just ended"
            raise Held(
                f"{endpoint} is held by {who} (`loopmux up`): use that one, stop it with "
                f"`loopmux down --endpoint {endpoint}`, or choose another --endpoint"
            ) from None

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *failure: object) -> None:
        self._socket.close()


class Watch:
    """A look at the holder of an endpoint; ``pid`` is None when there is none."""

    def __init__(self, endpoint: str) -> None:
        self.pid: int | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(_address(endpoint))
        except OSError:
            return
        size = _CREDENTIALS.size
        self.pid, uid, _ = _CREDENTIALS.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if uid != os.getuid():
            self._socket.close()
            raise Held(f"{endpoint} is held by process {self.pid} of user {uid}, who is not you")

    def wait(self, limit: float) -> bool:
        """Whether the holder is gone within ``limit`` seconds: its end closes the connection."""
        end = time.monotonic() + limit
        while self.pid is not None:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                if not self._socket.recv(1):
                    return True
            except TimeoutError:
                return False
            except OSError:
                return True
        return True

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *failure: object) -> None:
        self._socket.close()


def _address(endpoint: str) -> str:
    path = endpoints.ipc_path(endpoint)
    exact = str(path.absolute()) if path else endpoint
    return f"\0loopmux-up-{os.getuid()}-{hashlib.sha256(exact.encode()).hexdigest()[:32]}"
