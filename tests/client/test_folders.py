from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from loopmux import folders
from loopmux.errors import ConfigError


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(user: int) -> object:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"set \$XDG_STATE_HOME, or \$HOME"):
        folders.of_user("XDG_STATE_HOME", ".local/state")
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    assert folders.of_user("XDG_STATE_HOME", ".local/state") == Path("/s")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert folders.of_user("XDG_STATE_HOME", ".local/state") == Path("/h/.local/state")
