"""The slots engine on tiny random models: the logits of a plain forward and the tokens of transformers' own
``generate()``, whatever runs beside.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

import enginekit
from enginekit import ids, of, play, run
from loopmux.errors import ConfigError
from loopmux_worker.engine.slots.forward import try_rows
from loopmux_worker.engine.slots.lora import MixedAdapters
from tinymodel import CONTEXT, write_tokenizer

SIZE = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
        "eos_token_id": 266, "bos_token_id": None, "pad_token_id": 264}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
SHAPES: dict[str, Any] = {
    "llama, grouped queries": lambda: LlamaConfig(**SIZE, **HEADS, head_dim=16),
    "llama, every head its own": lambda: LlamaConfig(**SIZE, num_attention_heads=4, num_key_value_heads=4),
    "llama, one key head": lambda: LlamaConfig(
        **SIZE, num_attention_heads=4, num_key_value_heads=1, head_dim=16
    ),
    "llama, rope of llama 3": lambda: LlamaConfig(**SIZE, **HEADS, rope_parameters=LLAMA3),
    "llama, rope of yarn": lambda: LlamaConfig(**SIZE, **HEADS, rope_parameters=YARN),
    "llama, linear rope": lambda: LlamaConfig(**SIZE, **HEADS, rope_parameters=LINEAR),
    "llama, dynamic rope": lambda: LlamaConfig(**SIZE, **HEADS, rope_parameters=DYNAMIC),
    "qwen 2": lambda: Qwen2Config(**SIZE, **HEADS),
    "qwen 3": lambda: Qwen3Config(**SIZE, **HEADS, head_dim=16),
    "gemma": lambda: GemmaConfig(**SIZE, **HEADS, head_dim=16),
    "gemma 3, two kinds of layers": lambda: Gemma3TextConfig(
        **SIZE, **HEADS, head_dim=16, sliding_window=12, query_pre_attn_scalar=16, tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral, sliding window": lambda: MistralConfig(**SIZE, **HEADS, head_dim=16, sliding_window=12),
    "phi": lambda: PhiConfig(**SIZE, num_attention_heads=4),
    "phi 3": lambda: Phi3Config(**SIZE, **HEADS),
    "gpt 2": lambda: GPT2Config(
        vocab_size=272, n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT, initializer_range=0.6,
        eos_token_id=266, bos_token_id=None, pad_token_id=264,
    ),
}  # fmt: skip
PROMPTS = [[(13 * i * i + 5 * i + n) % 250 for i in range(length)] for n, length in enumerate((30, 3, 17, 64, 1, 30))]
WANTED = 44
VARIED = 20
"""So many different tokens an answer has at least."""
TOLERANCE = 3e-5
"""Largest difference of a logit in float32, as a share of the range of all of them behind the same tokens."""


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(request, tmp_path_factory):
    """A random model whose greedy answers are not stuck: one that repeats itself proves nothing. And those answers."""
    for seed in range(40):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(SHAPES[request.param](), dtype=torch.float32).eval()
        answers = []
        for prompt in PROMPTS:
            answers.append(greedy(model, prompt))
            if len(set(answers[-1])) < VARIED:
                break
        else:
            break
    else:
        raise AssertionError(f"no seed gives {request.param} a varied answer")
    folder = tmp_path_factory.mktemp("shape") / "base"
    write_tokenizer(folder)
    model.save_pretrained(folder)
    return folder, answers


@pytest.fixture(scope="module")
def folder(shape):
    return shape[0]


@pytest.fixture(scope="module")
def answers(shape, device):
    """What ``generate()`` makes of PROMPTS on the device."""
    folder, answers = shape
    if device == "cpu":
        return answers
    model = loaded(folder, device)
    return [greedy(model, prompt) for prompt in PROMPTS]


def loaded(folder: Any, device: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], wanted: int = WANTED) -> list[int]:
    """What ``generate()`` makes of a prompt."""
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=wanted,
                          eos_token_id=None, pad_token_id=0)  # fmt: skip
    return made[0, len(prompt) :].tolist()


def opened(folder: Any, device: str, **settings: Any) -> Any:
    return enginekit.opened(folder, **({"slots": 8, "device": device} | settings))


@pytest.fixture(scope="module")
def shared(folder, device):
    return opened(folder, device)


@pytest.fixture(scope="module")
def truth(folder, device, answers):
    """All logits that a plain forward gives behind every beginning of a prompt with its answer."""
    model, found = loaded(folder, device), {}
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = [*prompt, *answer]
        with torch.inference_mode():
            logits = model(torch.tensor([tokens], device=device), use_cache=False).logits[0]
        found |= {tuple(tokens[: place + 1]): row for place, row in enumerate(logits)}
    return found


class Compared:
    """In the place of an engine's ``_logits``: notes how far what each step computes is from the truth."""

    def __init__(self, engine: Any, truth: dict[tuple[int, ...], torch.Tensor]) -> None:
        self._compute, self._tasks, self._truth = engine._logits, engine._tasks, truth
        self.differences: list[float] = []

    def __call__(self, segments: Any) -> torch.Tensor:
        logits = self._compute(segments)
        for segment, found in zip((s for s in segments if s.samples), logits, strict=True):
            true = self._truth[tuple(self._tasks[segment.key].sequence.tokens)]
            self.differences.append(float((found - true).abs().max() / (true.max() - true.min())))
        return logits


@pytest.fixture
def engine(shared, truth, monkeypatch):
    """An engine on the shape, idle and with nothing kept, for ``compared``."""
    monkeypatch.setattr(shared, "_logits", Compared(shared, truth))
    yield shared
    assert shared.due() is None
    forget(shared)


def compared(engine: Any, jobs: Any, every: int = 0) -> Any:
    """``run``, and all logits of every step are those of a plain forward."""
    result, differences = run(engine, jobs, every), engine._logits.differences
    assert len(differences) >= sum(map(len, result[0]))
    assert [found for found in differences if not found <= TOLERANCE] == []
    differences.clear()
    return result


def forget(engine: Any) -> None:
    """Drop all rows, so that everything is computed again."""
    for row in range(len(engine._scheduler.rows)):
        engine._scheduler.rows.drop(row)


job = partial(enginekit.job, max_new_tokens=WANTED, ignore_eos=True)


def test_every_shape_gives_logits_and_tokens_of_transformers_alone_mixed_and_late(engine, answers):
    assert engine.describe().engine == "slots"
    for i in (3, 4):  # the longest and the shortest; all of them are alone where they go on from their rows
        assert compared(engine, [job(PROMPTS[i])])[0] == [answers[i]]
    assert compared(engine, [job(p) for p in PROMPTS])[0] == answers
    assert compared(engine, [job(p) for p in PROMPTS], every=3)[0] == answers


def test_every_shape_gathers_rows_that_lie_apart(engine, answers, monkeypatch):
    """What a GPU does for its streams; here on every device."""
    memory = engine._forward.memory
    monkeypatch.setattr(memory, "gathers", True)
    prepare, gathered = memory.prepare, []

    def watched(segments):
        prepare(segments)
        gathered.extend(group for group in memory.layout.groups if isinstance(group.rows, torch.Tensor))

    monkeypatch.setattr(memory, "prepare", watched)
    half = WANTED // 2
    places = range(len(PROMPTS))
    first = [job(prompt, session=str(i), max_new_tokens=half) for i, prompt in zip(places, PROMPTS, strict=True)]
    assert compared(engine, first)[0] == [answer[:half] for answer in answers]
    apart = [0, 2, 5]
    again = [job([*PROMPTS[i], *answers[i][:half]], session=str(i), max_new_tokens=half) for i in apart]
    assert compared(engine, again)[0] == [answers[i][half:] for i in apart]
    assert gathered


def test_every_shape_goes_on_from_its_own_rows(engine, answers):
    before, ends = engine.load(), []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        half = WANTED // 2
        [tokens], [end] = compared(engine, [job(prompt, session="s", max_new_tokens=half)])
        assert tokens == answer[:half]
        ends.append(end)
        [tokens], [end] = compared(engine, [job([*prompt, *answer[:half]], session="s", max_new_tokens=half)])
        assert tokens == answer[half:]
        assert end.usage.cached_tokens >= len(prompt) + half - 1 or len(prompt) + half - 1 < 16
        ends.append(end)
    assert engine.load().cached - before.cached == sum(end.usage.cached_tokens for end in ends) > 0
    assert engine.load().computed - before.computed == sum(end.usage.computed_tokens for end in ends) > 0


def test_every_shape_is_the_same_in_chunks_of_any_size(engine, answers, monkeypatch):
    """Of the prompts: some tokens behind them show what came of it."""
    for budget in (1, 7, 16, 33):
        monkeypatch.setattr(engine._pace, "budget", lambda *_, budget=budget: budget)
        assert compared(engine, [job(p, max_new_tokens=12) for p in PROMPTS])[0] == [answer[:12] for answer in answers]
        forget(engine)


def test_every_shape_resumes_behind_a_prefix_of_its_own_output(engine, answers):
    for cut in (1, 20, WANTED - 1):
        jobs = [job(prompt, prefix=answer[:cut]) for prompt, answer in zip(PROMPTS, answers, strict=True)]
        assert compared(engine, jobs)[0] == [answer[cut:] for answer in answers]


def test_every_shape_in_half_precision_is_as_near_to_the_truth_as_a_plain_forward(folder, device):
    """bf16 may choose other tokens than ``generate()`` and be no worse. Log probabilities of what was chosen, beside
    those of the same rounded weights in float32: their mean error is at most 1.5 times that of a plain forward."""
    half, exact = loaded(folder, device, torch.bfloat16), loaded(folder, device)
    exact.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    jobs = [job(prompt, logprobs=0) for prompt in PROMPTS]
    outputs = play(opened(folder, device, dtype="bfloat16"), jobs, every=3)
    ours, plain, true = [], [], []
    for one, prompt in zip(jobs, PROMPTS, strict=True):
        tokens = ids(of(one, outputs))
        ours += [each.logprob for output in of(one, outputs)[:-1] for each in output.logprobs]
        plain += known(half, prompt, tokens)
        true += known(exact, prompt, tokens)
    assert len(ours) == len(PROMPTS) * WANTED
    distance = [(torch.tensor(found) - torch.tensor(true)).abs().mean() for found in (ours, plain)]
    assert distance[0] <= 1.5 * distance[1]


@torch.inference_mode()
def known(model: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """Log probability of each token behind a prompt, from one plain forward."""
    logits = model(torch.tensor([[*prompt, *tokens]], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens, device=model.device)[:, None])[:, 0].tolist()


TOLD = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}  # fmt: skip
PLAIN: dict[str, Any] = {
    "softened logits": (lambda: Gemma2Config(**SIZE, **HEADS, head_dim=16, query_pre_attn_scalar=16), "softcap"),
    "a window in the mask alone": (
        lambda: Qwen2MoeConfig(**SIZE, **HEADS, **TOLD, use_sliding_window=True, sliding_window=100),
        "does not tell its attention about its sliding window",
    ),
    "layers that see in chunks": (
        lambda: Llama4TextConfig(
            **SIZE, **HEADS, head_dim=8, num_local_experts=2, intermediate_size_mlp=32, attention_chunk_size=100,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        ),
        "has layers of the kind chunked_attention",
    ),
    "positions by the longest of all": (
        lambda: Phi3Config(**SIZE, **HEADS, rope_parameters=LONGROPE, original_max_position_embeddings=64),
        "rope_type: longrope",
    ),
    "a state and no attention": (
        lambda: MambaConfig(vocab_size=272, hidden_size=32, num_hidden_layers=2, state_size=8, eos_token_id=266,
                            bos_token_id=None, pad_token_id=264),
        "MambaForCausalLM",
    ),
}  # fmt: skip


def written(config: Any, folder: Any) -> Any:
    """A random model of a configuration."""
    torch.manual_seed(0)
    write_tokenizer(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", list(PLAIN))
def test_a_shape_that_rows_cannot_hold_is_served_by_the_plain_engine(kind, device, tmp_path):
    """The trial is shorter than windows, chunks and the first 64 positions: its logits are right."""
    config, says = PLAIN[kind]
    folder = written(config(), tmp_path)
    with pytest.raises(ConfigError, match=f"found slots, but .*{says}"):
        opened(folder, device)
    engine = opened(folder, device, engine="auto")
    try:
        described = engine.describe()
        assert described.engine == "plain"
        assert says in described.report["why"]
        prompts = [PROMPTS[1], [(13 * i * i + 5 * i) % 250 for i in range(120)]]
        model = loaded(folder, device)
        assert run(engine, [job(prompt) for prompt in prompts])[0] == [greedy(model, prompt) for prompt in prompts]
    finally:
        engine.close()


def test_a_shape_with_two_sets_of_positions_has_rows_as_long_as_the_first_holds(device, tmp_path):
    config, _ = PLAIN["positions by the longest of all"]
    folder = written(config(), tmp_path)
    engine = opened(folder, device, engine="auto", context=64)
    assert engine.describe().engine == "slots"
    expected = [greedy(loaded(folder, device), prompt, 64 - len(prompt)) for prompt in PROMPTS[:3]]
    assert run(engine, [job(prompt, max_new_tokens=64) for prompt in PROMPTS[:3]])[0] == expected


def test_a_shape_with_fewer_positions_than_the_trial_takes_is_served_all_the_same(tmp_path):
    folder = written(GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=None,
                                eos_token_id=266), tmp_path)  # fmt: skip
    engine = opened(folder, "cpu", engine="auto")
    try:
        expected = greedy(loaded(folder, "cpu"), PROMPTS[1], 9)
        assert run(engine, [job(PROMPTS[1], max_new_tokens=9)])[0] == [expected]
    finally:
        engine.close()


class Chatty(LlamaForCausalLM):
    """Gives logits of all tokens, whichever are asked for, as models with code of their own may."""

    def forward(self, logits_to_keep: Any = 0, **given: Any) -> Any:
        return super().forward(**given)


def test_a_shape_that_gives_other_logits_than_it_is_asked_for_cannot_be_run_over_rows():
    torch.manual_seed(0)
    model = Chatty(SHAPES["llama, grouped queries"]()).eval()
    trial = try_rows(model, MixedAdapters(model), torch.device("cpu"), 272)
    assert trial.why_not is not None
    assert trial.why_not.startswith("Chatty gives other logits over rows")
