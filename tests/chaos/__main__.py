"""Chaos on real processes: ``make chaos``, or ``python -m chaos`` with ``tests`` on the path.

Prints a row for each fault, then the runs beside a client that never reads and those with the demo model, then what is
to be reached and whether it was. Ends with 1 when a promise was broken (a request failed, a token was lost, a table was
not empty); times are judged by the reader, who knows the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator

from chaos import demo, neighbours, table
from chaos.nemesis import FAULTS
from chaos.storm import Load, Row, storm

_PAIRS = 5
_OTHERS = ("neighbours", "demo")
_NAMES = ", ".join((*(fault.name for fault in FAULTS), *_OTHERS))


async def _storms(only: list[str], load: Load) -> list[Row]:
    rows = []
    faults = [fault for fault in FAULTS if _wanted(only, fault.name) and not (load.keyed and fault.pest)]
    print(table.head() if faults else "")
    for fault in faults:
        rows.append(await storm(fault, load))
        print(table.line(rows[-1]), flush=True)
    return rows


def _wanted(only: list[str], name: str) -> bool:
    return not only or any(word in name for word in only)


def _others(only: list[str], load: Load) -> Iterator[tuple[bool, bool, str]]:
    """Whether a promise depends on it, whether it was reached, and what."""
    if _wanted(only, "neighbours"):
        yield False, *neighbours.verdict(asyncio.run(neighbours.pairs(load, _PAIRS)))
    if _wanted(only, "demo"):
        for outcome in asyncio.run(demo.demo(workers=2, streams=16, tokens=128)):
            yield True, outcome.good, f"demo model, {outcome.fault.name}: nobody can tell from the text"


def main() -> int:
    """Run what is asked for and print it."""
    usual = Load()
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description="Kill, freeze, cut off and pester a running stack."
    )
    parser.add_argument("only", nargs="*", help=f"only what has this word in its name: {_NAMES}")
    parser.add_argument("--requests", type=int, default=usual.requests)
    parser.add_argument("--clients", type=int, default=usual.clients)
    parser.add_argument(
        "--keys", action="store_true", help="over tcp with keys; bad neighbours and the demo are left out"
    )
    options = parser.parse_args()
    began = time.monotonic()
    rows = asyncio.run(_storms(options.only, Load(options.clients, options.requests, keyed=options.keys)))
    print()
    # so few that two cores have room for all of it: else what is measured is who of them gets one
    few = Load(max(1, options.clients // 4), max(1, options.clients // 2))
    others = [] if options.keys else list(_others(options.only, few))
    print()
    for reached, what in [*table.verdicts(rows), *(other[1:] for other in others)]:
        print("reached    " if reached else "NOT reached", what)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    kept = all(row.exact for row in rows) and all(reached for promised, reached, _ in others if promised)
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
