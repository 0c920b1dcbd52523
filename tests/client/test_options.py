from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

import pytest

import loopmux
from loopmux import codec, wire
from loopmux.errors import BadRequestError, PayloadTooLargeError
from loopmux.messages import Generate, Sampling, Submit
from loopmux.options import KNOWN, PromptOptions, merge, prepare
from loopmux.wire import pack_tokens
from loopmux_worker.engine.calls import values

PUBLIC = [
    "model", "adapter", "session", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "stop", "seed", "logprobs", "response_format", "deterministic",
    "ignore_eos", "priority", "timeout", "idle_timeout", "wait", "stop_token_ids", "logit_bias", "tool_choice",
    "parallel_tool_calls", "reasoning", "template_kwargs", "prompt_token_ids", "messages", "prompt",
]  # fmt: skip


def body_of(**options: Any) -> Generate:
    return codec.unpack(Generate, prepare(options).body, codec.BODY_LIMITS)


def test_every_option_of_the_public_surface_is_known() -> None:
    assert set(PUBLIC) <= KNOWN


def test_every_option_but_three_has_a_place_in_the_messages() -> None:
    places = {*Submit.__slots__, *Generate.__slots__, *Sampling.__slots__}
    assert KNOWN - places == {"idle_timeout"}
    assert set(get_type_hints(PromptOptions)) | {"prompt"} == KNOWN


def test_everything_said_arrives() -> None:
    said: dict[str, Any] = {
        "prompt": "Hi",
        "model": "m",
        "adapter": "a",
        "session": "s",
        "max_new_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 5,
        "logit_bias": {42: -1},
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "logprobs": 3,
        "response_format": {"type": "object"},
        "deterministic": True,
        "ignore_eos": True,
        "priority": -2,
        "timeout": 30,
        "idle_timeout": 4,
        "wait": False,
        "cancel_on_disconnect": True,
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "reasoning": False,
        "template_kwargs": {"thinking": True},
        "continues": True,
        "trace": "00-1-2-3",
    }
    ready = prepare(said)
    assert ready.submit == Submit(
        "m",
        "a",
        "s",
        -2,
        30.0,
        7,
        2,
        ready.submit.hashes,
        continues=True,
        wait=False,
        deterministic=True,
        cancel_on_disconnect=True,
        trace="00-1-2-3",
    )
    assert ready.idle_timeout == 4.0
    assert codec.unpack(Generate, ready.body, codec.BODY_LIMITS) == Generate(
        prompt="Hi",
        max_new_tokens=7,
        sampling=Sampling(0.0, 0.5, 3, 0.1, 1.1, 0.2, 0.3, 5, {"42": -1.0}),
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        logprobs=3,
        ignore_eos=True,
        deterministic=True,
        tool_choice="none",
        parallel_tool_calls=False,
        response_format={"type": "object"},
        reasoning=False,
        template_kwargs={"thinking": True},
    )


def test_defaults() -> None:
    ready = prepare({"prompt": "Hi"})
    assert ready.submit == Submit("default", prompt_size=2, hashes=ready.submit.hashes)
    assert body_of(prompt="Hi") == Generate(prompt="Hi")


def test_token_ids_and_messages_stand_in_for_the_prompt() -> None:
    assert body_of(prompt_token_ids=[1, 2**32 - 1]).prompt_token_ids == pack_tokens([1, 2**32 - 1])
    assert prepare({"prompt_token_ids": range(9)}).submit.prompt_size == 9
    conversation = [{"role": "user", "content": "four"}, {"role": "assistant", "content": None}]
    assert body_of(messages=conversation).messages == tuple(conversation)
    assert prepare({"messages": conversation}).submit.prompt_size == 4


def test_the_ids_of_an_earlier_answer_go_packed_however_many_they_are() -> None:
    ids = list(range(70_000))
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "token_ids": ids}
    sent = body_of(messages=[question, answer, question]).messages
    assert sent == (question, {**answer, "token_ids": pack_tokens(ids)}, question)
    assert answer["token_ids"] is ids, "the caller's own"


def hashes(**options: Any) -> tuple[bytes, ...]:
    return prepare(options).submit.hashes


def test_prompts_that_begin_alike_have_the_same_hashes_up_to_there() -> None:
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    other = {"role": "user", "content": "How?"}
    first, second = hashes(messages=[system, question]), hashes(messages=[system, other])
    assert len(first) == len(second) == 2
    assert first[0] == second[0] != first[1] != second[1]
    assert hashes(messages=[system, question, other])[:2] == first
    assert hashes(messages=[question, system])[1] != first[1]  # each goes over what comes before
    assert not set(first) & set(hashes(messages=[system, question], template_kwargs={"thinking": True}))
    assert hashes(prompt="x", temperature=0) == hashes(prompt="x") != hashes(prompt="y")
    assert len(hashes(prompt="x")) == len(hashes(prompt_token_ids=[1, 2])) == 1
    assert all(len(one) == 8 for one in first)


def test_of_many_messages_the_first_and_the_last_ones_have_hashes() -> None:
    messages = [{"role": "user", "content": str(n)} for n in range(100)]
    every = [hashes(messages=messages[: n + 1])[-1] for n in range(100)]
    assert hashes(messages=messages) == (*every[:32], *every[-32:])
    assert hashes(messages=messages[:64]) == tuple(every[:64])


def test_tools_become_schemas() -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    (schema,) = body_of(prompt="x", tools=[add]).tools
    assert "add" in str(schema)
    assert "Add two numbers" in str(schema)


def test_later_layers_win_and_none_is_not_said() -> None:
    assert merge({"model": "a", "seed": 1}, {"model": "b"}, {"seed": None}) == {"model": "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "unknown option 'temprature': did you mean 'temperature'?"),
        ({"zzz": 1}, "unknown option 'zzz': known are adapter, "),
        ({"prompt": b"\xff\xfe"}, r"prompt: found b'\xff\xfe' (bytes), expected a text: decode it first"),
        ({"prompt": 7}, "prompt: found 7 (int), expected a text"),
        ({"prompt": "ab\ud800"}, r"prompt: found the lone surrogate '\ud800' at character 2 (after 'ab')"),
        ({"messages": [{"role": "user", "content": "\udcff"}]}, "messages[0].content: found the lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"text": "\udcff"}]}]}, "messages[0].content[0].text: found"),
        ({"messages": [{"role": "user", 3: "x"}]}, "messages[0]: found the key 3 (int), expected keys that are texts"),
        ({"messages": [{"role": "user", "content": b"x"}]}, "messages[0].content: found b'x' (bytes)"),
        ({"messages": "Hi"}, "messages: found 'Hi' (str), expected a list"),
        ({"messages": ["Hi"]}, "messages[0]: found 'Hi' (str), expected a mapping"),
        ({"messages": []}, "messages: found an empty list"),
        (
            {"messages": [{"role": "assistant", "token_ids": [-1]}]},
            "messages[0].token_ids: token ids must be whole numbers",
        ),
        (
            {"messages": [{"role": "assistant", "token_ids": "12"}]},
            "messages[0].token_ids: found '12' (str), expected a list",
        ),
        ({}, "found none of them, expected exactly one of prompt, messages, prompt_token_ids"),
        ({"prompt": "a", "messages": [{}]}, "found prompt and messages, expected exactly one"),
        ({"prompt_token_ids": []}, "prompt_token_ids: expected at least one token id"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids: token ids must be whole numbers from 0 to 2**32 - 1"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids: found '12' (str), expected a list of token ids"),
        (
            {"prompt_token_ids": bytearray(b"12")},
            "prompt_token_ids: found bytearray(b'12') (bytearray), expected a list",
        ),
        ({"prompt_token_ids": 12}, "prompt_token_ids: found 12 (int), expected a list of token ids"),
        ({"prompt": "x", "temperature": "hot"}, "temperature: found 'hot' (str), expected a number"),
        ({"prompt": "x", "temperature": -1}, "temperature: found -1.0, expected a value from 0 to 100"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature: found nan"),
        ({"prompt": "x", "top_k": 1.5}, "top_k: found 1.5 (float), expected a whole number"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens: found 0, expected a value from 1 to"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens: found True (bool), expected a whole number"),
        ({"prompt": "x", "timeout": 0}, "timeout: found 0 (int), expected a number of seconds above 0"),
        ({"prompt": "x", "timeout": float("inf")}, "timeout: found inf"),
        ({"prompt": "x", "idle_timeout": "1"}, "idle_timeout: found '1' (str)"),
        ({"prompt": "x", "stop": [""]}, "stop: found an empty text"),
        ({"prompt": "x", "stop": b"end"}, "stop: found b'end' (bytes)"),
        (
            {"prompt": "x", "stop_token_ids": [5, -1]},
            "stop_token_ids[1]: found -1, expected a value from 0 to 4294967295",
        ),
        ({"prompt": "x", "stop_token_ids": [2**32]}, "stop_token_ids[0]: found 4294967296"),
        ({"prompt": "x", "stop_token_ids": ["a"]}, "stop_token_ids[0]: found 'a' (str), expected a whole number"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias: found the key 'a', expected a token id"),
        ({"prompt": "x", "logit_bias": 3}, "logit_bias: found 3 (int), expected a mapping"),
        ({"prompt": "x", "model": ""}, "model: found an empty text, expected a model id"),
        ({"prompt": "x", "model": 3}, "model: found 3 (int), expected a text"),
        (
            {"prompt": "x", "priority": 2**70},
            "priority: found 1180591620717411303424, expected a value from -100 to 100",
        ),
        ({"prompt": "x", "priority": -101}, "priority: found -101"),
        ({"prompt": "x", "seed": 10**400}, "seed: found 1000"),
        ({"prompt": "x", "temperature": 10**400}, "temperature: found 1000"),
        ({"prompt": "x", "timeout": 10**400}, "timeout: found 1000"),
        ({"prompt": "x", "seed": 2**70}, "seed: found"),
        (
            {"prompt": "x", "session": "s" * 10_000},
            "session: found a text of 10000 characters; model, adapter, session",
        ),
        (
            {"prompt": "x", "template_kwargs": {"n": [2**64]}},
            "template_kwargs.n[0]: found 18446744073709551616 (int), expected a number of no more than 64 bits",
        ),
        ({"prompt": "x", "template_kwargs": {"f": print}}, "template_kwargs.f: found <built-in function print>"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        prepare(options)
    assert message in str(caught.value)


def test_what_can_be_submitted_can_be_attached() -> None:
    """With a fingerprint, whose room has to be there from the beginning."""
    longest = 0
    for size in range(3600, 4000, 4):
        try:
            submit = prepare({"prompt": "x", "trace": "t" * size}).submit
        except BadRequestError:
            break
        longest = size
        attached = dataclasses.replace(submit, fingerprint="f" * 64)
        assert len(codec.pack(attached)) <= wire.SUBMIT_ROUTE_LIMIT
    assert longest > 3700


def test_what_is_nested_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(BadRequestError, match="nested more than"):
        prepare({"messages": [{"role": "user", "content": endless}]})


def test_the_deepest_call_that_workers_read_can_go_back_in_a_message() -> None:
    arguments: dict[str, Any] = {"a": 1}
    for _ in range(62):
        arguments = {"a": arguments}
    values.check("t", arguments)
    function = {"name": "t", "arguments": arguments}
    calls = [{"id": "c", "type": "function", "function": function}]
    prepare({"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]})
    with pytest.raises(values.MalformedCall):
        values.check("t", {"a": arguments})


def test_a_request_larger_than_a_message_is_refused() -> None:
    with pytest.raises(PayloadTooLargeError, match="at most 4194304 are accepted"):
        prepare({"prompt": "x" * (wire.CLIENT_BODY_LIMIT + 1)})


def test_sync_and_async_clients_have_the_same_methods() -> None:
    def surface(client: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(client).items()
            if not name.startswith("_") and callable(member)
        }

    assert surface(loopmux.Client) == surface(loopmux.AsyncClient)
    streams = [{n for n in vars(s) if not n.startswith("_")} - {"wait"} for s in (loopmux.Stream, loopmux.AsyncStream)]
    assert streams[0] == streams[1]
