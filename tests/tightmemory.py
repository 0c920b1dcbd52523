"""A worker in a process that may hardly take more memory: ``python tightmemory.py STAGE ARGUMENTS…``.

At the stage ``imported`` torch and all else is there already, and what is left is less than the weights of the model
that ``write_heavy`` makes; at ``roomy`` less than the attention state of many requests; at ``bare`` nothing is there,
and what is left is less than torch's libraries. It is always much more than all the small things take: where those
fail, libraries end the process without a word.
"""

from __future__ import annotations

import importlib
import resource
import sys
import threading
from pathlib import Path

LEFT = {"imported": 32 * 2**20, "roomy": 320 * 2**20, "bare": 200 * 2**20}
"""Bytes; the heavy model's weights are 73 MiB, one layer's attention state 384, torch's largest library over 250."""


def write_heavy(folder: Path) -> None:
    """A model that is too large for what is left."""
    from tinymodel import write_base

    write_base(folder, hidden=1024)


def tighten(left: int) -> None:
    """Limit this process to ``left`` bytes beyond what it has mapped."""
    status = Path("/proc/self/status").read_text()
    mapped = int(status.split("VmSize:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (mapped + left, mapped + left))


def main(stage: str, arguments: list[str]) -> int:
    program = importlib.import_module("loopmux_worker.__main__")
    if stage != "bare":
        program._prepare_libraries()
        for module in (
            "structlog",
            "loopmux_worker.server",
            "loopmux_worker.engine.opening",
            "transformers.models.llama",
        ):
            importlib.import_module(module)
        threading.stack_size(2**20)  # the default, often 8 MiB, would be all that is left
    tighten(LEFT[stage])
    return program.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
