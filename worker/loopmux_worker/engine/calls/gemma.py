"""Calls of Google's Gemma models: with tokens around them and around texts (FunctionGemma, Gemma 4), or as code."""

from __future__ import annotations

import json
import re

from loopmux_worker.engine.calls.bodies import tagged
from loopmux_worker.engine.calls.output import Output
from loopmux_worker.engine.calls.pythoncalls import python_calls
from loopmux_worker.engine.calls.source import Source, Waiting
from loopmux_worker.engine.calls.values import Call, MalformedCall, arguments

FENCE = "```tool_code"
FORMS = {
    "<start_function_call>": ("<end_function_call>", "<escape>"),
    "<|tool_call>": ("<tool_call|>", '<|"|>'),
}
"""What begins a call, to what ends it and what stands around texts."""

_KEY = re.compile(r'([{,]\s*)([^\s{}\[\],:"]+)\s*:')


def gemma(source: Source, output: Output, mark: str) -> Waiting[None]:
    """``call:name{key:value}`` between two tokens, where a third one stands around texts."""
    closing, quote = FORMS[mark]
    raw: list[str] = []
    end = yield from tagged(source, raw.append, {quote: quote}, closing)
    output.call("".join(raw).strip(), lambda text: _gemma_call(text, quote), whole=bool(end))


def _gemma_call(raw: str, quote: str) -> Call:
    name, brace, rest = raw.removeprefix("call:").partition("{")
    if not raw.startswith("call:"):
        raise MalformedCall(f"found {raw[:80]!r}, expected call:name{{…}}")
    # Texts stand at the odd places; between them keys need their quotes to make JSON of it
    parts = (brace + rest).split(quote)
    written = [json.dumps(part) if at % 2 else _KEY.sub(r'\1"\2":', part) for at, part in enumerate(parts)]
    return name.strip(), arguments("".join(written))


def tool_code(source: Source, output: Output, _: str) -> Waiting[None]:
    """Calls as Python code in a fence."""
    yield from python_calls(source, output, "```")
