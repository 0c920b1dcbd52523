import json
import subprocess
import sys

import pytest

from loopmux.errors import AdapterNotFoundError, BadRequestError, ConfigError, ContextLengthError, ModelNotFoundError
from loopmux.messages import Generate, ModelSpec, Run, Sampling, WorkerSpec
from loopmux_worker.engine import open_engine
from loopmux_worker.engine.base import Failed, Finished, Job, Key, Produced
from loopmux_worker.engine.echo import EchoEngine, echo_text, echo_token

KEY = Key(b"q" * 16, 1)
MODELS = (ModelSpec("echo"), ModelSpec("tuned", adapter_dir="anywhere"))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def engine(clock=None, context=None, **settings):
    spec = WorkerSpec("w", "", MODELS, engine="echo", context=context, echo=settings)
    return EchoEngine(spec, clock or Clock())


def job(prefix=(), model="echo", adapter=None, key=KEY, **generate):
    given = {} if {"messages", "prompt_token_ids"} & set(generate) else {"prompt": "a b c"}
    return Job(key, Run(model, adapter), Generate(**given, **generate), prefix)


def drain(some, limit=1000):
    outputs = []
    for _ in range(limit):
        if some.due() is None:
            return outputs
        outputs += some.step()
    raise AssertionError("the engine does not come to an end")


def text(outputs):
    return "".join(o.text for o in outputs if isinstance(o, Produced))


def ids(outputs):
    return [i for o in outputs if isinstance(o, Produced) for i in o.ids]


def calls(outputs):
    return [c for o in outputs if isinstance(o, Produced) for c in o.calls]


def test_tokens_are_a_function_of_request_and_position():
    some = engine(tokens=20)
    some.submit(job())
    outputs = drain(some)
    expected = [echo_token(KEY.request, i) for i in range(20)]
    assert ids(outputs) == expected
    assert text(outputs) == "".join(map(echo_text, expected))
    assert (outputs[-1].reason, outputs[-1].total) == ("stop", 20)
    assert (outputs[-1].usage.prompt_tokens, outputs[-1].usage.completion_tokens) == (3, 20)
    assert echo_token(bytes(16), 0) == echo_token(bytes(16), 0) != echo_token(bytes(16), 1)


def test_max_new_tokens_ends_with_length_and_ignore_eos_goes_on():
    some = engine(tokens=5)
    some.submit(job(max_new_tokens=3))
    assert (drain(some)[-1].reason, some.load().progress) == ("length", 3)
    some.submit(job(max_new_tokens=30, ignore_eos=True))
    assert drain(some)[-1].total == 30


def test_a_stop_token_ends_and_one_beyond_the_vocabulary_is_refused():
    some = engine(tokens=20)
    some.submit(job(stop_token_ids=(echo_token(KEY.request, 4),)))
    assert (drain(some)[-1].reason, some.load().progress) == ("stop", 5)
    with pytest.raises(
        BadRequestError, match=r"stop_token_ids\[0\]: found 4096, this model produces ids from 0 to 4095"
    ):
        some.submit(job(stop_token_ids=(4096,)))


def test_a_prefix_is_not_produced_again():
    some = engine(tokens=10)
    prefix = tuple(echo_token(KEY.request, i) for i in range(4))
    some.submit(job(prefix))
    outputs = drain(some)
    assert outputs[0].position == 4
    assert ids(outputs) == [echo_token(KEY.request, i) for i in range(4, 10)]
    assert outputs[-1].total == 10


def test_a_whole_prefix_only_ends():
    some = engine(tokens=4)
    some.submit(job(tuple(range(4))))
    (only,) = drain(some)
    assert isinstance(only, Finished)


def test_the_rate_holds_over_time():
    clock = Clock()
    some = engine(clock, rate=100, tokens=1000, first_delay=0.5)
    some.submit(job(max_new_tokens=1000))
    assert (some.step(), some.due()) == ([], 0.5)
    clock.now += 0.5
    produced = 0
    assert len(ids(some.step())) == 1
    assert some.due() == pytest.approx(0.01)
    for _ in range(100):
        clock.now += 0.01
        produced += len(ids(some.step()))
    assert 99 <= produced <= 101


def test_cancel_forgets_between_tokens():
    some = engine(tokens=100)
    some.submit(job())
    before = ids(some.step())
    assert some.cancel(KEY).completion_tokens == len(before) == 8
    assert some.cancel(KEY) is None
    assert (some.due(), some.step()) == (None, [])


def test_requests_do_not_disturb_each_other():
    some = engine(tokens=20)
    other = Key(b"p" * 16, 1)
    some.submit(job())
    some.submit(job(key=other))
    outputs = drain(some)
    for key in (KEY, other):
        assert [i for o in outputs if o.key == key and isinstance(o, Produced) for i in o.ids] == [
            echo_token(key.request, i) for i in range(20)
        ]


def test_planned_failures():
    some = engine(tokens=20, fail_after=10)
    some.submit(job())
    outputs = drain(some)
    assert len(ids(outputs)) == 10
    assert (type(outputs[-1]), outputs[-1].usage.completion_tokens, outputs[-1].error.code) == (Failed, 10, "engine")
    some = engine(tokens=20, raise_after=0)
    some.submit(job())
    with pytest.raises(RuntimeError, match="raise_after"):
        some.step()


def test_stop_strings_cut():
    some = engine(tokens=20)
    stop = echo_text(echo_token(KEY.request, 6)).strip()
    some.submit(job(stop=(stop,)))
    outputs = drain(some)
    whole = "".join(echo_text(echo_token(KEY.request, i)) for i in range(20))
    assert text(outputs) == whole[: whole.index(stop)]
    assert (outputs[-1].reason, outputs[-1].total) == ("stop", 7)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
SCRIPT = {"role": "user", "content": '!call add {"a": 1}\n+call mul {"b": "</tool_call>"}\n!call bad {oops\n!say bye ü'}


def play(*behind):
    some = engine()
    some.submit(job(messages=(SCRIPT, *behind), tools=(TOOL,)))
    return drain(some)


def test_scripts_play_a_tool_loop():
    turn = {"role": "assistant", "content": ""}
    result = {"role": "tool", "content": "42"}
    outputs = play()
    assert [(c.name, c.arguments) for c in calls(outputs)] == [("add", {"a": 1}), ("mul", {"b": "</tool_call>"})]
    assert (text(outputs), outputs[-1].reason) == ("", "tool_calls")
    assert "malformed" in calls(play(turn, result, result))[0].error
    assert text(play(turn, turn)) == "bye ü"
    assert text(play(turn, turn, turn, result)) == "42"


def test_refusals():
    some = engine(context=4)
    for bad, error in [
        (job(model="nope"), ModelNotFoundError),
        (job(adapter="nope"), AdapterNotFoundError),
        (job(sampling=Sampling(temperature=-1)), BadRequestError),
        (job(tool_choice="required"), BadRequestError),
        (job(response_format={"type": "object"}), BadRequestError),
        (job(messages=({"role": "user", "content": "far too many words here"},)), ContextLengthError),
    ]:
        with pytest.raises(error):
            some.submit(bad)
    some.submit(job(adapter="tuned", max_new_tokens=10))
    assert drain(some)[-1].total == 1  # the context leaves room for one


@pytest.mark.parametrize(("settings", "reason"), [({"speed": 1}, "echo.speed: an unknown key"), ({"rate": -1}, "rate")])
def test_wrong_settings(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        engine(**settings)


def test_adapters_come_and_go():
    some = engine()
    assert some.load_adapter("new", "folder").id == "new"
    assert some.load_adapter("new", "folder").id == "new"
    with pytest.raises(BadRequestError, match="with other contents"):
        some.load_adapter("new", "another")
    some.submit(job(model="new"))
    some.unload_adapter("new")
    with pytest.raises(ModelNotFoundError):
        some.submit(job(model="new"))
    with pytest.raises(AdapterNotFoundError):
        some.unload_adapter("echo")


def test_the_engine_is_chosen_by_the_specification():
    assert isinstance(open_engine(WorkerSpec("w", "", MODELS, engine="echo"), lambda *_: None), EchoEngine)
    for spec, reason in [
        (WorkerSpec("w", "", MODELS, engine="slots"), "base_model is missing"),
        (WorkerSpec("w", "", (), engine="echo"), "models: found none"),
        (WorkerSpec("w", "", (ModelSpec("a"), ModelSpec("a")), engine="echo"), "twice"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            open_engine(spec, lambda *_: None)


def test_no_torch_is_imported():
    code = (
        "import sys, json; from loopmux_worker.engine import open_engine; import loopmux_worker.server;"
        "from loopmux.messages import *; open_engine(WorkerSpec('w', '', (ModelSpec('e'),), engine='echo'), print);"
        "print(json.dumps([m for m in ('torch', 'transformers', 'peft', 'numpy', 'yaml') if m in sys.modules]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == []
