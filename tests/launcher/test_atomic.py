from __future__ import annotations

from pathlib import Path

import pytest

from loopmux_launcher import atomic


def test_what_a_full_disk_has_no_room_for_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    atomic.write(file, "before")
    (tmp_path / ".file.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        atomic.write(file, "after")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "before"
