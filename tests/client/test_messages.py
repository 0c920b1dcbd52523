from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import typing
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmux import codec, messages, wire
from loopmux.errors import BadRequestError
from loopmux.messages import Generate, Sampling, Submit
from loopmux.results import TokenLogprob, ToolCall
from loopmux.wire import pack_tokens

MESSAGES = [c for c in vars(messages).values() if inspect.isclass(c) and c.__module__ == messages.__name__]
ROUTES = [c for c in MESSAGES if (c.__doc__ or "").startswith("ROUTE")]

# What stands for ``Any`` in messages: JSON that has a MessagePack form.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda c: c.__name__)
def test_the_smallest_and_its_defaults_round_trip(cls: Any) -> None:
    message = _smallest(cls)
    assert codec.unpack(cls, codec.pack(message), codec.BODY_LIMITS) == message


def _smallest(kind: Any) -> Any:
    """The smallest value of an annotated type: fields that have a default are left out."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        missing = dataclasses.MISSING
        needed = [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
        return codec.build(kind, {name: _smallest(hints[name]) for name in needed})
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)[0]
    return () if typing.get_origin(kind) is tuple else kind()


calls = st.builds(ToolCall, st.text(), st.text(), st.dictionaries(st.text(max_size=5), json_values, max_size=3))
floats = st.floats(allow_nan=False)
logprobs = st.builds(
    TokenLogprob,
    st.integers(0, 2**32 - 1),
    floats,
    st.lists(st.tuples(st.integers(0, 9), floats), max_size=3).map(tuple),
)


@given(st.builds(messages.Tok, st.text(), st.lists(calls, max_size=2).map(tuple), st.lists(logprobs).map(tuple)))
@settings(max_examples=50)
def test_output_round_trips(tok: messages.Tok) -> None:
    assert codec.unpack(messages.Tok, codec.pack(tok), codec.BODY_LIMITS) == tok


def test_every_kind_with_a_route_has_a_class_that_fits_the_limits() -> None:
    assert {c.__name__ for c in ROUTES} >= {"Hello", "Welcome", "Submit", "Run", "Register", "Heartbeat", "Catalogue"}
    full = messages.Register(
        "worker", "w", bytes(16), wire.VERSIONS, models=(messages.ServedModel("m" * 20, "f" * 16),) * 64
    )
    packed = codec.pack(full)
    assert len(packed) <= wire.ROUTE_LIMIT
    assert codec.unpack(messages.Register, packed) == full


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", float("inf"), "found inf"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("top_k", -1, "from 0 to"),
        ("min_p", 2.0, "from 0 to 1"),
        ("repetition_penalty", 0.0, "from 0.01 to 100"),
        ("repetition_penalty", 1e-300, "from 0.01 to 100"),
        ("presence_penalty", 101.0, "from -100 to 100"),
        ("frequency_penalty", -101.0, "from -100 to 100"),
        ("seed", -1, "from 0 to"),
        ("logit_bias", {"x": 1.0}, "expected a token id such as '42'"),
        ("logit_bias", {"1" * 5000: 1.0}, "expected a token id such as '42'"),
        ("logit_bias", {"1": 2000.0}, r"logit_bias[1]: found 2000.0"),
    ],
)
def test_sampling_out_of_range(field: str, value: Any, says: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        Generate(prompt="x", sampling=Sampling(**{field: value})).check()
    assert field in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "found none of them, expected exactly one of prompt, messages, prompt_token_ids"),
        ({"prompt": "x", "messages": ({},)}, "found prompt and messages"),
        ({"messages": ()}, "at least one message"),
        ({"prompt_token_ids": b"abc"}, "at least one token id"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"prompt": "x", "stop": ("",)}, "stop: found an empty text"),
        ({"prompt": "x", "stop": ("x",) * 257}, "stop: found 257 texts, expected at most 256"),
        ({"prompt": "x", "stop_token_ids": (3, -1)}, "stop_token_ids[1]: found -1"),
        ({"prompt": "x", "logprobs": 21}, "logprobs: found 21, expected a value from 0 to 20"),
    ],
)
def test_generate_out_of_range(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        Generate(**fields).check()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("made", "field", "lowest", "highest"),
    [
        (Submit, "priority", -100, 100),
        (Submit, "max_new_tokens", 1, 2**31 - 1),
        (Submit, "prompt_size", 0, 4 * 1024 * 1024),
        (Submit, "timeout", math.nextafter(0.0, 1.0), sys.float_info.max),
        (Generate, "max_new_tokens", 1, 2**31 - 1),
        (Generate, "logprobs", 0, 20),
        (Sampling, "temperature", 0.0, 100.0),
        (Sampling, "top_p", math.nextafter(0.0, 1.0), 1.0),
        (Sampling, "top_k", 0, 2**31 - 1),
        (Sampling, "min_p", 0.0, 1.0),
        (Sampling, "repetition_penalty", 0.01, 100.0),
        (Sampling, "presence_penalty", -100.0, 100.0),
        (Sampling, "frequency_penalty", -100.0, 100.0),
        (Sampling, "seed", 0, 2**63 - 1),
    ],
)
def test_the_ends_of_a_range_are_in_it_and_what_is_next_to_them_is_not(
    made: type, field: str, lowest: float, highest: float
) -> None:
    below, above = (
        (lowest - 1, highest + 1)
        if isinstance(lowest, int)
        else (math.nextafter(lowest, -math.inf), math.nextafter(highest, math.inf))
    )
    right: Any = {Submit: Submit("m"), Generate: Generate("x"), Sampling: Sampling()}[made]
    for value in (lowest, highest):
        dataclasses.replace(right, **{field: value}).check()
    for value in (below, above, math.nan):
        with pytest.raises(BadRequestError, match=f"{field}: found"):
            dataclasses.replace(right, **{field: value}).check()


def test_what_is_right_passes() -> None:
    Generate(prompt="").check()
    Generate(messages=({"role": "user", "content": "x"},), sampling=Sampling(0.0, seed=2**63 - 1)).check()
    Generate(prompt_token_ids=pack_tokens([1]), logprobs=0, stop=("a",)).check()
