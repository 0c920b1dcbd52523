"""The load test without a stack: its arithmetic, its loops, what it refuses. The rest is among the end-to-end tests."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from itertools import cycle, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import pytest

from loopmux import AsyncClient, ModelNotFoundError, TextDelta, Usage, exitcodes
from loopmux_loadtest import load
from loopmux_loadtest.ends import times
from loopmux_loadtest.tally import Tally, arrivals, percentile

# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_percentiles() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert [percentile([7.0], share) for share in (0.0, 0.5, 0.99)] == [7, 7, 7]
    assert math.isnan(percentile([], 0.5))


def test_arrivals_are_those_of_their_seed() -> None:
    first = list(arrivals(20, 1, requests=50))
    assert first == list(arrivals(20, 1, requests=50)) != list(arrivals(20, 2, requests=50))
    assert len(first) == 50
    end = first[30]
    assert list(arrivals(20, 1, seconds=end)) == first[:30]


def test_arrivals_know_nothing_of_each_other() -> None:
    gaps = [b - a for a, b in pairwise([0.0, *arrivals(20, 0, requests=20_000)])]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 20, rel=0.02)
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.02)  # memoryless
    after_short = [b for a, b in pairwise(gaps) if a < 0.01]
    assert sum(after_short) / len(after_short) == pytest.approx(1 / 20, rel=0.05)


def test_a_request_begins_when_it_was_due_and_tokens_share_the_time_that_they_took() -> None:
    tally = Tally()
    request = tally.begin(due=1.0, now=3.0)
    request.produced(1, 4.0)
    request.produced(4, 5.0)
    assert (tally.under_way, list(tally.latency)) == (1, [])
    request.ended(Usage(10, 5, 4), 5.5)
    assert (tally.under_way, tally.tokens, tally.usage) == (0, 5, Usage(10, 5, 4))
    measured = (tally.late, tally.first, tally.between, tally.latency)
    assert [list(series) for series in measured] == [[2.0], [3.0], [0.25] * 4, [4.5]]


def test_the_report_counts_every_request_once() -> None:
    tally = Tally()
    requests = [tally.begin(0.0, 0.0) for _ in range(5)]
    requests[0].ended(Usage(10, 0, 4), 0.1)
    requests[1].failed(ModelNotFoundError("one"))
    requests[2].failed(ModelNotFoundError("another one"))
    requests[3].produced(2, 1.0)
    requests[3].stopped()
    assert tally.under_way == 1
    figures = tally.figures(2.0)
    assert json.loads(json.dumps(figures)) == figures
    assert figures == {
        "seconds": 2.0,
        "requests": 5,
        "ended": 1,
        "failed": {"model_not_found": 2},
        "stopped": 1,
        "errors": {"model_not_found": "one"},
        "requests_per_s": 0.5,
        "tokens": 2,
        "tokens_per_s": 1.0,
        "prompt_tokens": 10,
        "reused_tokens": 4,
        "first_token_ms": {"p50": 1000.0, "p90": 1000.0, "p99": 1000.0},
        "between_tokens_ms": None,
        "latency_ms": {"p50": 100.0, "p90": 100.0, "p99": 100.0},
        "late_ms": {"p50": 0.0, "p90": 0.0, "p99": 0.0},
    }


# --- the loops --------------------------------------------------------------------------------------------------------


class Client:
    """Answers with one token, once it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = asyncio.Event()
        self.under_way: list[int] = []
        self._now = 0

    def stream(self, prompt: str) -> Client:
        self.asked.append(prompt)
        self._now += 1
        self.under_way.append(self._now)
        return self

    @property
    def result(self) -> Any:
        return type("Result", (), {"usage": Usage(1, 1)})

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._now -= 1

    async def __aiter__(self) -> Any:
        await asyncio.sleep(0)
        await self.answer.wait()
        yield TextDelta("x", (1,))


def turns(client: Client, *prompts: str) -> Iterator[tuple[AsyncClient, dict[str, Any]]]:
    return ((cast("AsyncClient", client), {"prompt": prompt}) for prompt in cycle(prompts))


def test_a_closed_loop_has_always_as_many_under_way() -> None:
    async def main() -> Client:
        client, tally = Client(), Tally()
        client.answer.set()
        await load.Load(tally, turns(client, "a", "b")).closed(3, times(10))
        assert (tally.begun, tally.ended, tally.tokens) == (10, 10, 10)
        return client

    client = asyncio.run(main())
    assert client.asked == ["a", "b"] * 5
    assert (max(client.under_way), client.under_way[3:]) == (3, [3] * 7)


def test_an_open_loop_waits_for_nobody_and_a_cancelled_one_stops_all() -> None:
    async def main() -> Tally:
        client, tally = Client(), Tally()
        running = asyncio.create_task(load.Load(tally, turns(client, "a")).open(n / 1000 for n in range(20)))
        while tally.begun < 20:
            await asyncio.sleep(0.001)
        assert client.under_way == list(range(1, 21))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return tally

    tally = asyncio.run(main())
    assert (tally.begun, tally.stopped, tally.under_way) == (20, 20, 0)


def test_an_open_loop_that_is_behind_counts_from_when_each_was_to_arrive() -> None:
    async def main() -> Tally:
        client, tally = Client(), Tally()
        client.answer.set()
        await load.Load(tally, turns(client, "a")).open([-2.0, -1.0, 0.0])
        return tally

    tally = asyncio.run(main())
    for first, second, _ in (tally.late, tally.first, tally.latency):
        assert (first > 1.9, second > 0.9) == (True, True)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hello", ":2: Expecting value: line 1 column 1 (char 0); expected a JSON object such as"),
        ('["hello"]', ":2: found ['hello'] (list), expected a JSON object such as"),
        ('{"promt": "hello"}', ":2: unknown option 'promt': "),
        ("{}", ":2: found none of them, expected exactly one of prompt, messages, prompt_token_ids"),
        ('{"prompt": "x", "top_p": 2}', ":2: top_p: found 2"),
    ],
)
def test_a_line_that_could_not_be_asked_is_named(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n{line}\n')
    assert load.main(["--prompts", str(file)]) == exitcodes.USAGE
    assert f"{file}{said}" in capsys.readouterr().err


def test_a_file_without_lines_asks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text("\n\n")
    assert load.main(["--prompts", str(file)]) == exitcodes.USAGE
    assert "found no line" in capsys.readouterr().err


def test_a_line_goes_before_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "a", "max_new_tokens": 3}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    words = ["small", "--prompts", str(file), "--max-new-tokens", "9", "--ignore-eos"]
    short, long = load._wishes(load._parser().parse_args(words))
    assert short == {"model": "small", "max_new_tokens": 3, "ignore_eos": True, "prompt": "a"}
    assert (long["max_new_tokens"], long["messages"][0]["content"]) == (9, "b")


@pytest.mark.parametrize(
    "words",
    ["--rate 0", "--rate nan", "--at-once 0", "--seconds inf", "--rate 2 --at-once 2", "--requests 2 --seconds 2"],
)
def test_a_test_that_means_nothing_is_a_usage_error(words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load.main(words.split())
    assert ended.value.code == exitcodes.USAGE


def test_a_request_that_no_engine_could_run_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--max-new-tokens", "0"]) == exitcodes.USAGE
    assert "max_new_tokens: found 0" in capsys.readouterr().err
