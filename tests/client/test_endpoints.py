from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from loopmux.endpoints import (
    admin_endpoint,
    default_endpoint,
    ipc_path,
    private_folder,
    runtime_folder,
    worker_endpoint,
)
from loopmux.errors import ConfigError


def test_the_default_is_the_variable_then_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPMUX_ENDPOINT", "tcp://127.0.0.1:7750")
    assert default_endpoint() == "tcp://127.0.0.1:7750"
    monkeypatch.delenv("LOOPMUX_ENDPOINT")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_endpoint() == "ipc:///run/user/7/loopmux/client.ipc"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_folder() == Path(tempfile.gettempdir()) / f"loopmux-{os.getuid()}"


def test_workers_have_an_endpoint_beside_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert worker_endpoint("ipc:///tmp/a") == "ipc:///tmp/a.work"
    assert worker_endpoint("tcp://127.0.0.1:7750") == "ipc:///run/user/7/loopmux/tcp-7750.work"
    assert admin_endpoint("ipc:///tmp/a") == "ipc:///tmp/a.admin"
    assert admin_endpoint("tcp://127.0.0.1:7750") == "ipc:///run/user/7/loopmux/tcp-7750.admin"


def test_paths_of_ipc_and_none_of_tcp() -> None:
    assert ipc_path("ipc:///tmp/a") == Path("/tmp/a")
    assert ipc_path("tcp://host:1") is None


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("", "neither ipc"),
        ("/tmp/a", "neither ipc"),
        ("ipc://", "neither ipc"),
        ("http://x:1", "neither ipc"),
        ("tcp://host", "names no port"),
        ("tcp://host:x", "names no port"),
        ("tcp://host:65536", "names no port up to 65535"),
        ("ipc:///" + "é" * 60, "has 121 bytes, at most 100 fit"),
        ("ipc:///tmp/\udcff", "no valid Unicode"),
        ("ipc:///tmp/a\0b", "a character that no file's name has"),
        (Path("/tmp/a"), r"endpoint: found PosixPath\('/tmp/a'\) \(PosixPath\), expected a text such as"),
    ],
)
def test_what_is_no_endpoint(endpoint: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ipc_path(endpoint)


def test_a_private_folder_is_for_its_user_only(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_folder(folder) == folder


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        private_folder(folder)
