"""Where the broker listens, when nobody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from loopmux.errors import ConfigError
from loopmux.folders import unusable

ENDPOINT_VARIABLE = "LOOPMUX_ENDPOINT"
CHOOSE_ANOTHER = f"choose another --endpoint (${ENDPOINT_VARIABLE})"
"""What to do where sockets cannot be made."""
_LAST_PORT = 65535
_LONGEST_IPC_PATH = 100
"""A Unix socket path holds 107 bytes; the worker socket and the lock file add a suffix of at most 7."""


def runtime_folder() -> Path:
    """The per-user folder for sockets and locks: ``$XDG_RUNTIME_DIR/loopmux`` or one in the temporary folder.

    It is not created here: whoever binds creates it with mode 0700 (``private_folder``).
    """
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "loopmux"
    import tempfile  # it brings a dozen modules along

    return Path(tempfile.gettempdir()) / f"loopmux-{os.getuid()}"


def default_endpoint() -> str:
    """``$LOOPMUX_ENDPOINT``, else the per-user ipc socket."""
    return os.environ.get(ENDPOINT_VARIABLE) or f"ipc://{runtime_folder() / 'client.ipc'}"


def worker_endpoint(client_endpoint: str) -> str:
    """The endpoint for workers and launchers that belongs to a client endpoint.

    Beside the client's socket for ipc; for tcp an ipc socket of this user named after the port.
    """
    return _beside(client_endpoint, "work")


def admin_endpoint(client_endpoint: str) -> str:
    """The endpoint for administrators that belongs to a client endpoint; always an ipc socket of this user."""
    return _beside(client_endpoint, "admin")


def _beside(client_endpoint: str, suffix: str) -> str:
    path = ipc_path(client_endpoint)
    if path is not None:
        return f"ipc://{path}.{suffix}"
    port = client_endpoint.rsplit(":", 1)[-1]
    return f"ipc://{runtime_folder() / f'tcp-{port}.{suffix}'}"


def ipc_path(endpoint: str) -> Path | None:
    """The socket file of an ipc endpoint, None for tcp.

    Raises:
        ConfigError: neither ipc nor tcp, or a path that no Unix socket can have.
    """
    if not isinstance(endpoint, str):
        found = f"{endpoint!r:.80} ({type(endpoint).__name__})"
        raise ConfigError(f"endpoint: found {found}, expected a text such as ipc:///path/to/socket")
    if endpoint.startswith("tcp://"):
        port = endpoint.rsplit(":", 1)[-1]
        if not port.isdecimal() or int(port) > _LAST_PORT:
            raise ConfigError(
                f"endpoint {endpoint!r} names no port up to {_LAST_PORT}, expected for example tcp://127.0.0.1:7750"
            )
        return None
    path = endpoint.removeprefix("ipc://")
    if path in (endpoint, "") or path.startswith("@"):  # @ is a name without a file, and without an owner
        raise ConfigError(f"endpoint {endpoint!r} is neither ipc:///path/to/socket nor tcp://host:port")
    try:
        size = len(path.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"the socket path of {endpoint!r} is no valid Unicode: choose another folder") from error
    if "\0" in path:
        raise ConfigError(f"the socket path of {endpoint!r} has a character that no file's name has")
    if size > _LONGEST_IPC_PATH:
        raise ConfigError(
            f"the socket path of {endpoint!r} has {size} bytes, at most {_LONGEST_IPC_PATH} fit: "
            "choose a shorter folder"
        )
    return Path(path)


def private_folder(folder: Path) -> Path:
    """Create a folder that only this user can enter, or check that an existing one is ours.

    Raises:
        ConfigError: it cannot be made, or belongs to another user (somebody else made it first in a shared temporary
            folder).
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise unusable(folder, "sockets", CHOOSE_ANOTHER, error) from error
    if owner not in (os.getuid(), 0):
        raise ConfigError(
            f"{folder} belongs to user {owner}, expected {os.getuid()}: set $LOOPMUX_ENDPOINT to a folder of yours"
        )
    return folder


def beyond_this_host(endpoint: str) -> bool:
    """Whether an endpoint is tcp on an address that other hosts can reach, or may be.

    Raises:
        ConfigError: malformed.
    """
    if ipc_path(endpoint) is not None:
        return False
    import ipaddress  # who uses ipc need not wait for it

    host = endpoint.removeprefix("tcp://").rsplit(":", 1)[0].strip("[]")
    try:
        return host != "localhost" and not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def check_local(endpoint: str) -> None:
    """Refuse what must not be listened on without keys.

    Raises:
        ConfigError: malformed, or beyond this host: without encryption and keys anybody there could run requests and
            read along.
    """
    if beyond_this_host(endpoint):
        raise ConfigError(
            f"{endpoint}: found an address that other hosts can reach, expected a loopback address (127.0.0.1, ::1, "
            "localhost): without keys they are kept out; a broker with `key` in its settings (loopmux-broker --config) "
            "listens there, see docs/operations.md"
        )
