"""Which engine a worker opens, and that it says so."""

import gc
import sys
from contextlib import nullcontext

import pytest

import enginekit
from loopmux.errors import ConfigError
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_worker.engine import open_engine, opener, opening
from loopmux_worker.engine.opening import ruled_out


@pytest.mark.parametrize(
    ("settings", "device", "version", "reason"),
    [
        ({}, "cpu", "4.57.6", "transformers 4.57.6 is older than 5"),
        ({}, "cuda", "4.57.6", "transformers 4.57.6 is older than 5"),
        ({}, "cpu", "5.0.0rc1", None),
        ({}, "cpu", "5.23.0", None),
        ({}, "cuda", "10.0.0", None),
        ({}, "mps", "5.23.0", "the slots engine was not tried on mps"),
        ({"use_4bit": True}, "cuda", "5.23.0", "the slots engine was not tried on quantised weights"),
        ({"use_8bit": True}, "cuda", "5.23.0", "the slots engine was not tried on quantised weights"),
    ],
)
def test_what_rules_the_slots_engine_out_before_it_is_tried(settings, device, version, reason):
    spec = WorkerSpec("w", "", (ModelSpec("m"),), "base", **settings)
    assert ruled_out(spec, device, version) == reason


def test_an_older_transformers_gets_the_plain_engine_and_this_is_logged_and_reported(tiny_model, monkeypatch):
    monkeypatch.setattr(opening.transformers, "__version__", "4.57.6")
    said = []
    spec = WorkerSpec("w", "", (ModelSpec("m"),), str(tiny_model.base), torch_threads=1, device="cpu")
    engine = open_engine(spec, lambda _, detail: said.append(detail))
    described = engine.describe()
    engine.close()
    why = "transformers 4.57.6 is older than 5"
    assert f"plain engine: {why}" in said
    assert described.engine == described.report["engine"] == "plain"
    assert described.report["why"] == why
    with pytest.raises(ConfigError, match=f"engine: found slots, but {why}; use auto or plain"):
        enginekit.opened(tiny_model.base)


@pytest.mark.parametrize("there", [True, False])
def test_importing_the_libraries_keeps_the_collector_from_them_alone(monkeypatch, there):
    if not there:
        monkeypatch.setitem(sys.modules, opening.__name__, None)
    seen = []
    disable = gc.disable
    monkeypatch.setattr(gc, "disable", lambda: seen.append(disable()))
    try:
        with nullcontext() if there else pytest.raises(ImportError):
            assert opener.__wrapped__() is opening.open_on_model
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert len(seen) == 1
    assert gc.isenabled()
