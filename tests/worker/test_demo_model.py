"""The demo model in an engine: every demonstration that its makers kept has to come out the same here.

All run beside each other, base and adapters in the same steps; one after the other they go through the whole stack.
"""

import json
from pathlib import Path

import pytest

import enginekit
from enginekit import of, play, text
from loopmux.messages import ModelSpec
from loopmux.schemacheck import problems
from loopmux_worker.engine.base import Finished, Produced

DEMO = Path(__file__).parents[2] / "configs" / "demo"
EXAMPLES = DEMO / "train" / "examples.json"


@pytest.fixture(scope="module")
def engine():
    adapters = (ModelSpec(name, adapter_dir=str(DEMO / "adapters" / name)) for name in ("tools", "shout"))
    made = enginekit.opened(DEMO / "base", ModelSpec("default"), *adapters, dtype="auto")
    yield made
    made.close()


@pytest.fixture(scope="module")
def examples():
    return json.loads(EXAMPLES.read_text())


# some ten seconds of computing each, for one core that is not shared
pytestmark = pytest.mark.timeout(300)


def turns(engine, asked):
    """What comes of one turn of many conversations: text, calls and end of each.

    Args:
        asked: model, messages and tools of each.
    """
    jobs = [
        enginekit.job(None, model, messages=tuple(messages), tools=tuple(tools), max_new_tokens=400)
        for model, messages, tools in asked
    ]
    outputs = play(engine, jobs)
    found = []
    for one in jobs:
        *produced, end = of(one, outputs)
        assert isinstance(end, Finished), end
        assert all(isinstance(output, Produced) for output in produced)
        found.append((text(produced), [call for output in produced for call in output.calls], end))
    return found


def test_chats(engine, examples):
    """Base and shout in turn: an adapter that leaked would shout in the base's answers."""
    chats = sorted(examples["chats"], key=lambda chat: chat["question"])
    assert {chat["adapter"] for chat in chats} == {None, "shout"}
    asked = [(chat["adapter"] or "default", [{"role": "user", "content": chat["question"]}], ()) for chat in chats]
    for chat, (said, calls, end) in zip(chats, turns(engine, asked), strict=True):
        assert (said, calls, end.reason) == (chat["answer"], [], "stop")


def test_loops(engine, examples):
    assert examples["loops"]
    talks = [(loop, [{"role": "user", "content": loop["prompt"]}]) for loop in examples["loops"]]
    for number in range(1 + max(len(loop["turns"]) for loop, _ in talks)):
        talks = [(loop, messages) for loop, messages in talks if number <= len(loop["turns"])]
        answers = turns(engine, [(loop["adapter"], messages, loop["tools"]) for loop, messages in talks])
        for (loop, messages), (said, calls, end) in zip(talks, answers, strict=True):
            if number == len(loop["turns"]):
                assert loop["answer_contains"] in said
                assert (calls, end.reason) == ([], "stop")
                continue
            wanted = loop["turns"][number]
            assert [{"name": c.name, "arguments": c.arguments} for c in calls] == wanted["calls"], loop["name"]
            assert (said, end.reason, [c.error for c in calls]) == ("", "tool_calls", [None] * len(calls))
            made = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
            ]
            messages.append({"role": "assistant", "content": said, "tool_calls": made})
            for call, result in zip(calls, wanted["results"], strict=True):
                messages.append({"role": "tool", "content": result, "tool_call_id": call.id})


def test_a_forced_call(engine):
    """Asked what it would never call a tool for, it calls the one that it has to, with arguments that fit."""
    parameters = {
        "type": "object",
        "properties": {"town": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "kelvin"]}},
        "required": ["town", "unit"],
    }
    weather = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    one = enginekit.job(
        None, "default", messages=({"role": "user", "content": "Hello"},), tools=(weather,), tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    *produced, end = play(engine, [one])
    (call,) = (call for output in produced for call in output.calls)
    assert (text(produced), end.reason, call.name, call.error) == ("", "tool_calls", "weather", None)
    assert problems(parameters, call.arguments, closed=True) == []
