"""The kinds of tools in the demo data: how each is named, asked for and answered.

A `Spec` is a family; a `Tool` is a member of it as offered in a prompt, with a name for itself and for each parameter.
Invented tools are made by `invent`: they are of no family, so the model has to read the tool line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pools import CITIES, LANGUAGES, NOUNS, PARAMETERS, PEOPLE, UNITS, VERBS, WORDS, Pools

Value = int | str
Drawing = Callable[[Pools], Value]

# How values of a kind are drawn. `int` and `small` are JSON integers, all others strings.
KINDS: dict[str, Drawing] = {
    "int": Pools.integer,
    "small": lambda pools: pools.integer(small=True),
    "city": lambda pools: pools.name(CITIES),
    "person": lambda pools: pools.name(PEOPLE),
    "word": Pools.word,
    "phrase": Pools.phrase,
    "path": Pools.path,
    "unit": lambda pools: pools.rng.choice(UNITS),
    "language": lambda pools: pools.rng.choice(LANGUAGES),
}
NUMERIC = ("int", "small")
# Kinds whose value may be the result of the call before: "send it to Bob", but not "the weather in it".
CHAINED = ("int", "word", "phrase", "person")


@dataclass(frozen=True, slots=True)
class Spec:
    """A family of tools. `asks` are orders that can be chained, `questions` stand alone; `{0}` is the first value.

    `parameters` are sets of names to choose from, one set a call; `kinds` are the kinds of their values. `says` is the
    answer, `{r}` the result, whose kind is `result`.
    """

    names: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    asks: tuple[str, ...]
    questions: tuple[str, ...]
    says: str
    result: str


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool as offered in a prompt: parameter names with JSON types, and the family it comes from."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    spec: Spec

    def schema(self) -> dict[str, object]:
        """The tool as chat templates expect it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.name.replace("_", " ").capitalize() + ".",
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": kind} for name, kind in self.parameters},
                    "required": [name for name, _ in self.parameters],
                },
            },
        }


def _family(
    names: str, parameters: str, kinds: str, asks: str, questions: str = "", says: str = "the result is {r}",
    result: str = "word",
) -> Spec:  # fmt: skip
    """A `Spec` from its lists written in one line each; `|` parts phrases and sets of names."""
    return Spec(
        tuple(names.split()),
        tuple(tuple(each.split()) for each in parameters.split("|")),
        tuple(kinds.split()),
        tuple(asks.split("|")),
        tuple(questions.split("|")) if questions else (),
        says,
        result,
    )


_PAIRS = "a b|x y|first second"
_SUM = "the answer is {r}"
CALCULATORS = (
    _family(
        "add sum",
        _PAIRS,
        "int int",
        "add {0} and {1}|add {0} and {1}|add {0} to {1}|sum {0} and {1}|compute {0} plus {1}",
        "what is {0} plus {1}|what is {0} + {1}|how much is {0} plus {1}|what is the sum of {0} and {1}",
        _SUM,
        "add",
    ),
    _family(
        "subtract minus",
        _PAIRS,
        "int int",
        "subtract {1} from {0}|subtract {1} from {0}|take {1} from {0}|compute {0} minus {1}",
        "what is {0} minus {1}|what is {0} - {1}|how much is {0} minus {1}",
        _SUM,
        "subtract",
    ),
    _family(
        "multiply times",
        _PAIRS,
        "int int",
        "multiply {0} by {1}|multiply {0} by {1}|multiply {0} and {1}|compute {0} times {1}",
        "what is {0} times {1}|what is {0} * {1}|how much is {0} times {1}",
        _SUM,
        "multiply",
    ),
    _family(
        "divide",
        _PAIRS,
        "int int",
        "divide {0} by {1}|compute {0} divided by {1}",
        "what is {0} divided by {1}|what is {0} / {1}",
        _SUM,
        "divide",
    ),
)
OTHERS = (
    _family(
        "get_weather weather",
        "city|location",
        "city",
        "get the weather in {0}|check the weather in {0}|tell me the weather in {0}",
        "what is the weather in {0}|what is the weather in {0}|how is the weather in {0}|what's the weather in {0}|"
        "weather in {0}",
        "the weather in {0} is {r}",
        "weather",
    ),
    _family(
        "get_time time_in",
        "city|location",
        "city",
        "get the time in {0}|check the time in {0}|tell me the time in {0}",
        "what time is it in {0}|what is the time in {0}",
        "the time in {0} is {r}",
        "clock",
    ),
    _family(
        "find_user lookup_user",
        "name|user",
        "person",
        "find the user {0}|find user {0}|look up the user {0}|find {0}",
        "who is {0}|who is the user {0}",
        "the user {0} is {r}",
        "int",
    ),
    _family(
        "send_message message",
        "to text|recipient message",
        "person phrase",
        'send {1} to {0}|send the message {1} to {0}|tell {0} {1}|send "{1}" to {0}|send the message "{1}" to {0}',
        "",
        "the message to {0} is {r}",
        "sent",
    ),
    _family(
        "set_timer timer",
        "minutes|duration",
        "small",
        "set a timer for {0} minutes|start a timer for {0} minutes",
        "",
        "the timer for {0} minutes is {r}",
        "set",
    ),
    _family(
        "search web_search",
        "query|text",
        "phrase",
        'search for {0}|look for {0}|search the web for {0}|search for "{0}"',
        "",
        "I found {r}",
        "found",
    ),
    _family(
        "convert exchange",
        "amount from_currency to_currency|amount from_unit to_unit|value from to",
        "int unit unit",
        "convert {0} {1} to {2}|change {0} {1} to {2}",
        "how much is {0} {1} in {2}|what is {0} {1} in {2}",
        _SUM,
        "int",
    ),
    _family(
        "translate",
        "text language|text target",
        "phrase language",
        'translate {0} to {1}|translate "{0}" to {1}|translate {0} into {1}|translate "{0}" into {1}',
        "how do you say {0} in {1}",
        "the translation is {r}",
        "phrase",
    ),
    _family(
        "read_file open_file",
        "path|file",
        "path",
        "read the file {0}|read {0}|open the file {0}|open {0}",
        "what is in {0}|what is in the file {0}",
        "the file says {r}",
        "phrase",
    ),
    _family(
        "get_price price",
        "item|product",
        "word",
        "get the price of {0}|look up the price of {0}|check the price of {0}",
        "what is the price of {0}|how much does {0} cost",
        "the price of {0} is {r}",
        "int",
    ),
    _family(
        "remember store",
        "key value|name text",
        "word phrase",
        "remember {0} as {1}|store {1} under {0}|remember that {0} is {1}",
        "",
        "the note {0} is {r}",
        "saved",
    ),
    Spec(
        ("get_date", "today"),
        ((),),
        (),
        ("get the date", "check the date"),
        ("what is the date", "what day is it"),
        "the date is {r}",
        "date",
    ),
)
CATALOGUE = CALCULATORS + OTHERS


def offer(pools: Pools, spec: Spec, renamed: float) -> Tool:
    """A member of a family: under any of the family's names in a share `renamed`, else under the usual ones."""
    name, names = spec.names[0], spec.parameters[0]
    if pools.chance(renamed):
        name, names = pools.rng.choice(spec.names), pools.rng.choice(spec.parameters)
    # Whole numbers are offered under both of JSON's names for numbers.
    number = "number" if pools.chance(0.1) else "integer"
    types = [number if kind in NUMERIC else "string" for kind in spec.kinds]
    return Tool(name, tuple(zip(names, types, strict=True)), spec)


def parameter_names(pools: Pools, count: int) -> list[str]:
    """Different names for parameters, real and made up."""
    names: list[str] = []
    while len(names) < count:
        name = pools.fake() if pools.chance(pools.made_up.parameters) else pools.pick(PARAMETERS)
        if name not in names:
            names.append(name)
    return names


def invent(pools: Pools) -> Tool:
    """A tool of no family: one to three parameters, and orders made of its own words."""
    rng = pools.rng
    real = 1 - pools.made_up.tools
    verb, noun = (pools.pick(words) if pools.chance(real) else pools.fake() for words in (VERBS, NOUNS))
    verb = "get" if pools.chance(0.15) else verb
    form = rng.random()
    if form < 0.85:
        name, plain = f"{verb}_{noun}", rng.choice((f"{verb} the {noun}", f"{verb} {noun}", f"{verb} a {noun}"))
    else:
        name, plain = (noun, f"use {noun}") if form < 0.95 else (verb, verb)
    head = plain if pools.chance(0.7) else rng.choice((f"call {name}", f"use {name}", f"run {name}"))
    kinds = [rng.choice(("int", "int", "small", "word", "word", "city", "person")) for _ in
             range(rng.choices((1, 2, 3), (5, 4, 1))[0])]  # fmt: skip
    names = parameter_names(pools, len(kinds))
    values = _listed([f"{{{place}}}" for place in range(len(kinds))])
    named = _listed([f"{parameter} {{{place}}}" for place, parameter in enumerate(names)])
    order = (
        f"{head} with {named}" if pools.chance(0.6) else f"{head} {rng.choice(('for', 'of', 'with', 'on'))} {values}"
    )
    types = ["integer" if kind in NUMERIC else "string" for kind in kinds]
    spec = Spec((name,), (tuple(names),), tuple(kinds), (order,), (), "the result is {r}", rng.choice(("int", "word")))
    return Tool(name, tuple(zip(names, types, strict=True)), spec)


def _listed(items: list[str]) -> str:
    """`a`, `a and b` or `a, b and c`."""
    return " and ".join([part for part in (", ".join(items[:-1]), items[-1]) if part])


def draw_result(pools: Pools, kind: str) -> str:
    """What a tool of a result kind returns."""
    rng = pools.rng
    match kind:
        case "weather":
            sky = rng.choice(("sunny", "rainy", "cloudy", "windy", "clear", "warm", "cold", pools.word()))
            return sky if pools.chance(0.6) else f"{sky}, {rng.randint(-9, 38)} degrees"
        case "clock":
            return f"{rng.randrange(24):02}:{rng.randrange(60):02}"
        case "date":
            return f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        case "found":
            return f"{pools.integer(small=True)} results" if pools.chance(0.5) else pools.phrase(2, 3)
        case "sent" | "set" | "saved":
            return rng.choice((kind, kind, "ok", "done", pools.word()))
        case _:
            return str(KINDS[kind if kind in KINDS else "int"](pools))


__all__ = ["CALCULATORS", "CATALOGUE", "CHAINED", "KINDS", "OTHERS", "WORDS", "Spec", "Tool", "Value", "draw_result",
           "invent", "offer"]  # fmt: skip
