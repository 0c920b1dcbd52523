"""Chaos on real processes: ``make chaos``, or ``python -m chaos`` with ``tests`` on the path.

Prints a row for each fault, then what is to be reached and whether it was. Ends with 1 when a promise was broken (a
request failed, a token was lost, a table was not empty); times are judged by the reader, who knows the machine.
"""

from __future__ import annotations

import argparse
import asyncio

from chaos import table
from chaos.nemesis import FAULTS
from chaos.storm import Load, Row, storm


async def _run(only: list[str], load: Load) -> list[Row]:
    rows = []
    print(table.head())
    for fault in FAULTS:
        if not only or any(word in fault.name for word in only):
            rows.append(await storm(fault, load))
            print(table.line(rows[-1]), flush=True)
    return rows


def main() -> int:
    """Run what is asked for and print it."""
    usual = Load()
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Kill, freeze and pester a running stack.")
    parser.add_argument(
        "only", nargs="*", help=f"faults whose names have this word: {', '.join(f.name for f in FAULTS)}"
    )
    parser.add_argument("--requests", type=int, default=usual.requests)
    parser.add_argument("--clients", type=int, default=usual.clients)
    options = parser.parse_args()
    rows = asyncio.run(_run(options.only, Load(options.clients, options.requests)))
    print()
    for reached, what in table.verdicts(rows):
        print("reached    " if reached else "NOT reached", what)
    return 0 if all(row.exact for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
