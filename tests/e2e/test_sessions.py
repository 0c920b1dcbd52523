"""What a client says about its sessions, and what becomes of their KV rows in a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import loopmux
import tinymodel
from e2e import stacks

ROW = 2 * 2 * 2 * 8 * 4 * tinymodel.CONTEXT  # keys and values, layers, heads, size of a head, float32
PROMPTS = {name: [number] * 60 for number, name in enumerate(("held", "done", "new"), 1)}


@pytest.fixture(scope="module")
def stack(home: Path) -> Iterator[stacks.Stack]:
    """One worker with two KV rows."""
    tinymodel.write_base(home / "tiny")
    config = home / "rows.yaml"
    config.write_text(f"""
environments:
  here: {{path: "{stacks.interpreter(home / "python")}"}}
models:
  default: {{base_model: "{home}/tiny", model_type: base, environment: here, torch_threads: 1, dtype: float32, slots: 1,
             kv_cache_gib: {2.5 * ROW / 2**30:.9f}}}
""")
    stack = stacks.start(config, home, folder=home / "rows")
    yield stack
    assert stack.stop() == 0


def test_a_session_that_is_done_loses_its_row_to_others_and_one_that_waits_for_a_tool_does_not(
    stack: stacks.Stack,
) -> None:
    with loopmux.Client(stack.endpoint, temperature=0, max_new_tokens=2, ignore_eos=True) as client:
        [worker] = stacks.wait_for(lambda: client.status().workers, "the worker to have joined")
        assert worker.report["kv_rows"] == 2

        def turn(name: str) -> loopmux.Usage:
            return client.generate(prompt_token_ids=PROMPTS[name], session=name).usage

        assert [turn("held").cached_tokens, turn("done").cached_tokens] == [0, 0]
        assert turn("held").cached_tokens == turn("done").cached_tokens == 59
        # left alone, the older row would go
        client.hint("held", "waiting_on_tool", 30)
        client.hint("done", "done")
        assert turn("new").cached_tokens == 0
        assert turn("held").cached_tokens == 59
        assert turn("done").cached_tokens == 0
        seen = client.status  # of the last heartbeat
        stacks.wait_for(lambda: seen().workers[0].cached_tokens == 3 * 59, "a heartbeat with the totals")
        assert seen().workers[0].computed_tokens == 4 * 60 + 3 + 1  # and the token of the warm-up
