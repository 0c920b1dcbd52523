"""Whole conversations with tools: requests, calls, results and answers, and how they hang together.

`then` in a request means one call a turn, each after the result before it; `and` means several calls in one turn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from catalogue import CATALOGUE, Spec, Tool, Value, clock, draw_value, invent, offer
from chats import NO_TOOL, chat_turn, dress
from pools import DAYS, Pools

Message = dict[str, object]

CALCULATORS = tuple(spec for spec in CATALOGUE if spec.result in ("add", "subtract", "multiply", "divide"))
OTHERS = tuple(spec for spec in CATALOGUE if spec not in CALCULATORS)
_REFERENCES = ("the result", "the result", "the result", "it", "that", "the answer", "the last result")
_THEN = (
    ", then ",
    ", then ",
    " and then ",
    ", and then ",
    ". Then ",
    "; then ",
    ", after that ",
    ". After that, ",
    ". Next, ",
)
_AND = (" and ", " and ", " and also ", ", and ", ". Also ", " and at the same time ", ", also ")
_WRAPS = (
    ("", ""),
    ("", ""),
    ("", ""),
    ("", ""),
    ("please ", ""),
    ("can you ", "?"),
    ("could you ", "?"),
    ("", " please"),
    ("I want you to ", ""),
    ("hey, ", ""),
    ("now ", ""),
    ("I need you to ", ""),
)
_ERRORS = ("not found", "unknown value", "timeout", "permission denied", "service down", "bad request", "try later")
# "turn on the result" and the like make no sense.
_NEVER_REFERENCED = ("unit", "language", "day", "clock", "thing", "path", "symbol")
# Numbers of more digits than training data shows are not worth chaining.
_LARGEST = 10**9


@dataclass(frozen=True, slots=True)
class Step:
    """One call: the words that order it, the call, its result and the answer that fits it."""

    order: str
    name: str
    arguments: dict[str, Value]
    result: str
    says: str


@dataclass(slots=True)
class Conversation:
    """A finished conversation. `role` is who answers: `assistant`, or `solver` in base training (see train.py)."""

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    kind: str = "chat"
    role: str = "assistant"


def text_of(value: Value) -> str:
    """How a request writes a value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def draw_result(pools: Pools, kind: str) -> str:
    """What a tool of a result kind returns."""
    rng = pools.rng
    match kind:
        case "int" | "add" | "subtract" | "multiply" | "divide":
            return str(pools.integer())
        case "small":
            return str(pools.integer(small=True))
        case "number":
            return str(pools.decimal() if pools.chance(0.6) else pools.integer())
        case "word":
            return pools.word()
        case "phrase":
            return pools.phrase(1, 4)
        case "clock":
            return clock(pools)
        case "code":
            return pools.code()
        case "date":
            return (
                rng.choice(DAYS[:7]) if pools.chance(0.5) else f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
            )
        case "weather":
            sky = rng.choice(("sunny", "rainy", "cloudy", "windy", "snow", "clear", "fog", "warm", "cold", "storm"))
            degrees = rng.choice((f"{rng.randint(-9, 38)} C", f"{rng.randint(-9, 38)} degrees", pools.word()))
            return rng.choice((sky, sky, f"{sky}, {degrees}", f"{sky} and {degrees}", degrees))
        case "record":
            record = {
                rng.choice(("id", "user", "name", "code")): rng.choice((pools.integer(), pools.word())),
                rng.choice(("age", "count", "mail", "size")): rng.choice((pools.integer(True), pools.word())),
            }
            return rng.choice(
                (
                    str(pools.integer()),
                    pools.code(),
                    pools.word(),
                    pools.phrase(1, 2),
                    json.dumps(record) if pools.chance(0.3) else pools.code(),
                )
            )
        case "found":
            return rng.choice((pools.phrase(2, 5), f"{pools.integer(True)} results", "no results"))
        case "sent" | "set" | "saved" | "gone" | "on" | "off":
            return rng.choice((kind, kind, "ok", "done", "ready", pools.word()))
        case _:
            return rng.choice((str(pools.integer()), pools.word(), pools.phrase(1, 3)))


def compute(kind: str, arguments: list[Value]) -> str | None:
    """The true result of a calculation, or None when there is none to show in a few digits."""
    if len(arguments) != 2 or not all(isinstance(value, int | float) for value in arguments):
        return None
    left, right = float(arguments[0]), float(arguments[1])
    if kind == "divide" and right == 0:
        return None
    table = {
        "add": left + right,
        "subtract": left - right,
        "multiply": left * right,
        "divide": left / right if right else 0.0,
    }
    if kind not in table:
        return None
    value = round(table[kind], 2)
    if all(isinstance(given, int) for given in arguments) and kind == "divide":
        value = float(int(value))
    if abs(value) >= _LARGEST:
        return None
    return str(int(value)) if value == int(value) else str(value)


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


class Author:
    """Writes conversations for one split: `unseen` is the share of invented tools among those that are called."""

    def __init__(self, pools: Pools, unseen: float) -> None:
        self.pools = pools
        self.unseen = unseen
        self.numeric = "integer"
        self.known: list[Tool] = []

    # -- tools -------------------------------------------------------------------------------------------------

    def tool(self, calculators: bool = False) -> Tool:
        """A tool to call; one that the conversation has already, where the new one would be like it."""
        tool = self._draw(calculators)
        for known in self.known:
            if alike(tool, known):
                return known
        self.known.append(tool)
        return tool

    def _draw(self, calculators: bool) -> Tool:
        pools = self.pools
        if calculators:
            return offer(pools, pools.rng.choice(CALCULATORS), self.numeric)
        if pools.chance(self.unseen):
            return invent(pools)
        # Calculators and the like are asked for most often in demonstrations.
        specs = CALCULATORS if pools.chance(0.25) else OTHERS
        return offer(pools, pools.rng.choice(specs), self.numeric)

    def offered(self, used: list[Tool], low: int = 0, high: int = 3) -> list[Tool]:
        """The tools of a prompt: those used and some that are not, in any order, no two alike."""
        pools = self.pools
        tools = list(used)
        for _ in range(pools.rng.choice((low, low, *range(low, high + 1)))):
            other = (
                invent(pools)
                if pools.chance(max(0.35, self.unseen))
                else offer(pools, pools.rng.choice(CATALOGUE), self.numeric)
            )
            if not any(alike(other, tool) for tool in tools):
                tools.append(other)
        pools.rng.shuffle(tools)
        return tools

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self, tool: Tool, before: Step | None = None, question: bool = False, must: bool = False) -> Step | None:
        """A call of `tool`. With `before`, one value may be its result, named by a word; None if `must` cannot be."""
        pools = self.pools
        spec = tool.spec
        order = pools.rng.choice(spec.questions if question and spec.questions else spec.asks)
        values = [draw_value(pools, slot.kind, self.numeric) for slot in spec.slots]
        values = [
            str(value) if kind == "string" else value for value, (_, kind) in zip(values, tool.parameters, strict=True)
        ]
        texts = [text_of(value) for value in values]
        place = self._reference(tool, order, before)
        if before is not None and place is not None and (must or pools.chance(0.75)):
            values[place] = _fitting(before.result, tool.parameters[place][1])
            texts[place] = pools.rng.choice(_REFERENCES)
        elif must:
            return None
        arguments = {name: value for (name, _), value in zip(tool.parameters, values, strict=True)}
        result = self.result(spec, values)
        shown = [text_of(value) for value in values]
        return Step(order.format(*texts), tool.name, arguments, result, spec.says.format(*shown, r=result))

    def result(self, spec: Spec, values: list[Value]) -> str:
        """What the call returns: mostly true for calculators, but not always, so that the model copies it."""
        true = compute(spec.result, values) if self.pools.chance(0.6) else None
        return true if true is not None else draw_result(self.pools, spec.result)

    def _reference(self, tool: Tool, order: str, before: Step | None) -> int | None:
        """The slot that can take the result of the step before: the first of fitting type outside quotes."""
        if before is None or len(before.result.split()) > 2 or before.result.startswith(("{", "error")):
            return None
        numeric = _number(before.result)
        fits = []
        for index, (_, kind) in enumerate(tool.parameters):
            if f'"{{{index}}}"' in order or tool.spec.slots[index].kind in _NEVER_REFERENCED:
                continue
            whole = isinstance(numeric, int)
            if kind == "string" or (kind == "integer" and whole) or (kind == "number" and numeric is not None):
                fits.append(index)
        if not fits:
            return None
        return fits[0] if self.pools.chance(0.75) else self.pools.rng.choice(fits)

    # -- requests ----------------------------------------------------------------------------------------------

    def single(self) -> tuple[str, list[list[Step]]]:
        """One call."""
        tool = self.tool()
        question = bool(tool.spec.questions) and self.pools.chance(0.5)
        step = self.step(tool, question=question)
        assert step is not None
        return self.request(step.order, question), [[step]]

    def chain(self, length: int) -> tuple[str, list[list[Step]]]:
        """`length` calls, one a turn."""
        pools = self.pools
        calculators = pools.chance(0.45 * (1 - self.unseen))
        kinds = pools.rng.randint(1, min(length, 4)) if pools.chance(0.6) else length
        tools: list[Tool] = []
        while len(tools) < kinds:
            tool = self.tool(calculators)
            if not any(alike(tool, other) for other in tools):
                tools.append(tool)
            elif calculators:
                kinds -= 1
        steps: list[Step] = []
        while len(steps) < length:
            tool = tools[len(steps)] if len(steps) < len(tools) else pools.rng.choice(tools)
            step = self.step(tool, steps[-1] if steps else None, question=not steps and pools.chance(0.12))
            if step is not None:
                steps.append(step)
        return self.request(self._sequence([step.order for step in steps])), [[step] for step in steps]

    def _sequence(self, orders: list[str]) -> str:
        """Orders in a row, the same linking word throughout or a new one each time."""
        pools = self.pools
        form = pools.rng.random()
        if form < 0.1:
            return "\n".join(f"{index}. {order}" for index, order in enumerate(orders, 1))
        first = "first " if pools.chance(0.15) else ""
        links = [pools.rng.choice(_THEN)] * len(orders) if form < 0.5 else pools.rng.choices(_THEN, k=len(orders))
        if len(orders) > 2 and pools.chance(0.35):
            # "add ..., multiply ..., then subtract ...": a list of orders that ends in "then".
            links[1 : len(orders) - 1] = [", "] * (len(orders) - 2)
        text = first + orders[0]
        for link, order in zip(links[1:], orders[1:], strict=True):
            text += link + order
        if pools.chance(0.1):
            text = text.replace(links[-1] + orders[-1], ". Finally, " + orders[-1])
        return text

    def parallel(self, count: int) -> tuple[str, list[list[Step]]]:
        """Several calls in one turn, of one tool or of several."""
        pools = self.pools
        tools = [self.tool()]
        if pools.chance(0.5):
            for _ in range(count - 1):
                other = self.tool()
                if not any(alike(other, tool) for tool in tools):
                    tools.append(other)
        one = tools[0].spec
        if len(tools) == 1 and len(one.slots) == 1 and one.slots[0].kind in ("city", "person", "symbol", "path", "int"):
            return self._spread(tools[0], count)
        if len(tools) == 1 and not one.slots:
            # The same call twice would make no sense.
            return self.parallel(count)
        chosen = [tools[index % len(tools)] for index in range(count)]
        question = pools.chance(0.25) and all(tool.spec.questions for tool in chosen)
        steps = [step for tool in chosen if (step := self.step(tool, question=question)) is not None]
        text = steps[0].order
        link = pools.rng.choice(_AND)
        for step in steps[1:-1]:
            text += pools.rng.choice((", ", ", ", link)) + step.order
        return self.request(text + link + steps[-1].order, question), [steps]

    def _spread(self, tool: Tool, count: int) -> tuple[str, list[list[Step]]]:
        """One order for several values: "the weather in Paris and in Rome"."""
        pools = self.pools
        question = bool(tool.spec.questions) and pools.chance(0.6)
        order = pools.rng.choice(tool.spec.questions if question else tool.spec.asks)
        steps: list[Step] = []
        values: list[str] = []
        for _ in range(count):
            step = self.step(tool)
            assert step is not None
            steps.append(step)
            values.append(text_of(next(iter(step.arguments.values()))))
        word = " in " if " in {0}" in order and pools.chance(0.5) else " "
        listed = ("," + word).join(values[:-1]) + pools.rng.choice((" and", " and", ", and", " and also")) + word
        return self.request(order.format(listed + values[-1]), question), [steps]

    def gather(self) -> tuple[str, list[list[Step]]]:
        """Two calculations in one turn, then one on both results."""
        pools = self.pools
        tools = [self.tool(calculators=True)]
        while len(tools) < 2:
            other = self.tool(calculators=True)
            if not alike(other, tools[0]):
                tools.append(other)
        first, second = self.step(tools[0]), self.step(pools.rng.choice(tools))
        assert first is not None
        assert second is not None
        last = pools.rng.choice(tools)
        values = [_fitting(step.result, kind) for step, (_, kind) in zip((first, second), last.parameters, strict=True)]
        result = self.result(last.spec, values)
        verb = {"add": "add", "subtract": "subtract", "multiply": "multiply", "divide": "divide"}[last.spec.result]
        order = f"{verb} {pools.rng.choice(('the results', 'the two results', 'both results'))}"
        arguments = {name: value for (name, _), value in zip(last.parameters, values, strict=True)}
        third = Step(order, last.name, arguments, result, f"the answer is {result}")
        text = first.order + pools.rng.choice((" and ", ", and ")) + second.order + pools.rng.choice(_THEN) + order
        return self.request(text), [[first, second], [third]]

    def request(self, text: str, question: bool = False) -> str:
        """A request as typed: a wrapping, a capital, a mark at the end."""
        before, after = ("", "?") if question else self.pools.rng.choice(_WRAPS)
        text = before + text + after
        if self.pools.chance(0.75):
            text = text[0].upper() + text[1:]
        if question:
            return text if self.pools.chance(0.8) else text[:-1]
        return text if text.endswith("?") or self.pools.chance(0.5) else text + "."

    # -- conversations -----------------------------------------------------------------------------------------

    def exchange(self, kind: str) -> list[Message]:
        """One request of a kind, its calls, results and answer."""
        if kind == "chat":
            question, answer = chat_turn(self.pools.rng)
            return [user(question), {"role": "assistant", "content": answer}]
        if kind.startswith("chain"):
            text, turns = self.chain(int(kind[5:]))
        elif kind.startswith("parallel"):
            text, turns = self.parallel(int(kind[8:]))
        else:
            text, turns = self.gather() if kind == "gather" else self.single()
        messages = [user(text)]
        for steps in turns:
            messages.append(call_message(steps))
            messages += [{"role": "tool", "content": step.result} for step in steps]
        if kind == "single" and self.pools.chance(0.04):
            error = self.pools.rng.choice(_ERRORS) if self.pools.chance(0.5) else self.pools.phrase(1, 3)
            messages[-1]["content"] = f"error: {error}"
            messages.append({"role": "assistant", "content": f"Sorry, the tool failed: {error}."})
        else:
            messages.append({"role": "assistant", "content": answer_text([step.says for step in turns[-1]])})
        return messages

    def conversation(self, kinds: list[str], system: str | None = None, others: int = 3) -> Conversation:
        """A conversation of one exchange per kind, over one list of tools, up to `others` of them not needed."""
        self.numeric = "number" if self.pools.chance(0.3) else "integer"
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.known = []
        for kind in kinds:
            messages += self.exchange(kind)
        return Conversation(messages, self.offered(self.known, 0, others), kinds[0])

    def refusal(self) -> Conversation:
        """A request whose tool is not in the list, or that comes without any list."""
        self.numeric = "integer"
        spec = self.pools.rng.choice(CATALOGUE)
        tool = offer(self.pools, spec, self.numeric)
        question = bool(spec.questions) and self.pools.chance(0.5)
        step = self.step(tool, question=question)
        assert step is not None
        words = set(step.order.lower().split())
        tools = (
            []
            if self.pools.chance(0.4)
            else [other for other in self.offered([], 1, 4) if not alike(other, tool) and not words & _words_of(other)]
        )
        messages: list[Message] = [user(self.request(step.order, question)), {"role": "assistant", "content": NO_TOOL}]
        return Conversation(messages, tools, "refusal")


def _words_of(tool: Tool) -> set[str]:
    return set(tool.name.split("_"))


def alike(one: Tool, other: Tool) -> bool:
    """Whether two tools could be taken for each other: the same name, or members of one family."""
    if one.name == other.name or one.spec is other.spec:
        return True
    return bool({one.name, *one.spec.names} & {other.name, *other.spec.names})


def _fitting(result: str, kind: str) -> Value:
    """A result as a value for a parameter of a JSON type."""
    number = _number(result)
    return result if kind == "string" or number is None else number


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def call_message(steps: list[Step]) -> Message:
    """An assistant turn of calls."""
    calls = [
        {"id": f"call_{index}", "type": "function", "function": {"name": step.name, "arguments": step.arguments}}
        for index, step in enumerate(steps)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def answer_text(says: list[str]) -> str:
    """The final answer for the results of the last turn."""
    for head, plural in (("the answer is ", "The answers are "), ("the result is ", "The results are ")):
        if len(says) > 1 and all(said.startswith(head) for said in says):
            values = [said[len(head) :] for said in says]
            return plural + ", ".join(values[:-1]) + " and " + values[-1] + "."
    joined = ", ".join(says[:-1]) + " and " + says[-1] if len(says) > 1 else says[0]
    return joined[0].upper() + joined[1:] + "."


__all__ = ["Author", "Conversation", "Message", "Step", "answer_text", "compute", "dress"]
