"""Whole conversations with tools: requests, calls, results and answers, and how they hang together.

`then` in a request means one call a turn, each after the result before it; `and` means several calls in one turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from catalogue import CALCULATORS, CATALOGUE, CHAINED, KINDS, OTHERS, Spec, Tool, draw_result, invent, offer
from chats import chat_turn
from pools import Pools

Message = dict[str, object]

_REFERENCES = ("the result", "the result", "it")
_THEN = (", then ", ", then ", " and then ", ". Then ")
_AND = (" and ", " and ", " and also ")
_WRAPS = (("", ""),) * 4 + (("please ", ""), ("can you ", "?"))
# Kinds that one request can list: "the weather in Paris and in Rome".
_LISTED = ("city", "person", "path", "word")
# Results of more digits than requests have are not worth learning: a made-up one takes their place.
_LARGEST = 10**6


@dataclass(frozen=True, slots=True)
class Step:
    """One call: the words that order it, the call, its result and the answer that fits it."""

    order: str
    name: str
    arguments: dict[str, int | float | str]
    result: str
    says: str


@dataclass(slots=True)
class Conversation:
    """A finished conversation. `role` is who answers: `assistant`, or another in base training (see corpus.py)."""

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    kind: str = "chat"
    role: str = "assistant"


def compute(kind: str, left: float, right: float) -> str | None:
    """The true result of a calculation with at most two decimals, or None when there is none to show."""
    if kind == "divide" and right == 0:
        return None
    match kind:
        case "add":
            value = left + right
        case "subtract":
            value = left - right
        case "multiply":
            value = left * right
        case "divide":
            value = round(left / right, 2)
        case _:
            return None
    if abs(value) >= _LARGEST:
        return None
    return str(int(value)) if value == int(value) else str(round(value, 2))


def number(text: str) -> int | float | None:
    """The number that a result is, or None."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return None


class Author:
    """Writes conversations for one split.

    `unseen` is the share of invented tools among those that are called, `renamed` that of other names for the others.
    """

    def __init__(self, pools: Pools, unseen: float, renamed: float = 0.08) -> None:
        self.pools = pools
        self.unseen = unseen
        self.renamed = renamed
        self.known: list[Tool] = []

    # -- tools -------------------------------------------------------------------------------------------------

    def tools(self, count: int, calculators: bool = False) -> list[Tool]:
        """Different tools to call; one that the conversation has already, where a new one would be like it."""
        chosen: list[Tool] = []
        while len(chosen) < count:
            if calculators:
                tool = self._offer(CALCULATORS)
            elif self.pools.chance(self.unseen):
                tool = invent(self.pools)
            else:
                tool = self._offer(CALCULATORS if self.pools.chance(0.3) else OTHERS)
            tool = next((known for known in self.known if alike(tool, known)), tool)
            if tool not in chosen:
                chosen.append(tool)
            if tool not in self.known:
                self.known.append(tool)
        return chosen

    def _offer(self, families: tuple[Spec, ...]) -> Tool:
        return offer(self.pools, self.pools.rng.choice(families), self.renamed)

    def offered(self, most: int) -> list[Tool]:
        """The tools of a prompt in any order: those called and up to `most` that are not."""
        pools = self.pools
        tools = list(self.known)
        for _ in range(pools.rng.randint(0, most)):
            other = invent(pools) if pools.chance(0.4) else self._offer(CATALOGUE)
            if not any(alike(other, tool) for tool in tools):
                tools.append(other)
        pools.rng.shuffle(tools)
        return tools

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self, tool: Tool, before: Step | None = None, order: str = "") -> Step:
        """A call of `tool`; mostly one of its values is the result of the call before, named by a word."""
        pools, spec = self.pools, tool.spec
        order = order or pools.rng.choice(spec.asks)
        values: list[int | float | str] = [KINDS[kind](pools) for kind in spec.kinds]
        texts = [str(value) for value in values]
        if before is not None and pools.chance(0.85):
            takes = self._places(tool, order, before.result)
            if takes:
                place = takes[0] if pools.chance(0.8) else pools.rng.choice(takes)
                values[place] = fitting(before.result, tool.parameters[place][1])
                texts[place] = pools.rng.choice(_REFERENCES)
        result = self.result(spec, values)
        arguments = {name: value for (name, _), value in zip(tool.parameters, values, strict=True)}
        says = spec.says.format(*(str(value) for value in values), r=result)
        return Step(order.format(*texts), tool.name, arguments, result, says)

    def _places(self, tool: Tool, order: str, result: str) -> list[int]:
        """Parameters that can take a result: of fitting kind and type, not in quotes."""
        return [
            place
            for place, (kind, (_, type_)) in enumerate(zip(tool.spec.kinds, tool.parameters, strict=True))
            if kind in CHAINED
            and f'"{{{place}}}"' not in order
            and (type_ == "string" or number(result) is not None)
            and len(result.split()) < 3
        ]

    def result(self, spec: Spec, values: list[int | float | str]) -> str:
        """What the call returns: mostly true for calculators, but not always, so that the model copies it."""
        if spec in CALCULATORS and self.pools.chance(0.7):
            left, right = (float(value) for value in values)
            true = compute(spec.result, left, right)
            if true is not None:
                return true
        return draw_result(self.pools, spec.result)

    # -- requests ----------------------------------------------------------------------------------------------

    def single(self) -> tuple[str, list[list[Step]]]:
        """One call."""
        tools = self.tools(1)
        question = self._question(tools[0].spec)
        step = self.step(tools[0], order=question)
        return self._request(step.order, bool(question)), [[step]]

    def chain(self, length: int) -> tuple[str, list[list[Step]]]:
        """`length` calls, one a turn."""
        pools = self.pools
        calculators = pools.chance(0.4 * (1 - self.unseen))
        tools = self.tools(min(length, pools.rng.choice((2, 3) if calculators else (1, 2, 3, 4, 5, 6))), calculators)
        steps: list[Step] = []
        for place in range(length):
            tool = tools[place] if place < len(tools) else pools.rng.choice(tools)
            steps.append(self.step(tool, steps[-1] if steps else None))
        link = pools.rng.choice(_THEN)
        links = [link if pools.chance(0.7) else pools.rng.choice(_THEN) for _ in steps[1:]]
        text = "first " if pools.chance(0.1) else ""
        text += steps[0].order + "".join(link + step.order for link, step in zip(links, steps[1:], strict=True))
        return self._request(text), [[step] for step in steps]

    def parallel(self, count: int) -> tuple[str, list[list[Step]]]:
        """Several calls in one turn, of one tool or of several."""
        pools = self.pools
        tools = self.tools(pools.rng.choice((1, count)))
        spec = tools[0].spec
        if not spec.kinds and len(tools) == 1:
            return self.parallel(count)  # The same call twice would make no sense.
        if len(tools) == 1 and len(spec.kinds) == 1 and spec.kinds[0] in _LISTED:
            return self._spread(tools[0], count)
        steps = [self.step(tools[place % len(tools)]) for place in range(count)]
        link = pools.rng.choice(_AND)
        text = ", ".join(step.order for step in steps[:-1]) + link + steps[-1].order
        return self._request(text), [steps]

    def _spread(self, tool: Tool, count: int) -> tuple[str, list[list[Step]]]:
        """One order for several values: "the weather in Paris and in Rome"."""
        question = self._question(tool.spec)
        order = question or self.pools.rng.choice(tool.spec.asks)
        steps = [self.step(tool) for _ in range(count)]
        values = [str(next(iter(step.arguments.values()))) for step in steps]
        again = " in " if " in {0}" in order and self.pools.chance(0.5) else " "
        listed = ("," + again).join(values[:-1]) + " and" + again + values[-1]
        return self._request(order.format(listed), bool(question)), [steps]

    def gather(self) -> tuple[str, list[list[Step]]]:
        """Two calculations in one turn, then one on both results."""
        tools = self.tools(2, calculators=True)
        pair = [self.step(tool) for tool in tools]
        last = tools[0]
        if len(last.parameters) != len(pair):
            return self.gather()  # an invented tool of the conversation has a calculator's name
        values: list[int | float | str] = [fitting(step.result, type_) for step, (_, type_) in
                                           zip(pair, last.parameters, strict=True)]  # fmt: skip
        result = self.result(last.spec, values)
        arguments = {name: value for (name, _), value in zip(last.parameters, values, strict=True)}
        order = f"{last.spec.result} the results"
        third = Step(order, last.name, arguments, result, f"the answer is {result}")
        text = pair[0].order + " and " + pair[1].order + self.pools.rng.choice(_THEN) + order
        return self._request(text), [pair, [third]]

    def _question(self, spec: Spec) -> str:
        return self.pools.rng.choice(spec.questions) if spec.questions and self.pools.chance(0.5) else ""

    def _request(self, text: str, question: bool = False) -> str:
        """A request as typed: a wrapping, a capital, a mark at the end."""
        before, after = ("", "?") if question else self.pools.rng.choice(_WRAPS)
        text = before + text
        if self.pools.chance(0.75):
            text = text[0].upper() + text[1:]
        if after:
            return text + after if self.pools.chance(0.8) else text
        return text + "." if self.pools.chance(0.5) else text

    # -- conversations -----------------------------------------------------------------------------------------

    def exchange(self, kind: str) -> list[Message]:
        """One request of a kind, its calls, results and answer."""
        if kind == "chat":
            question, answer = chat_turn(self.pools.rng)
            return [user(question), assistant(answer)]
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
        if kind == "single" and self.pools.chance(0.02):
            error = self.pools.phrase(1, 3)
            messages[-1]["content"] = f"error: {error}"
            return [*messages, assistant(f"Sorry, the tool failed: {error}.")]
        return [*messages, assistant(answer_text([step.says for step in turns[-1]]))]

    def conversation(self, kinds: list[str], system: str | None = None, others: int = 3) -> Conversation:
        """A conversation of one exchange per kind over one list of tools, up to `others` of them not needed."""
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.known = []
        for kind in kinds:
            messages += self.exchange(kind)
        return Conversation(messages, self.offered(others), kinds[0])


def alike(one: Tool, other: Tool) -> bool:
    """Whether two tools could be taken for each other: the same name, or members of one family."""
    return one.spec is other.spec or bool({one.name, *one.spec.names} & {other.name, *other.spec.names})


def fitting(result: str, type_: str) -> int | float | str:
    """A result as a value for a parameter of a JSON type."""
    value = number(result)
    return result if type_ == "string" or value is None else value


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}


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
