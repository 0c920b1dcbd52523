from __future__ import annotations

from dataclasses import replace

from loopmux.messages import ModelStatus, Status, WorkerStatus
from loopmux_launcher.livelook import leaving, picture


def worker(name: str, rate: float) -> WorkerStatus:
    return WorkerStatus(name, ("m",), 4, 1, "echo", 1, "host", "ready", tokens_per_second=rate)


def test_each_model_with_what_is_done_for_it_and_the_sums() -> None:
    models = (
        ModelStatus("m", "ready", 2, queued=1, running=3, detail="not shown", elapsed=9.0),
        ModelStatus("tools", "loading", detail="weights\nand more", elapsed=12.4),
        ModelStatus("cold", "idle"),
    )
    workers = (worker("m-1", 70.4), worker("m-2", 50.0))
    status = Status(b"e" * 8, 1.0, "loopmux", 1, clients=1, queued=1, running=3, models=models, workers=workers)
    assert picture(status) == [
        "MODEL  PHASE    WORKERS  RUNNING  QUEUED",
        "m      ready    2        3        1",
        "tools  loading  0        0        0       12 s weights",
        "cold   idle     0        0        0       0 s",
        "3 running, 1 queued, 120 tokens/s, 2 workers",
    ]


def test_one_worker() -> None:
    status = Status(b"e" * 8, 1.0, "loopmux", 1, 0, 0, 0, workers=(worker("m-1", 0.0),))
    assert picture(status)[-1] == "0 running, 0 queued, 0 tokens/s, 1 worker"


def test_while_all_of_it_ends_it_is_said_what_is_waited_for() -> None:
    elsewhere = worker("n-1", 70.4)
    busy, idle = (replace(worker(f"m-{n}", 0.0), running=n % 2, state="draining") for n in (1, 2))
    status = Status(b"e" * 8, 1.0, "loopmux", 1, 0, 0, 1, workers=(elsewhere, busy, idle))
    assert leaving(status) == ["waits for what runs on m-1 (1); Ctrl-C stops at once"]
    assert leaving(replace(status, workers=(idle,))) == []
