"""The short form of ``make chaos``: every fault a few times, and nothing is asserted about time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from chaos import demo, table
from chaos.nemesis import FAULTS, Fault
from chaos.storm import Load, storm

LOAD = Load(clients=24, requests=32, tokens=100)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_every_token_once_and_nothing_left(fault: Fault) -> None:
    row = asyncio.run(storm(replace(fault, rounds=1), LOAD))
    assert row.exact, f"\n{table.head()}\n{table.line(row)}\n{row.errors} {row.troubles}"
    assert (fault.strike is None) == (row.strikes == 0)
    assert row.hit


@pytest.mark.parametrize("name", ["both killed", "connections cut"])
def test_likewise_over_tcp_with_keys(name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    row = asyncio.run(storm(fault, replace(LOAD, keyed=True)))
    assert row.exact, f"\n{table.head()}\n{table.line(row)}\n{row.errors} {row.troubles}"
    assert row.hit


@pytest.mark.timeout(300)  # torch is loaded four times, on whatever is left of a busy machine
def test_the_demo_model_says_the_same_whatever_is_killed() -> None:
    for outcome in asyncio.run(demo.demo(workers=2, streams=8, tokens=80, faults=demo.STRIKES[:2])):
        assert outcome.good, (str(outcome), outcome.errors, outcome.broken)
