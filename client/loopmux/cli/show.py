"""``loopmux status`` and ``loopmux models``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import loopmux
from loopmux.cli.printing import as_json
from loopmux.messages import ModelStatus, Status, WorkerStatus

_REFRESH = 1.0
"""Seconds between two pictures of ``--watch``: workers report at that pace."""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``status`` and ``models`` to the parser's subcommands."""
    status = commands.add_parser("status", parents=[common], help="what broker, workers and models are doing")
    status.add_argument("--json", action="store_true", help="everything, as one JSON object")
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    status.set_defaults(run=_status)
    models = commands.add_parser("models", parents=[common], help="the model ids a request may name")
    models.add_argument("--json", action="store_true", help="as a JSON list")
    models.set_defaults(run=_models)


def _status(options: argparse.Namespace) -> int:
    with loopmux.Client(options.endpoint) as client:
        while True:
            status = client.status()
            if options.watch and sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")  # clear the screen, cursor home
            print(as_json(status) if options.json else render_status(status), flush=True)
            if not options.watch:
                return 0
            time.sleep(_REFRESH)


def _models(options: argparse.Namespace) -> int:
    with loopmux.Client(options.endpoint) as client:
        models = client.models()
    print(as_json(models) if options.json else render_models(models))
    return 0


def render_status(status: Status) -> str:
    """Status as text for people: a line for the broker, tables of workers and models, what they have to note."""
    head = (
        f"broker {status.software}  pid {status.pid}  up {duration(status.uptime)}  clients {status.clients}"
        f"  running {status.running}  queued {status.queued}"
    )
    parts = (head, _workers(status.workers), render_models(status.models), _notes(status))
    return "\n\n".join(part for part in parts if part)


def _notes(status: Status) -> str:
    """Each note once: workers of the same models have the same ones."""
    given = [w.report.get("notes") for w in status.workers]
    found = [f"note: {note}" for notes in given if isinstance(notes, list) for note in notes]
    found += [f"{launcher}: {note}" for launcher, note in status.notes.items()]
    return "\n".join(dict.fromkeys(found))


def _workers(workers: Sequence[WorkerStatus]) -> str:
    rows = [
        (
            w.name,
            w.state,
            f"{w.running}/{w.slots}",
            str(w.served),
            str(w.tokens),
            f"{w.tokens_per_second:.0f}",
            str(w.cached_tokens),
            str(w.computed_tokens),
            w.engine,
            str(w.pid),
            duration(w.uptime),
            " ".join(w.models),
        )
        for w in workers
    ]
    head = (
        "WORKER",
        "STATE",
        "RUNNING",
        "SERVED",
        "TOKENS",
        "TOK/S",
        "CACHED",
        "COMPUTED",
        "ENGINE",
        "PID",
        "UP",
        "MODELS",
    )
    return table(head, rows) if rows else ""


def render_models(models: Sequence[ModelStatus]) -> str:
    """Models as a table."""
    rows = [(m.id, m.phase, str(m.workers), str(m.running), str(m.queued), m.detail.replace("\n", " ")) for m in models]
    return table(("MODEL", "PHASE", "WORKERS", "RUNNING", "QUEUED", "DETAIL"), rows) if rows else "no models"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h07m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
