"""Adapters that come and go under load: nobody ever gets another adapter's tokens."""

from __future__ import annotations

import random

import pytest

from loopmux.errors import EngineError
from loopmux.messages import Generate, ModelSpec, Run, Sampling, WorkerSpec
from loopmux.wire import new_id, pack_tokens
from loopmux_worker.engine import open_engine
from loopmux_worker.engine.base import Finished, Job, Key, Produced
from tinymodel import write_adapter

PROMPTS = [[(5 * i * i + 7 * i + 13 * n) % 250 for i in range(40)] for n in range(3)]
CONTENTS = ("red", "blue", "green")
REQUESTS = 80


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    green = write_adapter(tiny_model.base, tmp_path_factory.mktemp("green") / "green", seed=9)
    return {"red": str(tiny_model.adapters["red"]), "blue": str(tiny_model.adapters["blue"]), "green": str(green)}


def opened(tiny_model):
    spec = WorkerSpec(
        "w", "", (ModelSpec("base"),), str(tiny_model.base), engine="slots", slots=4, dtype="float32", torch_threads=1
    )
    return open_engine(spec, lambda *_: None)


def job(name, prompt, new):
    generate = Generate(
        prompt_token_ids=pack_tokens(PROMPTS[prompt]), max_new_tokens=new, ignore_eos=True,
        sampling=Sampling(temperature=0),
    )  # fmt: skip
    return Job(Key(new_id(), 1), Run(name), generate)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, folders):
    """What each content makes of each prompt, alone in an engine of its own."""
    found = {}
    for content in (None, *CONTENTS):
        engine = opened(tiny_model)
        if content is not None:
            engine.load_adapter("only", folders[content])
        for prompt in range(len(PROMPTS)):
            engine.submit(job("only" if content else "base", prompt, 16))
            outputs = []
            while engine.due() is not None:
                outputs += engine.step()
            found[content, prompt] = [i for o in outputs if isinstance(o, Produced) for i in o.ids]
    assert len({tuple(tokens[:4]) for tokens in found.values()}) == len(found), "they differ from the beginning"
    return found


@pytest.mark.parametrize("seed", range(2))
def test_churn(tiny_model, folders, undisturbed, seed):
    rng = random.Random(seed)
    engine = opened(tiny_model)
    held = {}  # name: content
    running, tokens = {}, {}  # what each request should get, what it got
    done = cached = refused = swapped = 0
    while done < REQUESTS:
        if len(running) < 6:
            name = rng.choice(["base", *held])
            prompt, new = rng.randrange(len(PROMPTS)), rng.randrange(1, 16)
            one = job(name, prompt, new)
            engine.submit(one)
            running[one.key] = name, undisturbed[held.get(name), prompt][:new]
            tokens[one.key] = []
        name = rng.choice("xyz")
        if name not in held:
            held[name] = rng.choice(CONTENTS)
            engine.load_adapter(name, folders[held[name]])
        elif any(user == name for user, _ in running.values()):
            with pytest.raises(EngineError, match="unload it when they ended"):
                engine.unload_adapter(name)
            refused += 1
        else:
            engine.unload_adapter(name)
            del held[name]
            swapped += 1
        for output in engine.step():
            if isinstance(output, Produced):
                tokens[output.key] += output.ids
                continue
            assert isinstance(output, Finished), output
            assert tokens.pop(output.key) == running.pop(output.key)[1]
            done, cached = done + 1, cached + output.usage.cached_tokens
    assert min(cached, refused, swapped) > 10, "rows were reused, unloading was refused, names changed hands"


def test_another_content_under_the_same_name_finds_nothing_of_the_first(tiny_model, folders, undisturbed):
    engine = opened(tiny_model)

    def ask(prompt=0):
        engine.submit(job("x", prompt, 16))
        outputs = []
        while engine.due() is not None:
            outputs += engine.step()
        return [i for o in outputs if isinstance(o, Produced) for i in o.ids], outputs[-1].usage.cached_tokens

    engine.load_adapter("x", folders["red"])
    assert ask() == (undisturbed["red", 0], 0)
    assert ask() == (undisturbed["red", 0], 39)
    engine.unload_adapter("x")
    engine.load_adapter("x", folders["blue"])
    assert ask() == (undisturbed["blue", 0], 0)
    engine.unload_adapter("x")
    engine.load_adapter("x", folders["red"])
    assert ask() == (undisturbed["red", 0], 0), "what an unloaded adapter computed went with it"
    engine.load_adapter("y", folders["red"])
    engine.submit(job("y", 0, 1))
    outputs = []
    while engine.due() is not None:
        outputs += engine.step()
    assert outputs[-1].usage.cached_tokens == 39, "equal contents are equal, whatever they are called"
