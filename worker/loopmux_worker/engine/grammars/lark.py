"""From what is guaranteed to a grammar, in the syntax in which a family of models writes it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loopmux.errors import BadRequestError
from loopmux_worker.engine.calls import Family
from loopmux_worker.engine.grammars.arguments import Arguments
from loopmux_worker.engine.grammars.asked import Asked, Tool
from loopmux_worker.engine.grammars.rules import Rules
from loopmux_worker.engine.grammars.syntaxes import ARGUMENTS, NAME, TEXT, Syntax, syntax_of, thought_of


def grammar(
    asked: Asked, family: Family, template: str, added: Mapping[str, int], ends: Iterable[int], *, thinks: bool = False
) -> str:
    """The grammar, in llguidance's dialect of Lark.

    Args:
        family: whose calls they are.
        template: the chat template, which tells between forms of one family.
        added: the tokenizer's added tokens.
        ends: token ids that end an output.
        thinks: it begins in the middle of reasoning.

    Raises:
        BadRequestError: the family's calls cannot be guaranteed like that.
    """
    rules, syntax = Rules(added, ends), syntax_of(family, template)
    if asked.tools:
        _calls(rules, syntax, family, asked.tools, several=asked.several)
    before, behind = syntax.answer.split(TEXT)
    if asked.answer is not None:
        rules.add("answer", f"{rules.text(before)} {rules.json('json', asked.answer)} {rules.text(behind)}")
    if asked.forced:
        body = "calls"
    elif asked.answer is not None:
        body = "answer | calls" if asked.tools else "answer"
    elif family.channels:
        said = rules.prose("prose", _marks(family, asked.tools))
        body = f"{rules.text(before)} {said} {rules.text(behind)} | calls"
    else:
        body = _calls_in_text(rules, syntax, family, asked)
    rules.add("start", f"{_thought(rules, family, thinks=thinks)} ({body})")
    return rules.written


def _calls(rules: Rules, syntax: Syntax, family: Family, tools: Iterable[Tool], *, several: bool) -> None:
    """``calls``: one or more of them; and ``rest``: all of them from behind the first one's beginning."""
    before, behind = syntax.call.split(NAME)
    middle, close = behind.split(ARGUMENTS)
    bodies = []
    for i, tool in enumerate(tools):
        if not syntax.name(tool.name):
            raise BadRequestError(
                f"tools: found the name {tool.name!r}, expected one that {family.name} calls can hold: it begins "
                "with a letter, a digit or _"
            )
        if syntax.named is None:
            arguments = rules.json(f"arguments{i}", tool.arguments)
        else:
            arguments = rules.add(f"arguments{i}", Arguments(rules, tool, syntax.named, family.name, f"a{i}").written())
        bodies.append(f"{rules.text(tool.name + middle)} {arguments}")
    called = rules.add("called", f"({' | '.join(bodies)}) {rules.text(close)}")
    more = f" ({rules.text(syntax.between + before)} {called})*" if several and syntax.between is not None else ""
    rules.add("rest", f"{called}{more} {rules.text(syntax.end)}")
    rules.add("calls", f"{rules.text(syntax.begin + before)} rest")


def _calls_in_text(rules: Rules, syntax: Syntax, family: Family, asked: Asked) -> str:
    """Calls wherever there may be text, which holds nothing that a call begins with."""
    opening, often = syntax.opening, "*" if asked.several else "?"
    if opening is None:
        raise BadRequestError(
            f"strict: a call in the format {family.name} begins like any text, so nothing can be guaranteed of it "
            "where text may stand, too: use tool_choice 'required' or a tool's name, or leave strict out"
        )
    marks = _marks(family, asked.tools)
    if rules.is_token(opening):
        return f"{rules.prose('prose', marks)} (calls prose){often}"
    first = (syntax.begin + syntax.call.split(NAME)[0]).removeprefix(opening)
    opened = rules.prose_up_to("opened", opening, marks)
    return f"({opened} {rules.text(first)} rest){often} {rules.prose('prose', marks)}"


def _marks(family: Family, tools: Iterable[Tool]) -> tuple[str, ...]:
    """What is never text."""
    return (*family.begins, *family.tokens(calls=True), *family.lists(tool.name for tool in tools))


def _thought(rules: Rules, family: Family, *, thinks: bool) -> str:
    """Reasoning in front of everything else, as Lark: where it has begun, or may."""
    thought = thought_of(family)
    if thought is None:
        return ""
    opening, closing, behind = thought
    text = f"{rules.prose_up_to('thought', closing)} {rules.text(behind)} /\\n{{0,2}}/"
    return text if thinks else f"({rules.text(opening)} {text})?"
