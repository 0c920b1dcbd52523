"""Where the launcher keeps things: environments and code under the data folder, logs under the state folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from loopmux import endpoints
from loopmux.folders import of_user, usable


def data() -> Path:
    """``$XDG_DATA_HOME/loopmux``: built environments, code for the workers."""
    return of_user("XDG_DATA_HOME", ".local/share") / "loopmux"


def usable_data() -> Path:
    """``data``, made and seen to be usable.

    Raises:
        ConfigError: nothing can be written there.
    """
    return usable(data(), "environments and the workers' code", "set $XDG_DATA_HOME to another")


def usable_logs(endpoint: str | None = None) -> Path:
    """``logs``, made and seen to be usable.

    Raises:
        ConfigError: nothing can be written there.
    """
    return usable(logs(endpoint), "log files", "set $XDG_STATE_HOME to another")


def adapters(endpoint: str) -> Path:
    """The file of the adapters that were loaded at run time through the broker of an endpoint."""
    return _state() / "adapters" / f"{endpoint_tag(endpoint)}.json"


def _state() -> Path:
    """``$XDG_STATE_HOME/loopmux``: logs, what was loaded at run time."""
    return of_user("XDG_STATE_HOME", ".local/state") / "loopmux"


def logs(endpoint: str | None = None) -> Path:
    """The folder of log files: one of its own for each endpoint, because two stacks may run workers of one name."""
    folder = _state() / "logs"
    return folder / endpoint_tag(endpoint) if endpoint else folder


def endpoint_tag(endpoint: str) -> str:
    """A short folder name for an endpoint: readable, and different for different endpoints."""
    path = endpoints.ipc_path(endpoint)
    exact = str(path.absolute()) if path else endpoint
    words = f"{path.absolute().parent.name}-{path.stem}" if path else "tcp-" + endpoint.rsplit(":", 1)[-1]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', words)}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
