from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loopmux_launcher import atomic, envstore, workercode


def test_what_a_full_disk_has_no_room_for_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    atomic.write(file, "before")
    (tmp_path / ".file.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        atomic.write(file, "after")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "before"


def test_ctrl_c_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    atomic.write(file, "before")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic.write(file, "after")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "before"


@pytest.mark.parametrize(
    "write",
    [
        workercode.install,
        lambda folder: envstore.switch(folder, "here"),
        lambda folder: atomic.write(folder / "file", "text"),
    ],
    ids=["workercode", "switch", "atomic"],
)
def test_what_one_that_was_killed_leaves_the_next_one_puts_away(tmp_path: Path, write: Callable[[Path], None]) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()

    def killed() -> None:
        Path.rename = lambda *_: os._exit(9)  # type: ignore[assignment, method-assign]
        write(twice)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(list(twice.rglob("*"))) > 0
    found = []
    for folder in (once, twice):
        write(folder)
        found.append(sorted(path.relative_to(folder) for path in folder.rglob("*")))
    assert found[0] == found[1]
