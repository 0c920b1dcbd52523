"""A conversation continues by token ids: what the model said is read as it said it, not as a template writes it. Pure.

A template writes a call with white space of its own, which makes other tokens, and some leave out earlier reasoning. So
the conversation is written as a text, the places of the model's answers are looked for in it, and each that is found
gets the ids that the model produced. Where the template writes a turn otherwise than it stood when the model answered,
or without what the model said between control tokens, the text counts: that part is computed again, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from jinja2 import TemplateError

from loopmux_worker.engine.marks import Marks

Write = Callable[[int, bool], str]
"""So many messages from the beginning as the template writes them, marked; with True up to where the model answers."""


class Prompt(NamedTuple):
    """A prompt's token ids; ``rewritten`` counts the ids of answers that are not among them as they were produced."""

    ids: list[int]
    rewritten: int = 0


def prompt(
    write: Write, count: int, answers: Mapping[int, list[int]], marks: Marks, ends: Collection[int], *, stops: bool
) -> Prompt:
    """The prompt for the next turn of a conversation.

    Args:
        write: writes messages.
        count: how many there are.
        answers: by the place of its message, the ids that the model produced for it.
        marks: of the tokenizer.
        ends: token ids that end an answer.
        stops: an answer may also have ended at a stop string, which its message does not have.
    """
    text = write(count, True)
    ids: list[int] = []
    at = rewritten = 0
    for index, said in sorted(answers.items()):
        place = None if stops and said[-1] not in ends else _place(write, text, index, said, marks, ends)
        if place is None:
            rewritten += len(said)
        else:
            ids += _encoded(text[at : place[0]], at, marks) + said
            at = place[1]
    return Prompt(ids + _encoded(text[at:], at, marks), rewritten)


def _encoded(piece: str, at: int, marks: Marks) -> list[int]:
    return marks.encode_inside(piece) if at else marks.encode(piece, start=False)


def _place(
    write: Write, text: str, index: int, said: list[int], marks: Marks, ends: Collection[int]
) -> tuple[int, int] | None:
    """From where to where an answer stands in the text, its end token included if the model produced one."""
    if index == 0:  # it answers nothing
        return None
    try:
        before, behind = write(index, True), write(index + 1, False)
    except TemplateError:  # some take a beginning only as part of the whole
        return None
    if not (text.startswith(before) and behind.startswith(before)):
        return None
    found = marks.found(behind, len(before))
    end = next((each for each in reversed(found) if each.own and marks.among(each.token, ends)), None)
    if end is None:
        return None
    closed = said[-1] in ends
    stop = end.stop if closed else end.start
    written = [each.token for each in found if each.start < end.start]
    if not text.startswith(behind[:stop]) or written != marks.said(said[:-1] if closed else said):
        return None
    return len(before), stop
