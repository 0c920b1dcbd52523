"""Make the demo model from nothing: tokenizer, base model, adapters `tools` and `shout`.

    python configs/demo/train/train.py OUT_DIR [--only tools]

Same seeds, same library versions and same number of threads give the same files. A training that was cut off goes on
from its last checkpoint when it is started again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from corpus import base_stream, shout_stream, tokenizer_texts, tools_stream
from loops import Conversation
from optimizing import Muon, rate
from peft import LoraConfig, get_peft_model
from render import END, PAD, pieces
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizing import CONTEXT, VOCABULARY, save_tokenizer, train_tokenizer, word_pieces
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

SEED = 20_26
# Beside other programs two threads are many times slower than one, since each waits for the other: --threads 1, which
# gives other weights.
THREADS = 2
BATCH_TOKENS = 2560
# At the full rate the loss of such small batches is mostly noise, so the rate of the base falls for most of its steps.
STEPS = {"base": 3900, "tools": 520, "shout": 120}
COOLDOWN = {"base": 0.8, "tools": 0.5, "shout": 0.5}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100
PARTS = tuple(STEPS)


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids (rows, length), padded on the right, and the same with everything ignored that is not to be learned."""

    inputs: torch.Tensor
    targets: torch.Tensor


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Ids and targets of a conversation."""
    ids: list[int] = []
    targets: list[int] = []
    for text, mine in pieces(conversation):
        more = tokenizer.encode(text, add_special_tokens=False).ids
        ids += more
        targets += more if mine else [IGNORED] * len(more)
    return ids, targets


def batches(tokenizer: Tokenizer, stream: Iterator[Conversation], seed: int, pool: int = 256) -> Iterator[Batch]:
    """Batches of at most `BATCH_TOKENS` tokens, of rows of like length so that little is padding."""
    rng = random.Random(seed)
    while True:
        rows = sorted(
            (row for row in (encode(tokenizer, next(stream)) for _ in range(pool)) if len(row[0]) <= CONTEXT),
            key=lambda row: len(row[0]),
        )
        cut: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(cut[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        yield from (_padded(part) for part in cut if part)


def _padded(rows: list[tuple[list[int], list[int]]]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    inputs = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), IGNORED)
    for place, (ids, wanted) in enumerate(rows):
        inputs[place, : len(ids)] = torch.tensor(ids)
        targets[place, : len(wanted)] = torch.tensor(wanted)
    return Batch(inputs, targets)


def core_of(model: Any) -> Qwen3ForCausalLM:
    """The model itself, within PEFT's wrapping or without it."""
    while not isinstance(model, Qwen3ForCausalLM):
        model = model.base_model.model
    return model


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the tokens to learn. Padding is on the right, where causal attention ignores it."""
    core: Any = core_of(model)
    targets = batch.targets[:, 1:]
    mine = targets != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        hidden = core.model(input_ids=batch.inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = core.lm_head(hidden[mine])
    return torch.nn.functional.cross_entropy(logits.float(), targets[mine])


@dataclass(frozen=True, slots=True)
class Leg:
    """One training: its name, its steps, the part of them in which the rate falls, and where its checkpoint lies."""

    name: str
    steps: int
    cooldown: float
    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The file that the training goes on from."""
        return self.folder / f"{self.name}.checkpoint"


def fit(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], stream: Iterator[Batch], leg: Leg) -> None:
    """Train, with a line of progress every hundred steps and a checkpoint every five hundred."""
    done = _resume(model, optimizers, leg)
    began, total, seen = time.monotonic(), 0.0, 0
    model.train()
    core_of(model).set_attn_implementation("fp32")
    for step, batch in enumerate(islice(stream, leg.steps)):
        if step < done:
            continue
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate(step, leg.steps, leg.cooldown)
        total, seen = total + _step(model, optimizers, batch), seen + batch.inputs.numel()
        if (step + 1) % 100 == 0:
            print(
                f"{leg.name} step {step + 1}/{leg.steps} loss {total / 100:.4f} tokens {seen / 1e6:.2f}M "
                f"seconds {time.monotonic() - began:.0f}",
                flush=True,
            )
            total = 0.0
        if (step + 1) % 500 == 0:
            _keep(model, optimizers, step + 1, leg)
    leg.checkpoint.unlink(missing_ok=True)
    model.eval()


def _step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch) -> float:
    """One step; returns its loss."""
    loss = loss_of(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _keep(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int, leg: Leg) -> None:
    """Write the checkpoint, whole or not at all."""
    leg.folder.mkdir(parents=True, exist_ok=True)
    fresh = leg.checkpoint.with_suffix(".part")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, fresh)
    fresh.replace(leg.checkpoint)


def _resume(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], leg: Leg) -> int:
    """Take up the checkpoint if there is one; returns the steps done."""
    if not leg.checkpoint.exists():
        return 0
    kept = torch.load(leg.checkpoint)
    model.load_state_dict(kept["model"])
    for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return int(kept["step"])


def attention_in_fp32(
    module: torch.nn.Module,  # noqa: ARG001 - the interface's signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,  # noqa: ARG001 - rows are padded on the right only, so causal is all there is to hide
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention outside autocast: (rows, heads, length, size) in, (rows, length, heads, size) out.

    On a CPU the backward pass of bf16 attention is the slowest part of a step and that of fp32 is not.
    """
    with torch.autocast("cpu", enabled=False):
        out = torch.nn.functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("fp32", attention_in_fp32)


def new_model() -> Qwen3ForCausalLM:
    """The base model's shape with fresh weights: 1.8 million parameters.

    What Qwen3 has beyond Llama is a norm of every query and key. With it copying is learned in few steps.
    """
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def train_base(tokenizer: Tokenizer, leg: Leg, compiled: bool) -> Qwen3ForCausalLM:
    """The base model from nothing: Muon for the matrices, AdamW for the rest."""
    torch.manual_seed(SEED)
    model = new_model()
    if compiled:
        model.model.compile(dynamic=True)  # The adapters have too few steps to make up for the minutes it takes.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    stream = base_stream(SEED, word_pieces(tokenizer))
    fit(model, optimizers, batches(tokenizer, stream, SEED), leg)
    return model


def train_adapter(folder: Path, tokenizer: Tokenizer, stream: Iterator[Conversation], leg: Leg) -> Any:
    """A LoRA adapter on the base model as stored, so that it fits the rounded weights."""
    torch.manual_seed(SEED)
    base = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    fit(model, optimizers, batches(tokenizer, stream, SEED), leg)
    return model


def save_base(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in bf16 and a configuration that transformers 4.57 and 5 read alike."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # 4.57 reads the top-level rope_theta, 5 the dictionary; the writer's version is of no use to either.
    config |= {
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": end,
        "pad_token_id": pad,
        "bos_token_id": None,
        "use_cache": True,
        "dtype": "bfloat16",
    }
    config.pop("transformers_version", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"eos_token_id": end, "pad_token_id": pad, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def save_adapter(model: Any, folder: Path) -> None:
    """The adapter in bf16, naming its base without a path of this machine."""
    model.peft_config["default"].base_model_name_or_path = "demo/base"
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file(
        {name: value.to(torch.bfloat16).contiguous() for name, value in load_file(weights).items()},
        weights,
        metadata={"format": "pt"},
    )
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set, written in any order
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def main() -> None:
    """Train what was asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--steps", type=int, help="instead of the usual number, for trials")
    parser.add_argument("--threads", type=int, default=THREADS, help="of torch")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which needs a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    legs = {name: Leg(name, options.steps or STEPS[name], COOLDOWN[name], options.out) for name in options.only}
    base = options.out / "base"
    if "base" in legs:
        tokenizer = train_tokenizer(tokenizer_texts(SEED + 1))
        save_base(train_base(tokenizer, legs["base"], not options.eager), tokenizer, base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    parts = word_pieces(tokenizer)
    for name, stream in (("tools", tools_stream(SEED + 2, parts)), ("shout", shout_stream(SEED + 3, parts))):
        if name in legs:
            save_adapter(train_adapter(base, tokenizer, stream, legs[name]), options.out / "adapters" / name)


if __name__ == "__main__":
    main()
