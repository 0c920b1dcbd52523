"""The load test without a stack: its loops, what it refuses. The rest is among the end-to-end tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import pytest

from loopmux import AsyncClient, TextDelta, Usage, exitcodes
from loopmux_loadtest import load
from loopmux_loadtest.stopping import times
from loopmux_loadtest.tally import Tally

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
    ["--rate 0", "--rate nan", "--at-once 0", "--seconds inf", "--rate 2 --at-once 8", "--requests 100 --seconds 2"],
)
def test_a_test_that_means_nothing_is_a_usage_error(words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        load.main(words.split())
    assert ended.value.code == exitcodes.USAGE


def test_a_request_that_no_engine_could_run_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--max-new-tokens", "0"]) == exitcodes.USAGE
    assert "max_new_tokens: found 0" in capsys.readouterr().err
