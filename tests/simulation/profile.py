"""What one seed's world is like: how many of whom, how fast, how narrow, and which faults it knows.

Every seed has only some of the faults, drawn anew: a fault that is in all runs hides what only shows without it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_broker.admission import Limits
from loopmux_broker.config import BrokerConfig
from loopmux_broker.stalls import Stall
from loopmux_launcher.groups import Group

FAULTS = (
    "kill worker",
    "kill broker",
    "kill launcher",
    "kill client",
    "freeze worker",
    "freeze broker",
    "freeze client",
    "freeze launcher",
    "snap worker",
    "snap client",
    "snap launcher",
    "hold worker",
    "hold client",
    "clog worker",
    "clog client",
    "stick worker",
    "stick client",
    "stick launcher",
    "flap worker",
    "flap client",
    "hang worker",
    "slow worker",
    "stop worker",
    "drain worker",
    "stop launcher",
    "suspend host",
    "bad starts",
    "poison",
    "close client",
)
"""Everything that may go wrong; ``nemesis`` has a method for each."""

_FOREMOST = "kill broker"
"""Most of what is promised hangs on what comes of it, so it is in more worlds than the others are."""

ECHO, FLAKY = "echo", "flaky"
ADAPTER = "tuned"
LOOSE, SPOILED = ("loose-1", "loose-2"), "spoiled"
"""Adapters that are loaded and unloaded at run time; the last one cannot be."""
FAIL_AT = 20
"""Position at which the flaky model fails, or raises."""


def groups(processes: int, slots: int, rate: float, first_delay: float, raises: bool) -> list[Group]:
    """Workers of a sound model with an adapter, and one of a model whose engine fails."""
    echo = {"tokens": 100_000.0, "rate": rate, "first_delay": first_delay}
    models = (ModelSpec(ECHO), ModelSpec(ADAPTER, adapter_dir="adapters/tuned"))
    sound = WorkerSpec("", "sim://", models, engine="echo", slots=slots, echo=echo)
    flaw = {"raise_after" if raises else "fail_after": float(FAIL_AT)}
    flaky = WorkerSpec("", "sim://", (ModelSpec(FLAKY),), engine="echo", slots=2, echo=echo | flaw)
    return [Group(ECHO, None, sound, processes, 60.0), Group(FLAKY, None, flaky, 1, 60.0)]


@dataclass(frozen=True)
class Profile:
    """The world of one seed."""

    config: BrokerConfig = field(default_factory=BrokerConfig)
    groups: tuple[Group, ...] = ()
    clients: int = 2
    latency: tuple[float, float] = (0.0001, 0.003)
    inherited: bool = True
    """Whether the broker's listening sockets outlive it, so that peers are back at once."""
    rate: float = 0.0
    narrow: bool = False
    """Whether limits are so low that requests are refused."""
    faults: tuple[str, ...] = ()
    bursts: int = 3
    adapters: bool = False
    """Whether adapters are loaded and unloaded at run time."""


def draw(seed: int) -> Profile:
    """The profile of a seed."""
    dice = random.Random(f"profile {seed}")
    narrow = dice.random() < 0.15
    limits = Limits(queued=6, client_queued=4, held=2_000, client_held=1_200, output=30_000) if narrow else Limits()
    latency = dice.choice(((0.0001, 0.003), (0.0001, 0.003), (0.0001, 0.05), (0.001, 0.4)))
    small = latency[1] < 0.01 and dice.random() < 0.3
    config = BrokerConfig(
        window=16 if small else dice.choice((16, 64, 64, 1024)),
        request_output=20_000 if small else 1024 * 1024,  # about 70 chunks: more than a window has
        limits=limits,
        grace=dice.choice((0.5, 2.0, 4.0)),
        closed_grace=dice.choice((0.5, 2.0)),
        # shorter than a user's: what runs out after a minute would otherwise be in few runs
        orphan_grace=4.0,
        stall=Stall(decode=4.0, prefill=6.0, per_size=0.0, adapter=6.0),
    )
    rate = dice.choice((50.0, 100.0, 200.0))
    made = groups(
        dice.randint(1, 3), dice.randint(1, 4), rate, dice.choice((0.0, 0.0, 0.05, 0.5)), raises=dice.random() < 0.5
    )
    chosen = [fault for fault in FAULTS if dice.random() < (0.7 if fault == _FOREMOST else 0.35)]
    return Profile(
        config=config,
        groups=tuple(made),
        clients=dice.randint(1, 4),
        latency=latency,
        inherited=dice.random() < 0.5,
        rate=rate,
        narrow=narrow,
        faults=tuple(chosen) if dice.random() < 0.9 else (),
        bursts=dice.randint(1, 3),
        adapters=dice.random() < 0.3,
    )
