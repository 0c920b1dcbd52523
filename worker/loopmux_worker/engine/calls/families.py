"""The families of models by the form of their tool calls, and which one a chat template is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loopmux_worker.engine.calls import gemma, harmony, jsoncalls, xmlcalls
from loopmux_worker.engine.calls.envelope import FENCE, envelope, fence
from loopmux_worker.engine.calls.output import Output
from loopmux_worker.engine.calls.parser import Parser, Reasoning, Syntax, prose
from loopmux_worker.engine.calls.pythoncalls import python_list
from loopmux_worker.engine.calls.source import Source
from loopmux_worker.engine.calls.values import schemas


@dataclass(frozen=True, slots=True)
class Family:
    """How models write what is more than text.

    Attributes:
        name: as ``tool_format`` names it.
        tells: texts of which a chat template of this family has one.
        begins: what begins a call, and who reads on behind it.
        inner: other marks of its calls.
        reasoning: what stands around reasoning, as the chat template has it.
        listed: calls may also be a list of code in front of all text, ``[name(key=value)]``.
        channels: everything is a message in a channel: calls, reasoning, and text as well.
    """

    name: str
    tells: tuple[str, ...]
    begins: Mapping[str, Syntax] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    reasoning: Reasoning | None = None
    listed: bool = False
    channels: bool = False

    def tokens(self, *, calls: bool) -> tuple[str, ...]:
        """Marks that may be special tokens: they have to reach the parser, and are never text."""
        around = (self.reasoning.opening, self.reasoning.closing) if self.reasoning else ()
        inner = (*self.begins, *self.inner) if calls else ()
        marks = (*around, *inner, *(harmony.TOKENS if self.channels else ()))
        return tuple(mark for mark in marks if mark[-1] in ">]")

    def lists(self, names: Iterable[str]) -> dict[str, Syntax]:
        """What begins a list of calls of these tools, and who reads on behind it.

        Any bracket would be too little: text may begin with one.
        """
        return {f"[{name}(": python_list for name in names} if self.listed else {}

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether an answer to this prompt begins in the middle of reasoning that the chat template opened."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.opening)

    def parser(self, request: bytes, tools: Sequence[Mapping[str, Any]], *, reasoning: bool = False) -> Parser | None:
        """What reads an answer of this family; None where all of it is text.

        Args:
            request: the request's id; the ids of its calls are made of it.
            tools: what the model may call; without any, whatever looks like a call is text.
            reasoning: it begins in the middle of reasoning.
        """
        calls = bool(tools)
        tokens = self.tokens(calls=calls)
        source, output = Source(), Output(request, schemas(tools), tokens)
        if self.channels:
            return Parser(source, output, harmony.harmony(source, output, calls=calls))
        if not calls and self.reasoning is None:
            return None
        begins = {**self.begins, **self.lists(output.schemas)} if calls else {}
        return Parser(source, output, prose(source, output, begins, tokens, self.reasoning, reasoning=reasoning))


FAMILIES = (
    Family("gpt_oss", ("<|channel|>",), channels=True),
    Family(
        "deepseek",
        (jsoncalls.CALL_BEGIN,),
        {jsoncalls.CALL_BEGIN: jsoncalls.deepseek},
        (jsoncalls.CALLS_BEGIN, jsoncalls.CALLS_END, jsoncalls.CALL_END, jsoncalls.SEPARATOR),
    ),
    Family(
        "glm",
        (xmlcalls.KEY,),
        {jsoncalls.OPEN: xmlcalls.glm},
        (jsoncalls.CLOSE, xmlcalls.KEY, xmlcalls.KEY_END, xmlcalls.VALUE, xmlcalls.VALUE_END),
    ),
    Family(
        "qwen_xml",
        (xmlcalls.FUNCTION,),
        {jsoncalls.OPEN: xmlcalls.qwen, xmlcalls.FUNCTION: xmlcalls.qwen},
        (jsoncalls.CLOSE,),
    ),
    Family(
        "mistral_args",
        (jsoncalls.ARGS,),
        {jsoncalls.TOOL_CALLS: jsoncalls.mistral},
        (jsoncalls.ARGS, jsoncalls.CALL_ID),
    ),
    Family("mistral_list", (jsoncalls.TOOL_CALLS,), {jsoncalls.TOOL_CALLS: jsoncalls.mistral}),
    Family(
        "gemma",
        (*gemma.FORMS, "tool_code", "<start_of_turn>"),
        {**dict.fromkeys(gemma.FORMS, gemma.gemma), gemma.FENCE: gemma.tool_code},
        tuple(mark for form in gemma.FORMS.values() for mark in form),
        listed=True,
    ),
    Family(
        "llama_json",
        (jsoncalls.PYTHON_TAG, '{"name": function name, "parameters"'),
        {"{": jsoncalls.llama, jsoncalls.PYTHON_TAG: jsoncalls.llama},
        listed=True,
    ),
    Family("hermes", (jsoncalls.OPEN,), {jsoncalls.OPEN: jsoncalls.hermes}, (jsoncalls.CLOSE,)),
    Family("envelope", (), {"{": envelope, jsoncalls.OPEN: envelope, FENCE: fence}, (jsoncalls.CLOSE,)),
)
"""In the order in which they are tried: who shares another's marks comes before it. The last one takes the rest."""

BY_NAME = {family.name: family for family in FAMILIES}

_REASONING = (
    Reasoning("<think>", "</think>"),
    Reasoning("[THINK]", "[/THINK]"),
    Reasoning("<|channel>", "<channel|>", "thought"),
)


def family_of(template: str | None, override: str = "auto") -> Family:
    """The family of a chat template; another one's calls where ``override`` names it.

    Args:
        template: None for a model without one, whose answers are text.
        override: a family's name, or ``auto``.
    """
    text = template or ""
    told = next((one for one in FAMILIES if any(tell in text for tell in one.tells)), FAMILIES[-1])
    family = told if override == "auto" else BY_NAME[override]
    around = next((one for one in _REASONING if one.closing in text or one.opening in text), None)
    return replace(family, reasoning=None if family.channels else around)
