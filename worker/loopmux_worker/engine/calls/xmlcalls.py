"""Calls in tags, whose values have no quotes: Qwen3-Coder and Qwen3.5, GLM-4.x."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from loopmux_worker.engine.calls.bodies import tagged
from loopmux_worker.engine.calls.jsoncalls import CLOSE, OPEN
from loopmux_worker.engine.calls.output import Output
from loopmux_worker.engine.calls.source import Source, Waiting
from loopmux_worker.engine.calls.values import Call, MalformedCall, Schemas, typed

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"

_FUNCTION_NAME = re.compile(r"<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PART = re.compile(r"<arg_(key|value)>(.*?)</arg_\1>", re.DOTALL)


def qwen(source: Source, output: Output, mark: str) -> Waiting[None]:
    """``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``.

    The outer tag is often forgotten.
    """
    raw = [] if mark == OPEN else [mark]
    end = yield from tagged(source, raw.append, {PARAMETER: PARAMETER_END}, FUNCTION_END, CLOSE)
    if end == FUNCTION_END:
        raw.append(end)
        yield from source.space()
        yield from source.accept(CLOSE)
    output.call("".join(raw).strip(), partial(_qwen_call, output.schemas), whole=bool(end))


def _qwen_call(schemas: Schemas, raw: str) -> Call:
    found = _FUNCTION_NAME.search(raw)
    if found is None:
        raise MalformedCall(f"found no {FUNCTION}name>")
    name = found[1].strip()
    types = schemas.get(name, {})
    return name, {key: typed(value, types.get(key, set())) for key, value in _PARAMETER.findall(raw)}


def glm(source: Source, output: Output, _: str) -> Waiting[None]:
    """``<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>``."""
    raw: list[str] = []
    end = yield from tagged(source, raw.append, {KEY: KEY_END, VALUE: VALUE_END}, CLOSE)
    output.call("".join(raw).strip(), partial(_glm_call, output.schemas), whole=bool(end))


def _glm_call(schemas: Schemas, raw: str) -> Call:
    name = raw.partition(KEY)[0].strip()
    types = schemas.get(name, {})
    parts = _PART.findall(raw)
    keys = [text.strip() for kind, text in parts if kind == "key"]
    if [kind for kind, _ in parts] != ["key", "value"] * len(keys):
        raise MalformedCall(f"expected pairs of {KEY}…{KEY_END} and {VALUE}…{VALUE_END}")
    values: dict[str, Any] = dict(zip(keys, (text for kind, text in parts if kind == "value"), strict=True))
    return name, {key: typed(value, types.get(key, set())) for key, value in values.items()}
