"""``python -m simulation 17`` replays seed 17 and tells its story; ``--seeds 1000`` runs that many and counts.

The same seed gives the same run on every machine: nothing depends on time, threads or the hashes of texts (this program
starts itself again with fixed ones).
"""

from __future__ import annotations

import argparse
import os
import sys

from simulation import runs


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="the one run to tell")
    parser.add_argument("--seeds", type=int, default=1000, help="how many runs (1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed of them (0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (1)")
    parser.add_argument("--messages", action="store_true", help="tell every message too")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first run that fails")
    options = parser.parse_args()
    if options.seed is not None:
        return runs.tell(options.seed, messages=options.messages)
    return runs.many(range(options.first, options.first + options.seeds), options.jobs, keep_going=options.keep_going)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(
            sys.executable, [sys.executable, "-m", "simulation", *sys.argv[1:]], os.environ | {"PYTHONHASHSEED": "0"}
        )
    sys.exit(main())
