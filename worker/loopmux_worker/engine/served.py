"""A model id that is served, and what its prompts and answers go through: tokenizer, end tokens, the form of calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loopmux.messages import ModelSpec
from loopmux_worker.engine import admission, templates
from loopmux_worker.engine.base import Job
from loopmux_worker.engine.calls import Family, family_of
from loopmux_worker.engine.output import Reading
from loopmux_worker.engine.text import Decode

_TAIL = 16
"""Tokens at a prompt's end that show whether it opened reasoning: the mark for it, in however many pieces."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model id that is served.

    Attributes:
        tokenizer: the adapter's own where it has one.
        ends: token ids that end an output: its own tokenizer's are not its neighbours'.
        family: how its answers write reasoning and tool calls.
        notes: what somebody who wonders about its answers should know.
    """

    spec: ModelSpec
    tokenizer: Any
    ends: frozenset[int]
    family: Family
    notes: tuple[str, ...]

    def thinks(self, prompt: list[int]) -> bool:
        """Whether an answer to this prompt begins in the middle of reasoning."""
        return self.family.opens_reasoning(_decoder(self.tokenizer)(prompt[-_TAIL:]))

    def reading(self, job: Job, limit: int, *, thinks: bool) -> Reading:
        """How an answer of at most ``limit`` tokens, prefix included, is to be read."""
        generate, family = job.generate, self.family
        tools = admission.callable_tools(generate)
        plain = templates.uses_plain_chat(generate, self.spec, self.tokenizer)
        return Reading(
            decode=_decoder(self.tokenizer),
            ends=frozenset(generate.stop_token_ids) | (frozenset() if generate.ignore_eos else self.ends),
            silent=_special(self.tokenizer, keep=family.tokens(calls=bool(tools))),
            stops=(*generate.stop, templates.PLAIN_CHAT_STOP) if plain else generate.stop,
            limit=limit,
            parser=lambda: family.parser(job.key.request, tools, reasoning=thinks),
            one_call=bool(tools) and not generate.parallel_tool_calls,
        )


def family_for(model: ModelSpec, tokenizer: Any) -> tuple[Family, list[str]]:
    """How a model writes calls, and what is worth a note about it; without a template all that it writes is text."""
    if model.model_type == "base" or not templates.has_template(tokenizer):
        return family_of(None), []
    family = family_of(str(tokenizer.chat_template), model.tool_format)
    if family.name != "envelope" or model.tool_format != "auto" or not templates.shows_tools(tokenizer):
        return family, []
    note = (
        f"{model.id}: its chat template shows tools, but how they are called is not known; 'envelope' is used: "
        "set tool_format if it is another"
    )
    return family, [note]


def _decoder(tokenizer: Any) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _special(tokenizer: Any, keep: tuple[str, ...]) -> frozenset[int]:
    """Ids of special tokens, which have no text; ``keep`` are those that mean something to a parser."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    kept = {tokenizer.added_tokens_encoder[text] for text in keep if text in tokenizer.added_tokens_encoder}
    return frozenset((marked | set(tokenizer.all_special_ids)) - kept)
