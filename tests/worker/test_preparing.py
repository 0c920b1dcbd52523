"""Prompts are prepared beside the engine's steps: who is prepared holds up no stream, whatever becomes of it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

import enginekit
from enginekit import PATIENCE, drain, ids, of, until
from loopmux.errors import AdapterNotFoundError, BadRequestError, EngineError
from loopmux.messages import AdapterOrder, ModelSpec, WorkerSpec
from loopmux_worker.driver import Driver
from loopmux_worker.engine import open_engine, templates
from loopmux_worker.engine.base import Failed, Finished
from loopmux_worker.engine.grammars import matching
from loopmux_worker.events import Adapt, Adapted, Cancel, Cancelled, Stepped, Submit

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module", params=["plain", "slots"])
def kind(request):
    return request.param


@pytest.fixture
def engine(tiny_model, kind):
    return enginekit.opened(tiny_model.base, engine=kind)


class Slow:
    """A template that takes its time with the prompt "long", until it is released, and breaks at the prompt "bad"."""

    def __init__(self):
        self.begun, self.release = threading.Event(), threading.Event()
        self.rendered = []
        self._render = templates.render

    def __call__(self, generate, *rest):
        self.rendered.append(generate.prompt)
        if generate.prompt == "long":
            self.begun.set()
            assert self.release.wait(PATIENCE)
        if generate.prompt == "bad":
            raise RuntimeError("boom")
        return self._render(generate, *rest)


@pytest.fixture
def slow(monkeypatch):
    made = Slow()
    monkeypatch.setattr(templates, "render", made)
    yield made
    made.release.set()


class Driven:
    """A driver with what has come out of it."""

    def __init__(self, engine):
        self.driver = Driver(engine, lambda: None)
        self.events = []

    def submit(self, *jobs):
        for one in jobs:
            self.driver.put(Submit(one))

    def seen(self):
        self.events += self.driver.drain()
        return self.events

    def of(self, one):
        return of(one, [output for event in self.seen() if isinstance(event, Stepped) for output in event.outputs])

    def end(self, one):
        until(lambda: self.of(one) and isinstance(self.of(one)[-1], (Finished, Failed)), f"the end of {one.key}")
        return self.of(one)[-1]


@contextmanager
def driving(engine):
    made = Driven(engine)
    made.driver.start()
    try:
        yield made
    finally:
        assert made.driver.stop(PATIENCE)
        assert made.driver.died is None


def job(prompt=None, **more):
    given = {"max_new_tokens": 8, "ignore_eos": True} | more
    return enginekit.job(None, prompt=prompt, **given) if prompt else enginekit.job(PROMPT, **given)


def test_streams_go_on_while_a_prompt_is_prepared(engine, slow):
    running, long = job(max_new_tokens=200), job("long")
    with driving(engine) as driven:
        driven.submit(running)
        until(lambda: len(ids(driven.of(running))) > 3, "a stream")
        driven.submit(long)
        assert slow.begun.wait(PATIENCE)
        assert len(ids(driven.of(running))) < 200, "it runs"
        assert driven.end(running).total == 200
        assert driven.of(long) == []
        until(lambda: (load := driven.seen()[-1].load).running + load.queued == 1, "a load of one request")
        slow.release.set()
        assert driven.end(long).total == 8


def test_streams_go_on_while_a_grammar_is_compiled(engine, monkeypatch):
    begun, release, compile_ = threading.Event(), threading.Event(), matching._compile

    def slow(*given):
        begun.set()
        assert release.wait(PATIENCE)
        return compile_(*given)

    monkeypatch.setattr(matching, "_compile", slow)
    running, held = job(max_new_tokens=100), job(response_format={"type": "boolean"}, max_new_tokens=20)
    with driving(engine) as driven:
        driven.submit(running, held)
        assert begun.wait(PATIENCE)
        assert driven.end(running).total == 100
        assert driven.of(held) == []
        release.set()
        assert driven.end(held).reason == "stop"


def test_requests_run_in_the_order_in_which_they_came(engine, slow, monkeypatch):
    added, add = [], engine.add
    monkeypatch.setattr(engine, "add", lambda prepared: (added.append(prepared.job), add(prepared)))
    jobs = [job("long"), job(), job("short"), job()]
    with driving(engine) as driven:
        driven.submit(*jobs)
        assert slow.begun.wait(PATIENCE)
        slow.release.set()
        assert all(driven.end(one).total == 8 for one in jobs)
    assert added == jobs


def test_everybody_who_is_prepared_joins_the_next_step(tiny_model, monkeypatch):
    engine = enginekit.opened(tiny_model.base)
    added, add = [], engine.add
    monkeypatch.setattr(engine, "add", lambda prepared: (added.append(prepared.job), add(prepared)))
    driver, jobs = Driver(engine, lambda: None), [job() for _ in range(5)]
    driver._preparer.start()
    for n, one in enumerate(jobs, 1):
        driver.put(Submit(one))
        until(lambda n=n: driver._commands.qsize() == 2 * n, "a prompt is prepared")
    driver._turn()
    assert added == jobs
    assert driver.stop(PATIENCE)


def test_what_is_cancelled_before_it_is_prepared_never_runs(engine, slow, monkeypatch):
    added, add = [], engine.add
    monkeypatch.setattr(engine, "add", lambda prepared: (added.append(prepared.job), add(prepared)))
    long, waiting, other = job("long", prefix=(70,)), job("waiting"), job()
    with driving(engine) as driven:
        driven.submit(long, waiting, other)
        assert slow.begun.wait(PATIENCE)
        for one in (long, waiting):
            driven.driver.put(Cancel(one.key))
        until(lambda: sum(isinstance(event, Cancelled) for event in driven.seen()) == 2, "two answers")
        usages = {event.key: event.usage for event in driven.events if isinstance(event, Cancelled)}
        assert (usages[long.key].completion_tokens, usages[waiting.key].completion_tokens) == (1, 0)
        again = replace(long, generate=job().generate, prefix=())
        driven.submit(again)
        slow.release.set()
        assert driven.end(other).total == driven.end(again).total == 8
    assert added == [other, again]
    assert "waiting" not in slow.rendered


def test_a_prompt_that_cannot_be_prepared_fails_alone(engine, slow):
    refused = enginekit.job(None, messages=({"role": "root", "content": "x"},))
    jobs = [job(), job("bad", prefix=(70, 71)), refused, job("good")]
    with driving(engine) as driven:
        driven.submit(*jobs)
        ends = [driven.end(one) for one in jobs]
    assert [type(end) for end in ends] == [Finished, Failed, Failed, Finished]
    assert isinstance(ends[1].error, EngineError)
    assert "boom" in ends[1].error.message
    assert isinstance(ends[2].error, BadRequestError)


def test_stopping_does_not_wait_for_a_prompt(engine, slow):
    with driving(engine) as driven:
        driven.submit(job("long"), job("waiting"))
        assert slow.begun.wait(PATIENCE)
    thread = driven.driver._preparer._thread
    assert thread.is_alive(), "it is still at it"
    slow.release.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert slow.rendered == ["long"]


def test_an_adapter_that_went_while_a_prompt_was_read_is_not_used(engine, tiny_model):
    def load(name):
        engine.load_adapter("x", str(tiny_model.adapters[name]))

    for one in (job(model="x"), job(model="base", adapter="x")):
        load("red")
        prepared = engine.prepare(one)
        engine.unload_adapter("x")
        with pytest.raises(AdapterNotFoundError, match="'x' was unloaded while this request's prompt was read"):
            engine.add(prepared)
        load("blue")
        with pytest.raises(AdapterNotFoundError, match="'x' was unloaded while this request's prompt was read"):
            engine.add(prepared)
        assert engine.due() is None
        engine.submit(one)
        assert drain(engine)[-1].total == 8
        engine.unload_adapter("x")
    engine.close()


def test_an_adapter_that_is_unloaded_waits_for_the_prompts_that_came_before(engine, slow, tiny_model):
    engine.load_adapter("x", str(tiny_model.adapters["red"]))
    before, behind = job("long", model="x"), job("short", model="x")
    with driving(engine) as driven:
        driven.submit(before)
        assert slow.begun.wait(PATIENCE)
        driven.driver.put(Adapt(b"o" * 16, AdapterOrder("base", "x"), load=False))
        driven.submit(behind)
        time.sleep(0.1)  # in which it could be unloaded too early
        slow.release.set()
        assert driven.end(before).total == 8
        assert isinstance(driven.end(behind), Finished | Failed)  # it had not to be waited for
        until(lambda: any(isinstance(event, Adapted) for event in driven.seen()), "an answer")
    [adapted] = [event for event in driven.events if isinstance(event, Adapted)]
    assert adapted.error is None


def test_the_time_in_the_queue_begins_where_the_worker_got_the_request(engine):
    engine.submit(replace(job(), arrived=time.monotonic() - 100))
    timing = drain(engine)[-1].timing
    assert 100 < timing.queued < timing.first_token < timing.total
    engine.close()


def test_an_engine_that_reads_no_prompt_has_no_thread_for_it():
    spec = WorkerSpec("w", "", (ModelSpec("echo"),), engine="echo")
    one = enginekit.job([1, 2], "echo")
    others = set(threading.enumerate())  # drivers of earlier tests may still be ending
    with driving(open_engine(spec, lambda *_: None)) as driven:
        driven.submit(one)
        assert driven.end(one).total == 64
        assert "preparing" not in {thread.name for thread in set(threading.enumerate()) - others}
