"""How fast the client is: ``python -m loopmux_loadtest.bench_client --endpoint E --model echo``.

Prints one JSON object. Times are milliseconds as the caller sees them, one request after the other on one connection:

- ``ttft``: from the call of ``stream`` to its first token;
- ``ttft_asyncio``: the same with ``AsyncClient``;
- ``round_trip``: a whole ``generate`` of one token;
- ``client_us_per_chunk``: CPU time of this process per chunk of one long stream, microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Sequence

from loopmux import AsyncClient, Client, TextDelta
from loopmux_loadtest.tally import percentile

_WARM_UP = 20
"""Requests whose times do not count: they connect and fill caches."""
_LONG = 2000
"""Tokens of the long stream, enough to make the request's fixed cost vanish."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.bench_client", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--endpoint", help="where the broker listens; default as in loopmux.Client")
    parser.add_argument("--model", default="echo")
    parser.add_argument("--requests", type=int, default=500, help="measured requests per figure (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each measured stream (%(default)s)")
    given = parser.parse_args(arguments)
    with Client(given.endpoint, model=given.model) as client:
        report = {
            "endpoint": client.endpoint,
            "model": given.model,
            "requests": given.requests,
            "ttft": summary([first_token(client, given.tokens) for _ in range(_WARM_UP + given.requests)]),
            "round_trip": summary([round_trip(client) for _ in range(_WARM_UP + given.requests)]),
            "client_us_per_chunk": cost_per_chunk(client),
        }
    report["ttft_asyncio"] = summary(
        asyncio.run(first_tokens(client.endpoint, given.model, given.tokens, _WARM_UP + given.requests))
    )
    print(json.dumps(report, indent=2))
    return 0


def first_token(client: Client, tokens: int) -> float:
    """Seconds from the call to the first token; the stream is read to its end."""
    started = time.perf_counter()
    first = math.nan
    with client.stream("Hello", max_new_tokens=tokens) as stream:
        for event in stream:
            if math.isnan(first) and isinstance(event, TextDelta):
                first = time.perf_counter() - started
    return first


async def first_tokens(endpoint: str, model: str, tokens: int, times: int) -> list[float]:
    """As ``first_token``, in asyncio, so many times."""
    found = []
    async with AsyncClient(endpoint, model=model) as client:
        for _ in range(times):
            started = time.perf_counter()
            first = math.nan
            async with client.stream("Hello", max_new_tokens=tokens) as stream:
                async for event in stream:
                    if math.isnan(first) and isinstance(event, TextDelta):
                        first = time.perf_counter() - started
            found.append(first)
    return found


def round_trip(client: Client) -> float:
    """Seconds of a whole request of one token."""
    started = time.perf_counter()
    client.generate("Hello", max_new_tokens=1)
    return time.perf_counter() - started


def cost_per_chunk(client: Client) -> float:
    """CPU microseconds of this process, both threads, per chunk of a long stream."""
    started = time.process_time()
    with client.stream("Hello", max_new_tokens=_LONG) as stream:
        chunks = sum(isinstance(event, TextDelta) for event in stream)
    return round((time.process_time() - started) / max(chunks, 1) * 1e6, 1)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of what came after the warm-up, milliseconds."""
    counted = seconds[_WARM_UP:]
    return {name: round(1e3 * percentile(counted, share), 3) for name, share in (("p50", 0.5), ("p99", 0.99))}


if __name__ == "__main__":
    raise SystemExit(main())
