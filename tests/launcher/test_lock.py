from __future__ import annotations

import threading
from pathlib import Path

import pytest

from launcher.programs import wait_for
from loopmux_launcher.lock import locked


def test_a_lock_that_its_holder_removes_is_not_held_twice(tmp_path: Path) -> None:
    """Who waited for the removed file and who comes anew agree on one."""
    path, waits, holders, most = tmp_path / ".lock", [], [], []
    go = threading.Event()

    def waiter() -> None:
        with locked(path, waits.append):
            holders.append(1)
            most.append(len(holders))
            go.wait(10)
            holders.pop()

    threads = [threading.Thread(target=waiter) for _ in range(2)]
    with locked(path):
        threads[0].start()
        wait_for(lambda: waits, "the first to wait")
        path.unlink()
    threads[1].start()
    wait_for(lambda: len(waits) == 2 or len(most) == 2, "the second to wait or hold")
    go.set()
    for thread in threads:
        thread.join()
    assert most == [1, 1]


def test_who_would_rather_not_wait_raises_and_keeps_nothing_open(tmp_path: Path) -> None:
    def refuse(pid: str) -> None:
        raise RuntimeError(pid)

    with locked(tmp_path / ".lock"):
        with pytest.raises(RuntimeError):
            with locked(tmp_path / ".lock", refuse):
                pass
    with locked(tmp_path / ".lock", refuse):
        pass
