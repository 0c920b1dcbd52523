"""Listening sockets that were handed to this process, by systemd or by its launcher.

They stay open while the broker is started again: who connects meanwhile waits in the backlog.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loopmux.claims import Claim
from loopmux.endpoints import ipc_path
from loopmux.errors import ConfigError, LoopmuxError
from loopmux.listening import endpoint_of
from loopmux_broker.doors import Side

_FIRST = 3
"""The first descriptor that systemd hands over (SD_LISTEN_FDS_START)."""
_EXPECTED = "expected clients=N or workers=N with the number of an open descriptor"


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket: who connects to it, and where."""

    side: Side
    descriptor: int
    endpoint: str


def inherited(arguments: Sequence[str], environment: Mapping[str, str]) -> list[Listener]:
    """What the command line (``--listen-fd``) and systemd's variables name.

    Raises:
        ConfigError: something named is no listening socket, or it is not said for whom it is.
    """
    found = [_take(*_split(argument)) for argument in arguments]
    if environment.get("LISTEN_PID") != str(os.getpid()):  # the variables are inherited too, and were for a parent
        return found
    count, names = environment.get("LISTEN_FDS", "0"), environment.get("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal():
        raise ConfigError(f"LISTEN_FDS: found {count!r}, expected the number of descriptors, as systemd sets it")
    for n in range(int(count)):
        name = names[n] if n < len(names) else ""
        found.append(_take(name, _FIRST + n, "LISTEN_FDNAMES (FileDescriptorName= in the socket unit)"))
    return found


def _split(argument: str) -> tuple[str, int, str]:
    name, _, number = argument.partition("=")
    if not number.isdecimal():
        raise ConfigError(f"--listen-fd: found {argument!r}, {_EXPECTED}")
    return name, int(number), "--listen-fd"


def _take(name: str, descriptor: int, where: str) -> Listener:
    if name not in (Side.CLIENTS.value, Side.WORKERS.value):
        raise ConfigError(f"{where}: found {name!r} for descriptor {descriptor}, expected clients or workers")
    try:
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            if not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ConfigError(f"{where}: descriptor {descriptor} is a socket that does not listen")
            copy.setblocking(False)  # shared with the original, which may have been made otherwise
            return Listener(Side(name), descriptor, endpoint_of(copy))
    except OSError as error:
        raise ConfigError(
            f"{where}: descriptor {descriptor} is no socket ({error.strerror}), expected one that listens"
        ) from error


def remove_files(given: Iterable[Listener]) -> None:
    """Who made these sockets was killed and cannot remove their files. No process of ours may have them any more."""
    claims = []
    for path in filter(None, (ipc_path(one.endpoint) for one in given)):
        try:
            claims.append(Claim(path))
        except LoopmuxError:
            pass  # somebody else is there already, or the files are gone: nothing to clean up
    for claim in reversed(claims):  # the first one made the folder
        claim.release()
