"""Grammars put to use, by llguidance: compiled, kept, and followed token by token."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loopmux.errors import BadRequestError, EngineError
from loopmux_worker.engine.calls import Family
from loopmux_worker.engine.grammars import schemas
from loopmux_worker.engine.grammars.asked import Asked
from loopmux_worker.engine.grammars.lark import grammar
from loopmux_worker.engine.grammars.rules import alone

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

REQUIREMENT = "llguidance>=1.9,<2"
_KEPT = 64
"""Compiled grammars that are kept: more than there are likely to be sets of tools in use at once."""
_LONGEST = 2**19
"""Characters of a grammar: 200 tools with schemas of 2 kB."""
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 10_000,  # an object of a thousand optional properties takes half of them
    "step_max_items": 20_000,  # some 40 ms
    "step_lexer_fuel": 500_000,  # some 40 ms
    "max_lexer_states": 2**16,  # some 100 MB
    "verbose_errors": False,  # which take the grammar and what was written
}
"""What a grammar may take: llguidance bounds what it builds, which is time as well once ``schemas`` let it pass."""
_SECONDS = 2.0
"""Of this thread's processor time for the costly parts of a request's schemas: the requests behind it wait."""
_TRIED = 16
"""Tokens that are tried of a grammar and of its costly parts, so that what cannot be followed is refused at once."""
_BITS = (torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1).to(torch.uint8).view(torch.int64).flatten()
"""A byte's eight bits as eight bytes, to look up: faster than shifting."""
_SHOWN = 400
"""Characters of a reason that are shown."""
_PLACE = re.compile(
    r"^at \d+\(\d+\): (failed to compile JSON schema: )?|\n( +\d+ \||<non-verbose|<backtrace).*", re.DOTALL
)


def release() -> str | None:
    """The release of llguidance that is here; None if there is none."""
    return metadata.version("llguidance") if find_spec("llguidance") else None


class Matcher:
    """One output on its way through a grammar.

    Args:
        matcher: its own, in front of the first token.
        eos: the end token that the grammar knows.
        ends: token ids that end the output, whichever of them comes.
        vocabulary: width of the model's head.
        spoilt: told when the grammar failed, for all who follow it.
    """

    def __init__(
        self, matcher: LLMatcher, eos: int, ends: frozenset[int], vocabulary: int, spoilt: Callable[[], object]
    ) -> None:
        self._matcher, self._eos, self._ends, self._vocabulary = matcher, eos, ends, vocabulary
        self._spoilt = spoilt
        self.complete = False
        """Whether nothing may follow."""

    def allowed(self) -> Tensor:
        """Which tokens may come next: shape (vocabulary,), on the CPU.

        Raises:
            EngineError: the grammar takes more than one step may, or only tokens fit that would end an output which is
                not whole.
        """
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        allowed = _BITS.index_select(0, bits.int()).view(torch.bool)[: self._vocabulary]
        allowed[list(self._ends)] = bool(allowed[self._eos])
        if not allowed.any():
            raise EngineError(
                "the output cannot be held to its grammar any longer: every token that fits is among stop_token_ids "
                "and would end it before it is whole: leave those out"
            )
        return allowed

    def push(self, token: int) -> None:
        """Take the next token.

        Raises:
            EngineError: the grammar does not allow it.
        """
        if token in self._ends:
            self.complete = True
            return
        self._matcher.consume_token(token)
        self._check()
        self.complete = self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            self._spoilt()
            raise EngineError(
                f"the output cannot be held to its grammar any longer ({_short(self._matcher.get_error())}): ask for a "
                "simpler schema"
            )


class Grammars:
    """The grammars of one engine. For one thread at a time.

    Args:
        vocabulary: width of the model's head, often more than the tokenizer has tokens.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._read: WeakKeyDictionary[Any, tuple[str, LLTokenizer]] = WeakKeyDictionary()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(
        self,
        asked: Asked,
        family: Family,
        tokenizer: Any,
        *,
        eos: frozenset[int],
        ends: frozenset[int],
        thinks: bool,
    ) -> Matcher:
        """What holds an output to what was asked for.

        Args:
            family: in whose syntax the model writes.
            tokenizer: the model's own, of transformers.
            eos: the model's end tokens.
            ends: those that end this output.
            thinks: it begins in the middle of reasoning.

        Raises:
            BadRequestError: this environment, this model or the schema does not allow it; it says what would.
        """
        if find_spec("llguidance") is None:
            raise BadRequestError(
                "tool_choice, strict, response_format: a guaranteed output needs llguidance, which this model's "
                f"environment lacks: add '{REQUIREMENT}' to its requirements ({sys.executable} -m pip install "
                f"'{REQUIREMENT}'), or leave them out and check the output"
            )
        own = min((end for end in eos if end < self._vocabulary), default=None)
        if own is None:
            raise BadRequestError(
                "tool_choice, strict, response_format: this model has no end token, so no output of it can be known to "
                "be whole: name one as eos_token_id in its generation_config.json"
            )
        template = str(tokenizer.chat_template or "")
        text = grammar(asked, family, template, tokenizer.added_tokens_encoder, eos | ends, thinks=thinks)
        if len(text) > _LONGEST:
            raise BadRequestError(
                f"tools, response_format: found {len(text)} characters of schemas, expected at most {_LONGEST} where "
                "an output is guaranteed: hand over fewer or smaller ones"
            )
        digest, vocabulary = self._tokens(tokenizer, own)
        key = hashlib.sha256(f"{digest}{text}".encode()).hexdigest()
        compiled = self._compiled.pop(key, None) or _compile(asked, text, vocabulary)
        self._compiled[key] = compiled  # the last one used comes last
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        spoilt = partial(self._compiled.pop, key, None)  # copies share the states that the lexer has come to
        return Matcher(compiled.deep_copy(), own, ends, self._vocabulary, spoilt)

    def _tokens(self, tokenizer: Any, eos: int) -> tuple[str, LLTokenizer]:
        """A tokenizer as llguidance has it, with what tells it from others. Models with equal ones share it."""
        if tokenizer not in self._read:
            text = _serialised(tokenizer)
            digest = hashlib.sha256(f"{eos} {text}".encode()).hexdigest()
            same = next((known for known in self._read.values() if known[0] == digest), None)
            self._read[tokenizer] = same or (digest, _tokenizer(text, self._vocabulary, eos))
        return self._read[tokenizer]


def _serialised(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(f"it is a {type(tokenizer).__name__}, without a tokenizer.json")
    content = json.loads(backend.to_str())
    return json.dumps(content | {"padding": None, "truncation": None})


def _tokenizer(text: str, vocabulary: int, eos: int) -> LLTokenizer:
    import llguidance

    try:
        return llguidance.LLTokenizer(text, n_vocab=vocabulary, eos_token=eos)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise _unknown(str(error)) from None  # a panic of Rust code, too, which is no Exception


def _unknown(reason: str) -> BadRequestError:
    return BadRequestError(
        f"tool_choice, strict, response_format: llguidance cannot use this model's tokenizer ({_short(reason)}): leave "
        "them out and check the output"
    )


def _compile(asked: Asked, text: str, vocabulary: LLTokenizer) -> LLMatcher:
    """Compile a grammar, after what may take long in it, each part alone.

    Raises:
        BadRequestError: it cannot be compiled, or followed, within the limits.
    """
    began, tried = time.thread_time(), set()
    for what, schema, remedy in _schemas(asked):
        for part in map(alone, schemas.costly(schema)):
            if part in tried:
                continue
            tried.add(part)
            reason = _made(part, vocabulary)[1]
            if not reason and time.thread_time() - began > _SECONDS:
                reason = f"what is before and in it takes more than {_SECONDS:g} s to compile"
            if reason:
                raise BadRequestError(f"{what} cannot be guaranteed: {_short(reason)}: {remedy}")
    made, reason = _made(text, vocabulary)
    if not reason:
        return made
    for what, schema, remedy in _schemas(asked):
        if own := _made(alone(schema), vocabulary)[1]:
            raise BadRequestError(f"{what} cannot be guaranteed: {_short(own)}: {remedy}")
    raise BadRequestError(
        f"tools, response_format: together they cannot be guaranteed: {_short(reason)}: hand over fewer tools"
    )


def _schemas(asked: Asked) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Each schema with what it is, and what helps where it is too much."""
    for tool in asked.tools:
        what = f"tools: the arguments of {tool.name!r}"
        yield what, tool.arguments, "change its parameters, or set strict: false for it"
    if asked.answer is not None:
        yield "response_format: it", asked.answer, "change it, or leave it out and check the answer"


def _made(text: str, vocabulary: LLTokenizer) -> tuple[LLMatcher, str]:
    """A grammar compiled, and followed for some tokens; why that does not go, or nothing."""
    import llguidance

    made = llguidance.LLMatcher(vocabulary, text, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS))
    tried, dice = made.deep_copy(), random.Random(0)  # noqa: S311 - which tokens are tried is no secret
    for _ in range(_TRIED):
        if tried.is_stopped():
            break
        allowed = tried.compute_bitmask()
        if tried.is_error():
            break
        if not any(allowed):
            return made, "nothing can be written that fits"
        tried.consume_token(_one_of(allowed, dice))
    if made.is_error():
        return made, made.get_error()
    return made, f"a step takes too long ({_short(tried.get_error())})" if tried.is_error() else ""


def _one_of(bits: bytes, dice: random.Random) -> int:
    """The index of a bit that is set, found from a random byte on."""
    start = dice.randrange(len(bits))
    rest = (bits[start:] + bits[:start]).lstrip(b"\0")
    return (start - len(rest)) % len(bits) * 8 + (rest[0] & -rest[0]).bit_length() - 1


def _short(reason: str) -> str:
    """A reason without the place in the grammar, which its reader does not know."""
    line = " ".join(_PLACE.sub("", reason).split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
