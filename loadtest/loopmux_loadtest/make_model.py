"""Writes the random models that the benchmarks use: ``python -m loopmux_loadtest.make_model FOLDER [--shape 110m]``.

A Llama in bfloat16 with a byte tokenizer, and beside it ``FOLDER-lora0`` … of rank 16 on every linear layer. With
``--device cuda`` the numbers are made there, which takes seconds where a CPU takes a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 16_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "110m": {"vocab_size": 16_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 4},
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
}  # fmt: skip
"""110m is the shape of the figures for CPUs; 1b is that of Llama 3.2 1B."""
CONTEXT = 4096
RANK = 16


def write(folder: Path, shape: str, adapters: int, device: str) -> None:
    """Write a model and its adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=CONTEXT, eos_token_id=2, bos_token_id=None)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    for number in range(adapters):
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        wrapped.save_pretrained(f"{folder}-lora{number}")
        model = wrapped.unload()


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m loopmux_loadtest.make_model", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    write(given.folder, given.shape, given.adapters, given.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
