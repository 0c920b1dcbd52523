"""Adapters that come and go under load: nobody ever gets another adapter's tokens."""

from __future__ import annotations

import random

import pytest

import enginekit
from enginekit import drain, ids
from loopmux.errors import AdapterNotFoundError, BadRequestError
from loopmux_worker.engine.base import Finished, Produced
from tinymodel import write_adapter

PROMPTS = [[(5 * i * i + 7 * i + 13 * n) % 250 for i in range(40)] for n in range(3)]
CONTENTS = ("red", "blue", "green")
REQUESTS = 80


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    green = write_adapter(tiny_model.base, tmp_path_factory.mktemp("green") / "green", seed=9)
    return {"red": str(tiny_model.adapters["red"]), "blue": str(tiny_model.adapters["blue"]), "green": str(green)}


def opened(tiny_model):
    return enginekit.opened(tiny_model.base, slots=4)


def job(name, prompt, new):
    return enginekit.job(PROMPTS[prompt], name, max_new_tokens=new, ignore_eos=True)


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
            found[content, prompt] = ids(drain(engine))
    assert len({tuple(tokens[:4]) for tokens in found.values()}) == len(found), "they differ from the beginning"
    return found


@pytest.mark.parametrize("seed", range(2))
def test_churn(tiny_model, folders, undisturbed, seed):
    rng = random.Random(seed)
    engine = opened(tiny_model)
    held = {}  # name: content
    running, tokens = {}, {}  # what each request should get, what it got
    done = cached = drained = swapped = 0
    while done < REQUESTS:
        if len(running) < 6:
            name = rng.choice(["base", *held])
            prompt, new = rng.randrange(len(PROMPTS)), rng.randrange(1, 16)
            one = job(name, prompt, new)
            engine.submit(one)
            running[one.key] = name, undisturbed[held.get(name), prompt][:new]
            tokens[one.key] = []
        name = rng.choice("xyz")
        used = any(user == name for user, _ in running.values())
        if name in held:
            engine.unload_adapter(name)
            del held[name]
            drained, swapped = drained + used, swapped + (not used)
        elif used:
            with pytest.raises(BadRequestError, match="is being unloaded"):
                engine.load_adapter(name, folders["red"])
            with pytest.raises(AdapterNotFoundError, match="is being unloaded"):
                engine.submit(job(name, 0, 1))
        else:
            held[name] = rng.choice(CONTENTS)
            engine.load_adapter(name, folders[held[name]])
        for output in engine.step():
            if isinstance(output, Produced):
                tokens[output.key] += output.ids
                continue
            assert isinstance(output, Finished), output
            assert tokens.pop(output.key) == running.pop(output.key)[1]
            done, cached = done + 1, cached + output.usage.cached_tokens
        described = engine.describe()
        assert set(described.adapters) == set(held)
        assert set(described.report["unloading"]) == {user for user, _ in running.values()} - {"base", *held}
    assert min(cached, drained, swapped) > 10, "rows were reused, unloading had to wait, names changed hands"


def test_another_content_under_the_same_name_finds_nothing_of_the_first(tiny_model, folders, undisturbed):
    engine = opened(tiny_model)

    def ask(prompt=0):
        engine.submit(job("x", prompt, 16))
        outputs = drain(engine)
        return ids(outputs), outputs[-1].usage.cached_tokens

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
    assert drain(engine)[-1].usage.cached_tokens == 39, "equal contents are equal, whatever they are called"
