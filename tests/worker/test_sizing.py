"""How many rows fit, what is refused, and the ranges of a worker's specification."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmux.errors import ConfigError
from loopmux.messages import ModelSpec, WorkerSpec
from loopmux_worker.engine import open_engine
from loopmux_worker.engine.slots.sizing import MOST, MOST_ON_GPU, Size, size

MIB = 2**20
GIB = 2**30


def sized(free=10 * GIB, token=1024, model_context=1024, context=None, most=None, gib=None, on_gpu=False):
    return size(token, free, model_context=model_context, context=context, most=most, gib=gib, on_gpu=on_gpu)


def test_plenty_gives_parked_rows_beside_every_running_request():
    assert sized() == Size(4 * MOST, 1024, MOST)
    assert sized(on_gpu=True) == Size(4 * MOST_ON_GPU, 1024, MOST_ON_GPU)
    assert sized(most=3) == Size(12, 1024, 3)


def test_a_budget_is_kept_and_rows_go_before_length_where_no_length_was_asked_for():
    assert sized(gib=8 / 1024) == Size(8, 1024, 8)
    assert sized(gib=2 / 1024) == Size(4, 512, 4)
    assert sized(gib=2 / 1024, context=1024) == Size(2, 1024, 2)
    assert sized(free=100 * MIB, most=60) == Size(60, 512, 60)


def test_too_little_for_what_was_asked_for():
    with pytest.raises(ConfigError, match=r"hold 2048 tokens, which is 1 requests of 1500 tokens; expected room for 2"):
        sized(gib=2 / 1024, context=1500, most=2)


def test_a_budget_of_one_token_is_too_little():
    with pytest.raises(ConfigError, match=r"hold 1 tokens, which is 0 requests of 2 tokens; expected room for 1"):
        sized(gib=1 / 1024, token=MIB)


def test_more_than_is_free_is_refused():
    with pytest.raises(ConfigError, match=r"kv_cache_gib: 64 rows of 1024 tokens take 8.00 GiB; expected at most"):
        sized(free=6 * GIB, token=128 * 1024, gib=64)
    assert sized(free=9 * GIB, token=128 * 1024, gib=64) == Size(64, 1024, 16)  # what would be used counts
    assert sized(free=None, gib=64) == Size(64, 1024, 16)  # nobody can tell


@given(
    free=st.integers(MIB, 64 * GIB),
    token=st.integers(64, MIB),
    model_context=st.integers(2, 200_000),
    context=st.none() | st.integers(2, 200_000),
    most=st.none() | st.integers(1, 300),
    gib=st.none() | st.floats(0.001, 100),
    on_gpu=st.booleans(),
)
def test_what_is_given_fits(free, token, model_context, context, most, gib, on_gpu):
    try:
        found = sized(free, token, model_context, context, most, gib, on_gpu)
    except ConfigError:
        return
    assert found.rows * found.context * token <= min(free, free if gib is None else gib * GIB)
    assert 1 <= found.most <= found.rows
    assert most is None or found.most == most
    assert found.context == (context or found.context) <= max(model_context, context or 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ()}, "worker 'w': models: found none, expected at least one"),
        ({"models": (ModelSpec("m"), ModelSpec("m"))}, "worker 'w': models: found the id 'm' twice"),
        ({"slots": 0}, "worker 'w': slots: found 0, expected a value from 1 to"),
        ({"context": 1}, "worker 'w': context: found 1, expected a value from 2 to"),
        ({"torch_threads": 0}, "worker 'w': torch_threads: found 0, expected a value from 1 to"),
        ({"kv_cache_gib": 0.0}, "worker 'w': kv_cache_gib: found 0.0, expected a value above 0"),
        ({"kv_cache_gib": math.nan}, "worker 'w': kv_cache_gib: found nan, expected a value above 0"),
        ({"kv_cache_gib": math.inf}, "worker 'w': kv_cache_gib: found inf, expected a value above 0"),
    ],
)
def test_a_specification_out_of_range_is_refused_before_anything_is_loaded(change, said):
    with pytest.raises(ConfigError) as caught:
        open_engine(replace(WorkerSpec("w", "", (ModelSpec("m"),), "/nowhere"), **change), lambda *_: None)
    assert caught.value.message.startswith(said)


def test_a_real_model_with_more_than_there_is(tiny_model):
    spec = WorkerSpec("w", "", (ModelSpec("m"),), str(tiny_model.base), slots=10**6, kv_cache_gib=100_000.0)
    with pytest.raises(ConfigError, match=r"kv_cache_gib: 4000000 rows of 256 tokens .* that are free once"):
        open_engine(replace(spec, torch_threads=1), lambda *_: None)
