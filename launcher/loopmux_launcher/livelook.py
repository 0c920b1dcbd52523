"""What `up` shows below its lines on a terminal: each model with what is done for it, what runs, how fast. Pure."""

from __future__ import annotations

from loopmux.messages import ModelStatus, Status


def picture(status: Status) -> list[str]:
    """A table of the models, and a line with the sums."""
    rows = [("MODEL", "PHASE", "WORKERS", "RUNNING", "QUEUED", ""), *map(_row, status.models)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rate = sum(worker.tokens_per_second for worker in status.workers)
    workers = f"{len(status.workers)} worker{'' if len(status.workers) == 1 else 's'}"
    return [*table, f"{status.running} running, {status.queued} queued, {rate:.0f} tokens/s, {workers}"]


def _row(model: ModelStatus) -> tuple[str, ...]:
    """A model that is not ready says since when, and why."""
    why = "" if model.phase == "ready" else f"{model.elapsed:.0f} s {model.detail.partition(chr(10))[0]}".rstrip()
    return model.id, model.phase, str(model.workers), str(model.running), str(model.queued), why


def leaving(status: Status) -> list[str]:
    """What is waited for while all of it ends; empty when that is nothing. Workers of other hosts stay."""
    held = [worker for worker in status.workers if worker.running and worker.state == "draining"]
    names = ", ".join(f"{worker.name} ({worker.running})" for worker in held)
    return [f"waits for what runs on {names}; Ctrl-C stops at once"] if held else []
