"""What importing the client costs: ``python -m loopmux_loadtest.bench_import``.

Prints one JSON object: the median of fresh interpreters' import times in milliseconds, for ``import loopmux`` alone and
with the client loaded, and whether either brought in a heavy package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

_HEAVY = ("torch", "transformers", "yaml", "structlog", "asyncio")
_PROGRAM = """
import time
started = time.perf_counter()
{statement}
took = time.perf_counter() - started
import json, sys
print(json.dumps([took * 1e3, [name for name in {heavy!r} if name in sys.modules]]))
"""
_STATEMENTS = {
    "import loopmux": "import loopmux",
    "import loopmux, then loopmux.Client": "import loopmux; loopmux.Client",
    "import loopmux, then loopmux.AsyncClient": "import loopmux; loopmux.AsyncClient",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.bench_import", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=11, help="fresh interpreters per figure (%(default)s)")
    given = parser.parse_args(arguments)
    print(json.dumps({name: measure(code, given.runs) for name, code in _STATEMENTS.items()}, indent=2))
    return 0


def measure(statement: str, runs: int) -> dict[str, object]:
    """Median milliseconds of a statement in fresh interpreters, and the heavy packages it loaded."""
    program = _PROGRAM.format(statement=statement, heavy=_HEAVY)
    times, loaded = [], []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        took, loaded = json.loads(done.stdout)
        times.append(took)
    return {"median_ms": round(statistics.median(times), 1), "loaded": loaded}


if __name__ == "__main__":
    raise SystemExit(main())
