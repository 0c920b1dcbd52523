"""How each family of models writes what is guaranteed: calls, answers, reasoning, as texts with places in them. Pure.

The texts are those that ``calls`` reads and chat templates write; a place is a name between per cent signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loopmux_worker.engine.calls import Family, gemma, harmony, jsoncalls, xmlcalls
from loopmux_worker.engine.calls.pythoncalls import TOOL_NAME

NAME, ARGUMENTS, KEY, VALUE, TEXT = "%NAME%", "%ARGUMENTS%", "%KEY%", "%VALUE%", "%TEXT%"


@dataclass(frozen=True, slots=True)
class Named:
    """Arguments that are written one by one instead of as one JSON object.

    Attributes:
        one: an argument, with ``KEY`` and ``VALUE``.
        between: between two of them.
        text: a text as a value, with ``TEXT``; None where texts are JSON like all other values.
        closing: what ends a text, and does not occur in one.
        nested: lists and objects are written like this, too, instead of as JSON.
        key: whether a name can be written.
    """

    one: str
    between: str = ""
    text: str | None = None
    closing: str = ""
    nested: bool = False
    key: Callable[[str], bool] = lambda key: not set(key) & set("<>\n") and key == key.strip()


@dataclass(frozen=True, slots=True)
class Syntax:
    """How calls are written.

    Attributes:
        call: one call, with ``NAME`` and ``ARGUMENTS``.
        opening: what the first one begins with, where that is never text; None where only its end tells a call.
        begin: in front of the first call.
        between: between two calls; None where there is one at most.
        end: behind the last call.
        named: how arguments are written that are no JSON object.
        answer: what is no call, with ``TEXT``.
        name: whether the name of a tool can be written.
    """

    call: str
    opening: str | None = None
    begin: str = ""
    between: str | None = ""
    end: str = ""
    named: Named | None = None
    answer: str = TEXT
    name: Callable[[str], bool] = lambda _: True


_JSON_CALL = f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}'

_SYNTAXES = {
    "hermes": Syntax(f"{jsoncalls.OPEN}\n{_JSON_CALL}\n{jsoncalls.CLOSE}", jsoncalls.OPEN, between="\n"),
    "qwen_xml": Syntax(
        f"{jsoncalls.OPEN}\n{xmlcalls.FUNCTION}{NAME}>\n{ARGUMENTS}{xmlcalls.FUNCTION_END}\n{jsoncalls.CLOSE}",
        jsoncalls.OPEN,
        between="\n",
        named=Named(
            f"{xmlcalls.PARAMETER}{KEY}>\n{VALUE}\n{xmlcalls.PARAMETER_END}\n",
            text=TEXT,
            closing=xmlcalls.PARAMETER_END,
        ),
    ),
    "glm": Syntax(
        f"{jsoncalls.OPEN}{NAME}\n{ARGUMENTS}{jsoncalls.CLOSE}",
        jsoncalls.OPEN,
        between="\n",
        named=Named(
            f"{xmlcalls.KEY}{KEY}{xmlcalls.KEY_END}\n{xmlcalls.VALUE}{VALUE}{xmlcalls.VALUE_END}\n",
            text=TEXT,
            closing=xmlcalls.VALUE_END,
        ),
    ),
    "llama_json": Syntax(f'{{"name": "{NAME}", "parameters": {ARGUMENTS}}}', between="; "),
    "mistral_list": Syntax(_JSON_CALL, jsoncalls.TOOL_CALLS, begin=f"{jsoncalls.TOOL_CALLS} [", between=", ", end="]"),
    "mistral_args": Syntax(f"{jsoncalls.TOOL_CALLS}{NAME}{jsoncalls.ARGS}{ARGUMENTS}", jsoncalls.TOOL_CALLS),
    "gpt_oss": Syntax(
        f"{harmony.CHANNEL}commentary to=functions.{NAME} {harmony.CONSTRAIN}json{harmony.MESSAGE}{ARGUMENTS}",
        between=None,
        answer=f"{harmony.CHANNEL}final{harmony.MESSAGE}{TEXT}",
    ),
    "envelope": Syntax(f'{{"tool": "{NAME}", "args": {ARGUMENTS}}}', between="\n"),
}


def syntax_of(family: Family, template: str) -> Syntax:
    """The syntax of a family, in the form that its chat template has."""
    match family.name:
        case "deepseek":
            return _deepseek("```json" in template)
        case "gemma":
            return _gemma(template)
        case name:
            return _SYNTAXES[name]


def _deepseek(fenced: bool) -> Syntax:
    """``fenced`` up to V3 and R1, in one line from V3.1 on."""
    name, arguments = (f"function{jsoncalls.SEPARATOR}{NAME}", f"\n```json\n{ARGUMENTS}\n```")
    if not fenced:
        name, arguments = NAME, f"{jsoncalls.SEPARATOR}{ARGUMENTS}"
    return Syntax(
        f"{jsoncalls.CALL_BEGIN}{name}{arguments}{jsoncalls.CALL_END}",
        jsoncalls.CALLS_BEGIN,
        begin=jsoncalls.CALLS_BEGIN,
        between="\n" if fenced else "",
        end=jsoncalls.CALLS_END,
    )


def _gemma(template: str) -> Syntax:
    for opening, (closing, quote) in gemma.FORMS.items():
        if opening in template:
            named = Named(
                f"{KEY}:{VALUE}",
                between=",",
                text=f"{quote}{TEXT}{quote}",
                closing=quote,
                nested=True,
                key=lambda key: not set(key) & set('{}[],:"<>') and not any(map(str.isspace, key)),
            )
            return Syntax(f"{opening}call:{NAME}{{{ARGUMENTS}}}{closing}", opening, named=named)
    return Syntax(
        f"{NAME}({ARGUMENTS})",
        gemma.FENCE,
        begin=f"{gemma.FENCE}\n",
        between="\n",
        end="\n```",
        named=Named(f"{KEY}={VALUE}", between=", ", key=str.isidentifier),
        name=lambda name: TOOL_NAME.fullmatch(name) is not None,
    )


def thought_of(family: Family) -> tuple[str, str, str] | None:
    """What stands in front of reasoning, the mark that ends it, and what is behind that; None without reasoning."""
    if family.channels:
        return f"{harmony.CHANNEL}analysis{harmony.MESSAGE}", harmony.END, f"{harmony.START}assistant"
    around = family.reasoning
    return None if around is None else (around.opening + around.label, around.closing, "")
