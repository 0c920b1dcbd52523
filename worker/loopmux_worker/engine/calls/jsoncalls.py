"""Calls in JSON: Hermes and Qwen, Llama (whose built-in tools are called in code), Mistral, DeepSeek."""

from __future__ import annotations

import re

from loopmux_worker.engine.calls.bodies import bare_object, enclosed
from loopmux_worker.engine.calls.output import Output
from loopmux_worker.engine.calls.pythoncalls import python_call
from loopmux_worker.engine.calls.source import Source, Waiting, marks
from loopmux_worker.engine.calls.values import Call, MalformedCall, arguments, named

OPEN, CLOSE = "<tool_call>", "</tool_call>"
"""Around a call in the form of Hermes, which others took over."""
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

_LLAMA_KEYS = ("name", "type", "function")
_LLAMA_SIGN = re.compile(r'"(parameters|arguments)"\s*:')


def hermes(source: Source, output: Output, _: str) -> Waiting[None]:
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``."""
    raw, whole = yield from enclosed(source, (CLOSE,), OPEN)
    output.call(raw, named, whole=whole)


def llama(source: Source, output: Output, mark: str) -> Waiting[None]:
    """``{"name": …, "parameters": {…}}`` at the beginning of an answer, or anything behind ``<|python_tag|>``.

    More of them follow behind ``;`` or white space.
    """
    whole: bool | None
    if mark == PYTHON_TAG:
        yield from source.space()
        if not (yield from source.starts("{")):
            yield from _built_in(source, output)
            return
        raw, whole = yield from enclosed(source, ())
    elif output.text.begun:
        raw, whole = mark, None
    else:
        raw, whole = yield from bare_object(source, _LLAMA_KEYS, _LLAMA_SIGN)
    if whole is None:
        output.say(raw)  # an answer that has JSON in it
        return
    output.call(raw, named, whole=whole)
    yield from source.space()
    yield from source.accept(";")


def _built_in(source: Source, output: Output) -> Waiting[None]:
    """Calls of the tools that Llama was trained with, ``name.call(key="value")``, each behind a tag."""
    mark = PYTHON_TAG
    while mark:
        raw: list[str] = []
        mark = yield from source.until(marks(PYTHON_TAG), raw.append)
        output.call("".join(raw).strip(), _llama_call)


def _llama_call(raw: str) -> Call:
    if raw.startswith("{"):
        return named(raw)
    name, given = python_call(raw)
    return name.removesuffix(".call"), given


def mistral(source: Source, output: Output, _: str) -> Waiting[None]:
    """``[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`` or ``[TOOL_CALLS]name[ARGS]{…}``."""
    yield from source.space()
    if (yield from source.accept("[")):
        yield from _mistral_list(source, output)
    else:
        raw, whole = yield from enclosed(source, ())
        output.call(raw, _mistral_call, whole=whole)


def _mistral_list(source: Source, output: Output) -> Waiting[None]:
    while True:
        yield from source.space()
        if (yield from source.starts("{")):
            raw, whole = yield from enclosed(source, ())
            output.call(raw, named, whole=whole)
        elif not (yield from source.accept(",")):
            break
    if not (yield from source.accept("]")) and not (yield from source.done()):
        rest: list[str] = []
        yield from source.until(marks(TOOL_CALLS), rest.append)
        output.call("".join(rest).strip(), named)


def _mistral_call(raw: str) -> Call:
    head, brace, rest = raw.partition("{")
    name, _, between = head.partition(ARGS)
    if between.strip():
        raise MalformedCall(f"found {between[:80]!r} in front of the arguments, expected name{ARGS}{{…}}")
    return name.partition(CALL_ID)[0].strip(), arguments(brace + rest)


def deepseek(source: Source, output: Output, _: str) -> Waiting[None]:
    """``function<｜tool▁sep｜>name`` and the arguments in a fence (V3, R1), or ``name<｜tool▁sep｜>{…}`` (V3.1)."""
    raw, whole = yield from enclosed(source, (CALL_END,), CALL_BEGIN)
    output.call(raw, _deepseek_call, whole=whole)


def _deepseek_call(raw: str) -> Call:
    name, separator, rest = raw.partition(SEPARATOR)
    if not separator:
        raise MalformedCall(f"found no {SEPARATOR} between name and arguments")
    if name.strip() == "function":
        name, _, rest = rest.partition("\n")
    return name.strip(), arguments(rest.strip().removeprefix("```json").removesuffix("```"))
