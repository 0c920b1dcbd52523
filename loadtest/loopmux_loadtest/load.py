"""``loopmux load``: requests to a stack as it runs, what becomes of them, and how long it takes.

By default a closed loop: so many requests are always under way, and the next one waits for one that ends, as callers
do that wait for their answers. With --rate an open loop: requests arrive at random moments, whether others are done or
not, as from many people; what the stack cannot follow queues, and their times say so. --seed fixes these moments as
well as the sampling of every request; without it the moments are those of seed 0.

The table: requests that ended well, failed, or were stopped by Ctrl-C; ended ones and tokens a second; the tokens of
prompts, and how many of them were reused (found in a worker's KV rows). Then milliseconds: from a request to its first
token, from one token to the next (those of one piece share the time since the one before), from a request to its end,
each with the number of times that it is about: a request without a token is in none of the first two. With --rate a
request begins when it was to arrive; `sent late` is by how much this program itself was behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopmux import AsyncClient, LoopmuxError, TextDelta, codec, exitcodes
from loopmux.cli import arguments, running
from loopmux.cli.show import table
from loopmux.errors import BadRequestError
from loopmux.options import prepare
from loopmux_loadtest.stopping import Again, lasting, times
from loopmux_loadtest.tally import Tally, arrivals

_AT_ONCE, _REQUESTS = 8, 100
"""Requests under way and in all, unless said otherwise."""
_LIVE, _PLAIN = 0.5, 10.0
"""Seconds between two looks at the progress, on a terminal and elsewhere."""
_FILES, _OTHERS = 10, 64
"""Files that a connection opens (nine sockets and their like), and that all the rest may have open."""
_EXAMPLE = '{"prompt": "Hello"}'

Wish = dict[str, Any]
"""What a request asks for, as options of ``AsyncClient.stream``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test and print what was measured: an exit code (``exitcodes``), 1 where a request failed."""
    words = sys.argv[1:] if argv is None else argv
    return running.run(lambda: _main(_parser().parse_args(words)), debug="--debug" in words)


def _main(options: argparse.Namespace) -> int:
    wishes, tally = _wishes(options), Tally()
    _make_room(options.connections)
    seconds, interrupted = asyncio.run(_measure(options, wishes, tally))
    figures = _settings(options) | tally.figures(seconds)
    print(json.dumps(figures, ensure_ascii=False) if options.json else render(figures))
    if failed := tally.failed.total():
        print(f"loopmux: {failed} of {tally.begun} requests failed", file=sys.stderr)
    return exitcodes.INTERRUPTED if interrupted else exitcodes.FAILURE if failed else 0


# --- the requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one test; each has the next wish and the next connection."""

    tally: Tally
    turns: Iterator[tuple[AsyncClient, Wish]]

    async def closed(self, at_once: int, again: Again) -> None:
        """So many are always under way, as long as there is to be another one."""

        async def caller() -> None:
            while again():
                await self._request(_now())

        async with asyncio.TaskGroup() as callers:
            for _ in range(at_once):
                callers.create_task(caller())

    async def open(self, moments: Iterable[float]) -> None:
        """One at each of these moments, seconds from now, whatever has become of the others."""
        began = _now()
        async with asyncio.TaskGroup() as requests:
            for moment in moments:
                await asyncio.sleep(began + moment - _now())
                requests.create_task(self._request(began + moment))

    async def _request(self, due: float) -> None:
        client, wish = next(self.turns)
        request = self.tally.begin(due, _now())
        try:
            async with client.stream(**wish) as stream:
                async for event in stream:
                    if isinstance(event, TextDelta):
                        request.produced(len(event.token_ids), _now())
            request.ended(stream.result.usage, _now())
        except LoopmuxError as error:
            request.failed(error)
        except asyncio.CancelledError:
            request.stopped()
            raise


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _measure(options: argparse.Namespace, wishes: Sequence[Wish], tally: Tally) -> tuple[float, bool]:
    """Run the test: the seconds that it took, and whether Ctrl-C ended it."""
    async with contextlib.AsyncExitStack() as connections:
        clients = [
            await connections.enter_async_context(AsyncClient(options.endpoint)) for _ in range(options.connections)
        ]
        for client in clients:
            await client.status()  # connecting is not measured; without a broker there is nothing to measure
        load = Load(tally, zip(itertools.cycle(clients), itertools.cycle(wishes), strict=False))
        telling = asyncio.create_task(_tell(tally))
        began, interrupted = _now(), False
        try:
            await _run(options, load)
        except asyncio.CancelledError:  # asyncio's answer to the first Ctrl-C; a second one raises
            interrupted = True
        seconds = _now() - began
        telling.cancel()
        await asyncio.wait([telling])
        return seconds, interrupted


def _make_room(connections: int) -> None:
    """Let this process open the files that its connections take: libzmq ends a process that may not.

    Raises:
        BadRequestError: so many are not allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES * connections + _OTHERS
    if hard != resource.RLIM_INFINITY and needed > hard:
        most = max(0, (hard - _OTHERS) // _FILES)
        raise BadRequestError(f"--connections: found {connections}, expected at most {most} with `ulimit -Hn` {hard}")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _run(options: argparse.Namespace, load: Load) -> None:
    if options.rate is None:
        again = lasting(options.seconds) if options.seconds else times(options.requests or _REQUESTS)
        await load.closed(options.at_once or _AT_ONCE, again)
    else:
        count, end = (None, options.seconds) if options.seconds else (options.requests or _REQUESTS, math.inf)
        await load.open(arrivals(options.rate, options.seed or 0, requests=count, seconds=end))


# --- what is shown ----------------------------------------------------------------------------------------------------


async def _tell(tally: Tally) -> None:
    """Progress on standard error until the test is over: on a terminal a line that changes."""
    live = sys.stderr.isatty()
    began = before = _now()
    tokens = 0
    try:
        while True:
            await asyncio.sleep(_LIVE if live else _PLAIN)
            now = _now()
            rate = (tally.tokens - tokens) / (now - before)
            before, tokens = now, tally.tokens
            line = (
                f"{now - began:.0f} s: {tally.ended} ended, {tally.failed.total()} failed, "
                f"{tally.under_way} under way, {rate:.0f} tokens/s"
            )
            shown = f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K" if live else f"{line}\n"
            print(shown, end="", file=sys.stderr, flush=True)
    finally:
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    how = {"rate": options.rate} if options.rate else {"at_once": options.at_once or _AT_ONCE}
    return {"model": options.model, "connections": options.connections, **how}


def render(figures: dict[str, Any]) -> str:
    """The report for people: what became of the requests, how long they took, and why some failed."""
    prompt = figures["prompt_tokens"]
    counts = {
        "REQUESTS": figures["requests"],
        "ENDED": figures["ended"],
        "FAILED": sum(figures["failed"].values()),
        "STOPPED": figures["stopped"],
        "SECONDS": f"{figures['seconds']:.1f}",
        "REQUESTS/S": f"{figures['requests_per_s']:.2f}",
        "TOKENS/S": f"{figures['tokens_per_s']:.0f}",
        "PROMPT TOKENS": prompt,
        "REUSED": f"{figures['reused_tokens'] / prompt:.0%}" if prompt else "",
    }
    rows = {"first token": "first_token_ms", "between tokens": "between_tokens_ms", "latency": "latency_ms"}
    if "rate" in figures:
        rows["sent late"] = "late_ms"
    spreads = [
        (name, str(spread["count"]), *(f"{spread[share]:.2f}" for share in ("p50", "p90", "p99")))
        for name, key in rows.items()
        if (spread := figures[key])
    ]
    first = {code: message.replace("\n", " ") for code, message in figures["errors"].items()}
    failures = [(code, str(count), first[code]) for code, count in figures["failed"].items()]
    parts = [
        table(tuple(counts), [tuple(map(str, counts.values()))]),
        table(("MILLISECONDS", "COUNT", "P50", "P90", "P99"), spreads) if spreads else "",
        table(("FAILURE", "REQUESTS", "THE FIRST ONE"), failures) if failures else "",
    ]
    return "\n\n".join(part for part in parts if part)


# --- what is asked for ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loopmux load", description=__doc__, parents=[arguments.common(), arguments.sampling()]
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", default="default", metavar="MODEL", help="model id (default: default)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--at-once", type=count, metavar="N", help=f"requests under way ({_AT_ONCE})")
    how.add_argument("--rate", type=amount, metavar="R", help="requests that arrive a second, at moments by --seed")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--requests", type=count, metavar="N", help=f"requests in all ({_REQUESTS})")
    limit.add_argument("--seconds", type=amount, metavar="S", help="begin requests for that long instead")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", default="Tell me a story.", metavar="TEXT", help="of every request (%(default)s)")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='asked in turn: lines of JSON objects with "prompt" or "messages" and any other options of the client',
    )
    parser.add_argument("--ignore-eos", action="store_true", help="make every answer --max-new-tokens long")
    parser.add_argument("--connections", type=count, default=1, metavar="N", help="clients (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def count(text: str) -> int:
    """An argument that is a number of things (argparse shows the function's name)."""
    if not (number := int(text)) > 0:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return number


def amount(text: str) -> float:
    """An argument that is a time or a rate."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number above 0")
    return number


def _wishes(options: argparse.Namespace) -> list[Wish]:
    """What to ask for in turn.

    Raises:
        BadRequestError: a request could not be sent, or the file holds none.
    """
    common = {"model": options.model, **arguments.given(options), "ignore_eos": options.ignore_eos}
    if options.prompts is None:
        wish = {**common, "prompt": options.prompt}
        prepare(wish)
        return [wish]
    lines = enumerate(options.prompts.read_bytes().splitlines(), 1)
    wishes = [_wish(line, common, f"{options.prompts}:{number}") for number, line in lines if line.strip()]
    if not wishes:
        raise BadRequestError(f"{options.prompts}: found no line, expected one or more with a JSON object each")
    return wishes


def _wish(line: bytes, common: Wish, where: str) -> Wish:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        raise BadRequestError(f"{where}: {error}; expected a JSON object such as {_EXAMPLE}") from error
    if not isinstance(said, dict):
        raise BadRequestError(f"{where}: found {codec.show(said)}, expected a JSON object such as {_EXAMPLE}")
    wish = common | said
    try:
        prepare(wish)
    except LoopmuxError as error:
        raise BadRequestError(f"{where}: {error}") from error
    return wish


if __name__ == "__main__":
    raise SystemExit(main())
