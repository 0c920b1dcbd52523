"""Running seeds: one with its story, or many with a count of what they were."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from simulation.broken import BrokenError
from simulation.nemesis import Nemesis

_QUIET = structlog.make_filtering_bound_logger(50)
"""What fails on purpose is not news."""
_LONGEST = 60
"""Seconds of processor time; a run takes a fraction of one, so a core that takes so long does not come back."""
_TOLD = 25
"""Lines of the story that a failure is reported with; the replay has all of them."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a seed. ``failure`` is empty for a good one."""

    seed: int
    events: int
    requests: int
    simulated: float
    failure: str = ""
    story: str = ""


def once(seed: int, *, messages: bool = False) -> tuple[Run, Nemesis]:
    """Run one seed, whatever comes of it."""
    logging = structlog.get_config()
    structlog.configure(wrapper_class=_QUIET)
    nemesis = Nemesis(seed, loud=messages)
    failure = ""
    signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, _LONGEST)
    try:
        nemesis.run()
    except BrokenError as error:
        failure = str(error)
    except Exception:  # noqa: BLE001 - a core that raises has failed the run, whatever it is
        failure = f"a core raised\n{traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        structlog.configure(**logging)
    clock = nemesis.clock
    story = nemesis.story.text(_TOLD) if failure else ""
    return Run(seed, clock.events, nemesis.asked, clock.now, failure, story), nemesis


def _too_long(*_: object) -> None:
    raise TimeoutError(f"the run did not end within {_LONGEST} s")


def tell(seed: int, *, messages: bool) -> int:
    """Print the story of one seed."""
    run, nemesis = once(seed, messages=messages)
    profile = nemesis.profile
    print(
        f"seed {seed}: {profile.clients} clients, latency up to {profile.latency[1]} s, "
        f"faults: {', '.join(profile.faults) or 'none'}"
    )
    print(nemesis.story.text())
    print(f"{run.events} events, {run.requests} requests, {run.simulated:.0f} s simulated")
    print(f"BROKEN {run.failure}" if run.failure else "everything held")
    return 1 if run.failure else 0


def many(seeds: range, jobs: int, *, keep_going: bool) -> int:
    """Run seeds, print a line per failure and the totals."""
    began, done, failed = time.monotonic(), [], 0
    for run in _all(seeds, jobs):
        done.append(run)
        if run.failure:
            failed += 1
            print(f"seed {run.seed}: BROKEN {run.failure}")
            if not keep_going:
                print(f"{run.story}\nreplay: make simulate SEED={run.seed}")
                break
    events, requests = sum(run.events for run in done), sum(run.requests for run in done)
    print(
        f"{len(done)} seeds, {events} events ({events // len(done)} per seed), {requests} requests, "
        f"{sum(run.simulated for run in done) / 3600:.1f} h simulated in {time.monotonic() - began:.0f} s: "
        f"{failed} failed"
    )
    return 1 if failed else 0


def _all(seeds: range, jobs: int) -> Iterator[Run]:
    if jobs == 1:
        yield from map(_one, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_one, seeds, chunksize=4)


def _one(seed: int) -> Run:
    return once(seed)[0]
