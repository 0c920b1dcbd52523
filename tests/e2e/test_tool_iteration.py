"""The main job on real weights: tool loops through client, broker and workers with the demo model's adapter."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import loopmux
from e2e import stacks
from e2e.loops import scripted_tools
from loopmux.mcp import MCPServer


@pytest.fixture(scope="module")
def loops(examples: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in examples["loops"] if e["turns"]]


def test_example_loops_make_their_calls_and_answer(demo_stack: stacks.Stack, loops: list[dict[str, Any]]) -> None:
    """All of several turns, some of one; the engine's own tests go through all."""
    loops = [loop for i, loop in enumerate(loops) if len(loop["turns"]) > 1 or i % 3 == 0]
    assert len(loops) >= 24

    def play(example: dict[str, Any]) -> loopmux.ToolLoopResult:
        return client.run_tools(
            example["prompt"], model="tools", tools=scripted_tools(example), temperature=0, concurrency=1
        )

    # Beside each other: a step of an engine costs little more for eight loops than for one.
    with loopmux.Client(demo_stack.endpoint) as client, ThreadPoolExecutor(16) as pool:
        for example, out in zip(loops, pool.map(play, loops), strict=True):
            assert [e["status"] for e in out.tool_log] == ["success"] * sum(
                len(t["calls"]) for t in example["turns"]
            ), example
            assert example["answer_contains"] in out.text, (example["prompt"], out.text)
            assert out.turns == len(example["turns"]) + 1


def test_the_model_calls_the_tool_of_an_mcp_server(demo_stack: stacks.Stack) -> None:
    shop = [sys.executable, str(Path(__file__).parents[1] / "mcpshop.py")]
    with loopmux.Client(demo_stack.endpoint) as client, MCPServer(shop, name="", include=["add"]) as server:
        out = client.run_tools("add 12 and 30", model="tools", tools=[server], temperature=0)
    assert [(entry["tool"], entry["result"]) for entry in out.tool_log] == [("add", 42)]
    assert "42" in out.text


def test_the_prompt_of_each_turn_is_the_one_before_plus_what_is_new_once(
    demo_stack: stacks.Stack, loops: list[dict[str, Any]]
) -> None:
    """The fault that started it all: text that was added to the conversation twice, or not at all."""
    example = max(loops, key=lambda e: len(e["turns"]))
    assert len(example["turns"]) >= 5
    with loopmux.Client(demo_stack.endpoint) as client:
        out = client.run_tools(
            example["prompt"], model="tools", tools=scripted_tools(example), temperature=0, concurrency=1
        )
        texts = [m["content"] for m in out.messages if m["role"] == "tool"]
        assert texts == [str(result) for turn in example["turns"] for result in turn["results"]]
        # Each turn's prompt, rendered by the worker: the one before, the model's own tokens, the results, no more.
        sizes = []
        for n in range(1, len(out.messages) + 1):
            if out.messages[n - 1]["role"] in ("user", "tool"):
                one = client.generate(
                    messages=out.messages[:n], tools=example["tools"], model="tools", max_new_tokens=1, temperature=0
                )
                sizes.append(one.usage.prompt_tokens)
        assert sizes == sorted(set(sizes))
        assert out.usage.prompt_tokens == sum(sizes)


def test_many_loops_share_two_workers(demo_stack: stacks.Stack, loops: list[dict[str, Any]]) -> None:
    example = loops[0]
    with loopmux.Client(demo_stack.endpoint) as client, ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(
                client.run_tools, example["prompt"], model="tools", tools=scripted_tools(example), temperature=0
            )
            for _ in range(6)
        ]
        texts = {job.result().text for job in jobs}
        workers = [w for w in client.status().workers if "tools" in w.models]
    assert len(texts) == 1
    assert all(w.served for w in workers)


def test_the_helper_of_the_system_before(
    demo_stack: stacks.Stack, loops: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPMUX_ENDPOINT", demo_stack.endpoint)
    text = loopmux.run_inference(loopmux.InferenceConfig("Hello", "default", max_new_tokens=40, temperature=0.0))
    assert text
    assert "<|" not in text
    example = loops[0]
    config = loopmux.ToolEnabledInferenceConfig(
        prompt=example["prompt"], model_id="tools", temperature=0.0, tools=scripted_tools(example)
    )
    answer, log = loopmux.run_inference_with_tools(config)
    assert example["answer_contains"] in answer
    assert [entry["status"] for entry in log] == ["success"] * len(log)
