"""What the broker costs: ``python -m loopmux_loadtest.bench_broker`` prints one JSON line per case.

A real broker process, an echo worker process that does nothing but speak the wire, and callers in this process that do
the same, over ipc where it is not said. Nothing of the client or the engine is measured.

- ``core``: processor time of the core per event, without sockets (see ``bench_core``).
- ``round_trip``: one request of one token, from SUBMIT to END, through the broker and over a direct DEALER-ROUTER pair
  to the same worker loop; alternating rounds, medians over the rounds.
- ``chunk_cpu``: processor time of the broker process per forwarded chunk (TOK of 8 tokens), when the worker sends as
  fast as it can, and paced at 2 000 a second, where nearly every chunk wakes two threads and that is most of its cost.
- ``curve``: processor time of the broker process over tcp, per chunk and per request, with keys and in the clear, in
  alternating short rounds; ``ratio`` is the median of their quotients.
- ``load``: with 1, 64 and 1 000 clients, each with a connection of its own and a request always under way: requests per
  second with their latency, streamed chunks per second, processor time, resident memory. For our broker; for ``proxy``
  (``zmq.proxy``) and ``poller`` (the same in Python), which only pass on, between the same two ends; and with
  ``--peers PYTHON``, an environment with fastapi, uvicorn, litserve, mosec and ray[serve], for HTTP servers that echo;
  ``replaced`` is the one that Loopmux replaces, FastAPI around a ``generate()`` with a lock.
- ``ratio``: ours divided by each of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zmq

from loopmux import keys
from loopmux_loadtest import middles
from loopmux_loadtest.bench_core import core
from loopmux_loadtest.ends import WireCallers
from loopmux_loadtest.middles import Middle, processor_time
from loopmux_loadtest.stopping import lasting, times
from loopmux_loadtest.tally import percentile

STREAMS = 64
PACE = 2000
"""Chunks a second of the paced case: 40 streams of 50 chunks a second, a busy worker."""
PAIRS = 5
"""Rounds of ``curve`` for each of the others: it is about some percent, and a machine's other work changes more."""
CLIENTS = (1, 64, 1000)
CHUNKS = 32
"""Chunks of a stream under load: 256 tokens, what a request makes by default."""
SERVERS = ("replaced", "fastapi", "litserve", "mosec", "ray")
PACKAGES = ("fastapi", "uvicorn", "litserve", "mosec", "ray")

Figures = dict[str, float]


def round_trip(direct: WireCallers, brokered: WireCallers, rounds: int, count: int) -> dict[str, Any]:
    """Milliseconds from SUBMIT to END of one token."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, caller in (("direct", direct), ("broker", brokered)):
            latencies = caller.run(times(count), 1, at_once=1, width=1).latencies
            found[f"{name}_p50"].append(1e3 * percentile(latencies, 0.5))
            found[f"{name}_p99"].append(1e3 * percentile(latencies, 0.99))
    medians = {name: round(statistics.median(values), 3) for name, values in found.items()}
    added = round(medians["broker_p50"] - medians["direct_p50"], 3)
    return {"case": "round_trip", "unit": "ms", **medians, "added_p50": added}


def chunk_cpu(broker: int, caller: WireCallers, rounds: int, scale: float, *, rate: int) -> dict[str, Any]:
    """Microseconds of the broker's processor time per forwarded chunk."""
    streams, chunks = (40, max(1, int(100 * scale))) if rate else (STREAMS, max(1, int(1000 * scale)))
    costs, rates = [], []
    for _ in range(rounds):
        spent = processor_time(broker)
        took = caller.run(times(streams), chunks, at_once=streams, rate=rate)
        rates.append(took.chunks / took.seconds)
        costs.append(1e6 * (processor_time(broker) - spent) / took.chunks)
    cost, speed = round(statistics.median(costs), 2), round(statistics.median(rates))
    return {"case": "chunk_cpu", "paced": bool(rate), "us_per_chunk": cost, "chunks_per_s": speed}


def load(middle: Middle, clients: int, seconds: float) -> Figures:
    """One round with so many clients: whole answers, then streams."""
    with contextlib.closing(middle.callers(clients)) as callers:
        callers.run(times(clients), 0, at_once=clients)
        spent, forwarded = middle.processor_time(), _forwarding(middle)
        took = callers.run(lasting(seconds), 0, at_once=clients)
        requests, (spent, forwarded) = len(took.latencies), _since(middle, spent, forwarded)
        found = {
            "requests_per_s": requests / took.seconds,
            "p50_ms": 1e3 * percentile(took.latencies, 0.5),
            "p99_ms": 1e3 * percentile(took.latencies, 0.99),
            "us_per_request": 1e6 * spent / requests,
            "us_per_request_forwarding": 1e6 * forwarded / requests,
        }
        spent, forwarded = middle.processor_time(), _forwarding(middle)
        took = callers.run(lasting(seconds), CHUNKS, at_once=clients)
        spent, forwarded = _since(middle, spent, forwarded)
        return found | {
            "chunks_per_s": took.chunks / took.seconds,
            "us_per_chunk": 1e6 * spent / took.chunks,
            "us_per_chunk_forwarding": 1e6 * forwarded / took.chunks,
            "rss_mib": middle.memory(),
        }


def _forwarding(middle: Middle) -> float:
    return processor_time(middle.forwards) if middle.forwards else 0.0


def _since(middle: Middle, spent: float, forwarded: float) -> tuple[float, float]:
    return middle.processor_time() - spent, _forwarding(middle) - forwarded


def loads(
    folder: str, peers: str | None, rounds: int, seconds: float, clients: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """All of them in turn, round by round; then the medians, and the ratios of ours to each."""
    sides: dict[str, Callable[[], contextlib.AbstractContextManager[Middle]]] = {
        "loopmux": functools.partial(middles.loopmux, folder),
        "proxy": functools.partial(middles.passing, folder, "proxy"),
        "poller": functools.partial(middles.passing, folder, "poller"),
    }
    sides |= {name: functools.partial(middles.server, peers, name) for name in SERVERS if peers}
    found: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    for _ in range(rounds):
        for name, running in sides.items():
            with running() as middle:
                for count in clients:
                    found[name, count].append(load(middle, count, seconds))
    medians = {case: _medians(figures) for case, figures in found.items()}
    for (name, count), figures in medians.items():
        yield {"case": "load", "side": name, "clients": count, **_rounded(figures)}
    for (name, count), figures in medians.items():
        if name != "loopmux":
            compared = ("requests_per_s", "chunks_per_s", "p50_ms", "p99_ms", "rss_mib")
            ratios = {key: medians["loopmux", count][key] / figures[key] for key in compared}
            yield {"case": "ratio", "to": name, "clients": count, **_rounded(ratios)}


def _medians(rounds: list[Figures]) -> Figures:
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def _rounded(figures: Figures) -> Figures:
    return {key: round(value, 3 if value < 100 else 0) for key, value in figures.items()}


def _alone(folder: str, rounds: int, scale: float) -> Iterator[dict[str, Any]]:
    with (
        middles.loopmux(folder) as ours,
        middles.direct(folder) as pair,
        contextlib.closing(WireCallers(ours.address, 1, introduce=True)) as brokered,
        contextlib.closing(WireCallers(pair.address, 1, introduce=False)) as straight,
    ):
        assert ours.forwards is not None
        straight.run(times(100), 1, at_once=1, width=1)
        yield round_trip(straight, brokered, rounds, max(10, int(2000 * scale)))
        yield chunk_cpu(ours.forwards, brokered, rounds, scale, rate=0)
        yield chunk_cpu(ours.forwards, brokered, rounds, scale, rate=PACE)


def _costs(middle: Middle, callers: WireCallers, scale: float) -> Figures:
    callers.run(times(100), 1, at_once=1, width=1)
    spent = _forwarding(middle)
    took = callers.run(times(STREAMS), max(1, int(1000 * scale)), at_once=STREAMS)
    chunk = 1e6 * (_forwarding(middle) - spent) / took.chunks
    spent, count = _forwarding(middle), max(STREAMS, int(10_000 * scale))
    callers.run(times(count), 0, at_once=STREAMS)
    return {"chunk": chunk, "request": 1e6 * (_forwarding(middle) - spent) / count}


def curve(folder: str, rounds: int, scale: float) -> dict[str, Any]:
    """Microseconds of the broker's processor time, with keys and without."""
    for name in ("broker", "bench"):
        keys.new(name, Path(folder))
    shown = keys.Credentials(keys.read(Path(folder, "bench.key")), keys.read(Path(folder, "broker.key")).public)
    found: dict[str, list[float]] = defaultdict(list)
    with middles.tcp(folder, keyed=False) as clear, middles.tcp(folder, keyed=True) as keyed:
        for _ in range(PAIRS * rounds):
            for name, middle, credentials in (("clear", clear, None), ("keyed", keyed, shown)):
                callers = WireCallers(middle.address, 1, introduce=True, credentials=credentials)
                with contextlib.closing(callers):  # of this round alone: the broker gives up who says nothing meanwhile
                    for what, cost in _costs(middle, callers, scale).items():
                        found[f"{name}_us_per_{what}"].append(cost)
    medians = {key: round(statistics.median(values), 2) for key, values in found.items()}
    ratios = dict[str, Any]()
    for what in ("chunk", "request"):
        pairs = zip(found[f"keyed_us_per_{what}"], found[f"clear_us_per_{what}"], strict=True)
        low, median, high = statistics.quantiles((keyed / clear for keyed, clear in pairs), n=4, method="inclusive")
        ratios |= {
            f"ratio_per_{what}": round(median, 3),
            f"ratio_per_{what}_quartiles": [round(low, 3), round(high, 3)],
        }
    return {"case": "curve", **medians, **ratios}


def _versions(peers: str | None) -> dict[str, Any]:
    found = {"python": sys.version.split()[0], "pyzmq": zmq.__version__, "libzmq": zmq.zmq_version()}
    if peers:
        ask = "import importlib.metadata as m, sys; print(*(m.version(name) for name in sys.argv[1:]))"
        done = subprocess.run([peers, "-c", ask, *PACKAGES], capture_output=True, text=True, check=True)
        found |= dict(zip(PACKAGES, done.stdout.split(), strict=True))
    return {"case": "versions", **found, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}


def main() -> None:
    """Run every case, print it, and keep it under ``bench-results/``."""
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.bench_broker", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the runs, 1 for a few minutes with peers")
    parser.add_argument("--clients", type=int, nargs="*", default=CLIENTS, help="of ``load``; none leaves it out")
    parser.add_argument("--peers", metavar="PYTHON", help="the interpreter of an environment with the HTTP servers")
    parser.add_argument("--results", type=Path, default=Path("bench-results"), help="where the lines are kept as well")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing that was started is to stay
    options.results.mkdir(parents=True, exist_ok=True)
    name = time.strftime("broker-%Y%m%d-%H%M%S.jsonl")
    with tempfile.TemporaryDirectory() as folder, (options.results / name).open("w") as kept:
        for case in _cases(folder, options):
            print(line := json.dumps(case), flush=True)
            print(line, file=kept)


def _cases(folder: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    yield _versions(options.peers)
    yield core(options.rounds)
    yield from _alone(folder, options.rounds, options.scale)
    yield curve(folder, options.rounds, options.scale)
    if options.clients:
        yield from loads(folder, options.peers, options.rounds, 2 * options.scale, options.clients)


if __name__ == "__main__":
    main()
