"""Make the demo model from nothing: tokenizer, base model, adapters `tools` and `shout`.

    python configs/demo/train/train.py OUT_DIR [--only tools]

Same seeds, same library versions and same number of threads give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import MIXED, base_stream, shout_stream, tokenizer_texts, tools_stream
from loops import Conversation
from optimizing import Muon, rate
from peft import LoraConfig, get_peft_model
from render import END, PAD, pieces
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizing import CONTEXT, VOCABULARY, save_tokenizer, train_tokenizer, word_pieces
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

SEED = 20_26
THREADS = 2
BATCH_TOKENS = 2560
# Steps of each training; a step takes 0.2 to 0.33 seconds, by how quiet the cores are.
BASE_STEPS, REFINE_STEPS, TOOLS_STEPS, SHOUT_STEPS = 5800, 2600, 1500, 400
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100
PARTS = ("base", "refine", "tools", "shout")


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


def core_of(model: Any) -> LlamaForCausalLM:
    """The model itself, within PEFT's wrapping or without it."""
    while not isinstance(model, LlamaForCausalLM):
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


def fit(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    stream: Iterator[Batch],
    steps: int,
    name: str,
    cooldown: float = 0.5,
) -> None:
    """Train for a number of steps, with a line of progress every hundred."""
    full = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    began, total, seen = time.monotonic(), 0.0, 0
    model.train()
    core_of(model).set_attn_implementation("fp32")
    for step in range(steps):
        for optimizer, rates in zip(optimizers, full, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step, steps, cooldown=cooldown)
        batch = next(stream)
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total, seen = total + loss.item(), seen + batch.inputs.numel()
        if (step + 1) % 100 == 0:
            print(
                f"{name} step {step + 1}/{steps} loss {total / 100:.4f} tokens {seen / 1e6:.2f}M "
                f"seconds {time.monotonic() - began:.0f}",
                flush=True,
            )
            total = 0.0
    model.eval()


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


def new_model(layers: int) -> LlamaForCausalLM:
    """The base model's shape with fresh weights: 1.8 million parameters with four layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            num_hidden_layers=layers,
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


def train_base(tokenizer: Tokenizer, steps: int, layers: int) -> LlamaForCausalLM:
    """The base model from nothing."""
    torch.manual_seed(SEED)
    model = new_model(layers)
    stream = base_stream(SEED, word_pieces(tokenizer))
    fit(model, _optimizers(model, 1.0), batches(tokenizer, stream, SEED), steps, "base")
    return model


def refine_base(folder: Path, tokenizer: Tokenizer, steps: int) -> LlamaForCausalLM:
    """The base model as stored, trained on with fresh data and a smaller rate that falls from the start.

    At the full rate the loss is mostly noise of small batches: it falls to a quarter while the rate falls.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stream = base_stream(SEED + 4, word_pieces(tokenizer), start=MIXED, renamed=0.15)
    fit(model, _optimizers(model, 0.4), batches(tokenizer, stream, SEED), steps, "refine", cooldown=1.0)
    return model


def _optimizers(model: LlamaForCausalLM, share: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest, at a share of the full rates."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=0.02 * share),
        torch.optim.AdamW(rest, lr=3e-3 * share, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_adapter(folder: Path, tokenizer: Tokenizer, stream: Iterator[Conversation], steps: int, name: str) -> Any:
    """A LoRA adapter on the base model as stored, so that it fits the rounded weights."""
    torch.manual_seed(SEED)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    fit(
        model,
        [torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)],
        batches(tokenizer, stream, SEED),
        steps,
        name,
    )
    return model


def save_base(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
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
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = options.out / "base"
    if "base" in options.only:
        tokenizer = train_tokenizer(tokenizer_texts(SEED + 1))
        save_base(train_base(tokenizer, options.steps or BASE_STEPS, options.layers), tokenizer, base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    if "refine" in options.only:
        save_base(refine_base(base, tokenizer, options.steps or REFINE_STEPS), tokenizer, base)
    parts = word_pieces(tokenizer)
    for name, stream, steps in (
        ("tools", tools_stream(SEED + 2, parts), TOOLS_STEPS),
        ("shout", shout_stream(SEED + 3, parts), SHOUT_STEPS),
    ):
        if name in options.only:
            save_adapter(
                train_adapter(base, tokenizer, stream, options.steps or steps, name), options.out / "adapters" / name
            )


if __name__ == "__main__":
    main()
