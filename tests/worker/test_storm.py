"""Random programs on an engine that is short of everything: each request gets what it gets alone and undisturbed.

Requests with and without adapters, seeds, grammars and stop strings run beside each other, from the beginning or behind
a prefix of their output; they are cancelled and continued, steps and copies fail, adapters come and go. A seed decides
everything, also the clock and how large steps are, so a program that is found wanting is run again by its number.
"""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

import enginekit
from enginekit import drain, ids, text
from loopmux.errors import BadRequestError
from loopmux.messages import ModelSpec, Sampling, SessionHint
from loopmux_worker.engine.base import Failed, Finished, Key, Output, Produced
from loopmux_worker.engine.slots import engine as slots_engine
from tinymodel import TinyModel, write_adapter, write_tokenizer

CONTEXT, ROWS, SLOTS = 150, 5, 3
REQUESTS, SEEDS = 14, range(3)
LONGEST = 5_000
"""Operations of a program: with more of them it goes on for ever."""
ADAPTERS = ("red", "blue")
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["kelvin", "°C"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["unit", "days"],
}
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},)
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A random model with experts that sees through a window, and adapters of two ranks."""
    made = TinyModel(tmp_path_factory.mktemp("experts"))
    write_tokenizer(made.base)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=272, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=20,
        max_position_embeddings=256, initializer_range=0.3, eos_token_id=266, bos_token_id=None, pad_token_id=264,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(made.base)
    for seed, name in enumerate(ADAPTERS):
        settings = {"r": 4 + 4 * seed, "target_modules": ["q_proj", "v_proj", "o_proj"][seed:]}
        made.adapters[name] = write_adapter(made.base, made.folder / name, seed=seed, **settings)
    return made


def opened(model, rows, slots):
    specs = (ModelSpec("base"), *(ModelSpec(name, adapter_dir=str(model.adapters[name])) for name in ADAPTERS))
    config = AutoConfig.from_pretrained(model.base)
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes
    gib = (rows + 0.5) * CONTEXT * token / 2**30
    engine = enginekit.opened(model.base, *specs, context=CONTEXT, slots=slots, kv_cache_gib=gib)
    assert engine.describe().report["kv_rows"] == rows
    return engine


class Asked(NamedTuple):
    """A request, and what comes of it in an engine that has nothing else to do and knows nothing."""

    prompt: list[int]
    model: str
    options: dict[str, Any]
    id: bytes
    alone: list[Output]

    def job(self, cut: int = 0, session: str | None = None) -> Any:
        """It behind ``cut`` tokens of its output."""
        given = {"key": Key(self.id, 1 + cut), "session": session, "prefix": ids(self.alone)[:cut]}
        return enginekit.job(self.prompt, self.model, **given, **self.options)


def said(outputs, cut=0, *, exact=False):
    """What a client gets behind so many tokens, token by token; log probabilities to the last bit of an exact one."""
    produced = [output for output in outputs if isinstance(output, Produced) and output.position >= cut]
    calls = [[(call.id, call.name, call.arguments, call.error) for call in output.calls] for output in produced]
    logprobs = [output.logprobs if exact else len(output.logprobs) for output in produced]
    parts = [(output.position, output.ids, output.text, output.reasoning) for output in produced]
    return list(zip(parts, calls, logprobs, strict=True))


class Program:
    """One random program."""

    def __init__(self, model, quiet, seed, monkeypatch):
        self.dice, self._model, self._quiet = random.Random(seed), model, quiet
        self.engine = engine = opened(model, ROWS, SLOTS)
        clock = itertools.count()
        monkeypatch.setattr(slots_engine, "time", SimpleNamespace(monotonic=lambda: next(clock) / 100))
        sizes = self.dice.choice([(5, 16), (0, 30), (64, 512)])
        monkeypatch.setattr(engine._pace, "budget", lambda decoding, *_: self.dice.choice(sizes) or int(not decoding))
        self._forward, engine._forward = engine._forward, self._faulty
        self._copy = engine._memory.copy
        monkeypatch.setattr(engine._memory, "copy", self._faulty_copy)
        self._fault = self._copy_fault = ""
        self._text = [self.dice.randrange(250) for _ in range(CONTEXT)]  # with which all conversations begin
        self._conversations: dict[str, list[int]] = {}
        self.running: dict[Key, tuple[Asked, int]] = {}
        self._outputs: dict[Key, list[Output]] = {}
        self.raised = self.cancelled = 0
        self.cached = 0  # tokens in the usages that were told

    def run(self):
        """All of it; the engine is idle afterwards, and has everything back."""
        left = REQUESTS
        for _ in range(LONGEST):
            if not (left or self.running):
                break
            if left and (not self.running or self.dice.random() < 0.4):
                left -= 1
                self._submit()
            else:
                self._disturb()
                self._take(self.engine.step())
        self._take(drain(self.engine))
        assert not self.running, "each ends"
        core, load = self.engine._scheduler, self.engine.load()
        assert (len(core), core.rows.running, load.running, load.queued) == (0, 0, 0, 0)
        assert load.cached == self.cached

    def _submit(self):
        asked, session = self._ask()
        total = len(ids(asked.alone))
        cut = self.dice.randrange(total + 1) if self.dice.random() < 0.4 else 0
        job = asked.job(cut, session)
        self.running[job.key], self._outputs[job.key] = (asked, cut), []
        self.engine.submit(job)
        if session is not None:
            self._conversations[session] = [*asked.prompt, *ids(asked.alone)][: CONTEXT - 1]

    def _ask(self):
        dice, session = self.dice, None
        model = dice.choice(["base", *ADAPTERS])
        prompt = self._text[: dice.choice([1, CONTEXT - 1, *(dice.randrange(20, 100) for _ in range(8))])]
        if dice.random() < 0.5:
            session = f"{model}'s"
            prompt = list(self._conversations.get(session, prompt))
            cut = dice.choice([len(prompt), dice.randrange(1, len(prompt) + 1)])
            prompt = [*prompt[:cut], *(dice.randrange(250) for _ in range(dice.choice([0, 0, 1, 5])))][: CONTEXT - 1]
        options: dict[str, Any] = {
            "sampling": self._sampling(),
            "max_new_tokens": dice.choice([1, 8, 20, 30]),
            "ignore_eos": dice.random() < 0.8,
            "deterministic": dice.random() < 0.2,
            "logprobs": dice.choice([None, 0, 2]),
        }
        match dice.randrange(6):
            case 0:
                options |= {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": dice.random() < 0.5}
            case 1:
                options["response_format"] = SCHEMA
        asked = self._asked(prompt, model, options, dice.randbytes(16))
        if dice.random() < 0.4 and len(whole := text(asked.alone)) > 2:
            at = dice.randrange(len(whole) - 1)
            options["stop"] = ("never", whole[at : at + dice.randrange(1, 4)])
            asked = self._asked(*asked[:-1])
        return asked, session

    def _sampling(self):
        dice = self.dice
        if dice.random() < 0.3:
            return Sampling(temperature=0)
        rare = {"top_p": 0.8, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
        chosen = {name: value for name, value in rare.items() if dice.random() < 0.35}
        return Sampling(temperature=dice.choice([0.5, 1.0, 2.0]), seed=dice.choice([None, 7]), **chosen)

    def _asked(self, prompt, model, options, id_):
        for row in range(len(self._quiet._scheduler.rows)):
            self._quiet._scheduler.rows.drop(row)
        asked = Asked(prompt, model, options, id_, [])
        self._quiet.submit(asked.job())
        asked.alone.extend(drain(self._quiet))
        return asked

    def _disturb(self):
        dice, engine = self.dice, self.engine
        match dice.randrange(30):
            case 0 if self.running:
                key = dice.choice(list(self.running))
                _, cut = self.running.pop(key)
                usage = engine.cancel(key)
                assert usage.completion_tokens == cut + len(ids(self._outputs.pop(key)))
                self.cancelled += 1
                self.cached += usage.cached_tokens
            case 1 | 2:
                self._fault = dice.choice(["before", "after", NO_MEMORY])
            case 3 | 4:
                self._copy_fault = dice.choice(["copy", NO_MEMORY])
            case 5:
                engine.hint(SessionHint("base's", dice.choice(["done", "waiting_on_tool"]), 1.0))
            case 6:
                try:
                    engine.load_adapter("x", str(self._model.adapters[dice.choice(ADAPTERS)]))
                except BadRequestError:
                    engine.unload_adapter("x")

    def _faulty(self, segments, *rest):
        if not self._fault or len(segments) < 2:  # who is alone is taken to be at fault
            return self._forward(segments, *rest)
        fault, self._fault = self._fault, ""
        self.raised += 1
        if fault == "after":
            self._forward(segments, *rest)
        raise RuntimeError(fault)

    def _faulty_copy(self, copies):
        fault, self._copy_fault = (self._copy_fault, "") if copies else ("", self._copy_fault)
        if fault:
            self.raised += 1
            raise RuntimeError(fault)
        self._copy(copies)

    def _take(self, outputs):
        for output in outputs:
            own = self._outputs[output.key]  # a KeyError: something comes of one that was cancelled, or had ended
            own.append(output)
            if isinstance(output, (Finished, Failed)):
                self._check(*self.running.pop(output.key), self._outputs.pop(output.key))

    def _check(self, asked, cut, outputs):
        end, expected = outputs[-1], asked.alone[-1]
        assert isinstance(end, Finished), end
        exact = asked.options["deterministic"]
        assert said(outputs, exact=exact) == said(asked.alone, cut, exact=exact), asked
        assert (end.total, end.reason) == (expected.total, expected.reason)
        counts = [(u.prompt_tokens, u.completion_tokens, u.rewritten_tokens) for u in (end.usage, expected.usage)]
        assert counts[0] == counts[1]
        self.cached += end.usage.cached_tokens


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_storm(kind, tiny_model, experts, monkeypatch):
    model = tiny_model if kind == "llama" else experts
    quiet = opened(model, 1, 1)
    programs = []
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            program = Program(model, quiet, seed, patch)
            try:
                program.run()
            except Exception as error:
                error.add_note(f"{kind}, program {seed}")
                raise
        programs.append(program)
    total = {name: sum(getattr(p, name) for p in programs) for name in ("raised", "cancelled", "cached")}
    assert min(total.values()) > 1, total
