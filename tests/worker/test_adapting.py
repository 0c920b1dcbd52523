"""Adapters that come at run time: carried out in the engine's thread between steps, beside whatever runs."""

import queue

import pytest

import enginekit
from loopmux.errors import BadRequestError, ConfigError
from loopmux.messages import AdapterOrder, Generate, ModelSpec, Run, WorkerSpec
from loopmux.wire import new_id
from loopmux_worker.driver import Driver
from loopmux_worker.engine.base import Failed, Finished, Job, Key
from loopmux_worker.engine.echo import EchoEngine
from loopmux_worker.events import Adapt, Adapted, Stepped, Submit

ID = b"o" * 16


class Running:
    """An engine in its thread; ``until`` reads what it says."""

    def __init__(self, engine):
        self.rung = queue.SimpleQueue()
        self.driver = Driver(engine, lambda: self.rung.put(None))
        self.driver.start()
        self.outputs = []

    def until_adapted(self):
        while True:
            self.rung.get(timeout=enginekit.PATIENCE)
            for event in self.driver.drain():
                if isinstance(event, Stepped):
                    self.outputs += event.outputs
                if isinstance(event, Adapted):
                    return event

    def until_ended(self, number):
        while (ended := [o for o in self.outputs if isinstance(o, Finished | Failed)]) == [] or len(ended) < number:
            self.rung.get(timeout=enginekit.PATIENCE)
            for event in self.driver.drain():
                self.outputs += event.outputs
        return ended


def job(model, tokens=64):
    return Job(Key(new_id(), 1), Run(model), Generate(prompt="hello there", max_new_tokens=tokens))


@pytest.fixture
def echo():
    engine = EchoEngine(WorkerSpec("w", "", (ModelSpec("m", system_prompt="be very brief"),), echo={"rate": 200.0}))
    running = Running(engine)
    yield running
    assert running.driver.stop(enginekit.PATIENCE)


def test_requests_go_on_while_an_adapter_is_loaded_and_unloaded(echo):
    echo.driver.put(Submit(job("m")))
    echo.driver.put(Adapt(ID, AdapterOrder("m", "loud", "/adapters/loud"), load=True))
    event = echo.until_adapted()
    assert (event.id, event.error) == (ID, None)
    assert [model.id for model in event.description.models] == ["m", "loud"]
    echo.driver.put(Submit(job("loud")))
    echo.driver.put(Adapt(ID, AdapterOrder("m", "loud"), load=False))
    assert [model.id for model in echo.until_adapted().description.models] == ["m"]
    one, other = echo.until_ended(2)
    assert isinstance(one, Finished)
    assert isinstance(other, Finished)  # what used it before went on to its end
    assert one.usage.prompt_tokens == other.usage.prompt_tokens == 5  # the system prompt of the model it was loaded for


@pytest.mark.parametrize("error", [ConfigError("it does not fit"), RuntimeError("a bug")])
def test_what_cannot_be_loaded_harms_nobody(echo, error, monkeypatch):
    def refuse(self, name, directory, like):
        raise error

    monkeypatch.setattr(EchoEngine, "load_adapter", refuse)
    echo.driver.put(Submit(job("m")))
    echo.driver.put(Adapt(ID, AdapterOrder("m", "loud", "/adapters/loud"), load=True))
    event = echo.until_adapted()
    assert event.description is None
    assert str(error) in event.error.message
    assert isinstance(echo.until_ended(1)[0], Finished)


@pytest.mark.parametrize(
    ("due", "adapting", "waits"),
    [(None, False, None), (None, True, 0.01), (0.5, False, 0.5), (0.5, True, 0.5), (0.0, False, 0.0), (0.0, True, 0.0)],
)
def test_only_an_adapter_that_cannot_be_loaded_yet_wakes_an_idle_engine(due, adapting, waits, monkeypatch):
    waited = []

    class NoCommands(queue.SimpleQueue):
        def get(self, timeout=None):
            waited.append(timeout)
            raise queue.Empty

        def get_nowait(self):
            self.get(0.0)

    engine = EchoEngine(WorkerSpec("w", "", (ModelSpec("m"),)))
    monkeypatch.setattr(engine, "due", lambda: due)
    monkeypatch.setattr(engine, "can_load", lambda: False)
    driver = Driver(engine, lambda: None)
    if adapting:
        driver.put(Adapt(ID, AdapterOrder("m", "loud", "/adapters/loud"), load=True))
        driver._turn()
    driver._commands = NoCommands()
    driver._turn()
    assert waited == [waits]


def test_an_adapter_is_asked_as_the_model_is_that_it_is_loaded_for(tiny_model):
    engine = enginekit.opened(tiny_model.base, ModelSpec("base"), ModelSpec("brief", system_prompt="one two three"))
    try:
        engine.load_adapter("red", str(tiny_model.adapters["red"]), "brief")
        engine.load_adapter("blue", str(tiny_model.adapters["blue"]), "base")
        prompts = {name: prompt_tokens(engine, name) for name in ("base", "brief", "red", "blue")}
        assert prompts["base"] == prompts["blue"] < prompts["red"] == prompts["brief"]
        assert engine.describe().report["adapters"].keys() == {"red", "blue"}
        with pytest.raises(BadRequestError, match="with other contents, is served already"):
            engine.load_adapter("red", str(tiny_model.adapters["blue"]), "brief")
    finally:
        engine.close()


def prompt_tokens(engine, model):
    engine.submit(job(model, 1))
    [end] = [o for o in enginekit.drain(engine) if isinstance(o, Finished)]
    return end.usage.prompt_tokens


def test_the_plain_engine_lets_what_runs_end_and_loads_before_the_next_begins(tiny_model):
    engine = enginekit.opened(tiny_model.base, ModelSpec("base"), engine="plain")
    running = Running(engine)
    try:
        for _ in range(3):
            running.driver.put(Submit(job("base", 40)))
        running.driver.put(Adapt(ID, AdapterOrder("base", "red", str(tiny_model.adapters["red"])), load=True))
        running.driver.put(Submit(job("red", 4)))  # refused or run, as the adapter is there by then or not
        event = running.until_adapted()
        assert event.error is None
        ended = [o for o in running.outputs if isinstance(o, Finished)]
        assert len(ended) < 3  # not behind all of them
        produced = [o for o in running.outputs if not isinstance(o, Finished | Failed)]
        assert len({o.key for o in produced}) <= 1 + len(ended)
        running.until_ended(4)
    finally:
        assert running.driver.stop(enginekit.PATIENCE)
