"""The demo model through the plain engine: every demonstration that its makers kept has to come out the same here."""

import json
from pathlib import Path

import pytest

from loopmux.messages import Generate, ModelSpec, Run, Sampling, WorkerSpec
from loopmux.wire import new_id
from loopmux_worker.engine import open_engine
from loopmux_worker.engine.base import Finished, Job, Key, Produced

DEMO = Path(__file__).parents[2] / "configs" / "demo"
EXAMPLES = DEMO / "train" / "examples.json"


@pytest.fixture(scope="module")
def engine():
    adapters = (ModelSpec(name, adapter_dir=str(DEMO / "adapters" / name)) for name in ("tools", "shout"))
    spec = WorkerSpec("w", "", (ModelSpec("default"), *adapters), str(DEMO / "base"), torch_threads=1)
    made = open_engine(spec, lambda *_: None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def examples():
    return json.loads(EXAMPLES.read_text())


# half a minute of computing each, for one core that is not shared
pytestmark = pytest.mark.timeout(300)


def turn(engine, model, messages, tools=()):
    generate = Generate(
        messages=tuple(messages), tools=tuple(tools), max_new_tokens=400, sampling=Sampling(temperature=0)
    )
    engine.submit(Job(Key(new_id(), 1), Run(model), generate))
    outputs = []
    while engine.due() is not None:
        outputs += engine.step()
    assert isinstance(outputs[-1], Finished), outputs[-1]
    produced = [output for output in outputs if isinstance(output, Produced)]
    calls = [call for output in produced for call in output.calls]
    return "".join(output.text for output in produced), calls, outputs[-1]


def test_chats(engine, examples):
    """Base and shout in turn, in one process: an adapter that leaked would shout in the base's answers."""
    chats = sorted(examples["chats"], key=lambda chat: chat["question"])
    assert {chat["adapter"] for chat in chats} == {None, "shout"}
    for chat in chats:
        text, calls, end = turn(engine, chat["adapter"] or "default", [{"role": "user", "content": chat["question"]}])
        assert (text, calls, end.reason) == (chat["answer"], [], "stop")


def test_loops(engine, examples):
    assert examples["loops"]
    for loop in examples["loops"]:
        messages = [{"role": "user", "content": loop["prompt"]}]
        for wanted in loop["turns"]:
            text, calls, end = turn(engine, loop["adapter"], messages, loop["tools"])
            assert [{"name": c.name, "arguments": c.arguments} for c in calls] == wanted["calls"], loop["name"]
            assert (text, end.reason, [c.error for c in calls]) == ("", "tool_calls", [None] * len(calls))
            made = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
            ]
            messages.append({"role": "assistant", "content": text, "tool_calls": made})
            for call, result in zip(calls, wanted["results"], strict=True):
                messages.append({"role": "tool", "content": result, "tool_call_id": call.id})
        text, calls, end = turn(engine, loop["adapter"], messages, loop["tools"])
        assert loop["answer_contains"] in text
        assert (calls, end.reason) == ([], "stop")
