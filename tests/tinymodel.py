"""A tiny random Llama with a byte-level tokenizer, a ChatML template and random LoRA adapters, made for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

CONTEXT = 256
TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>tools\\n' -}}
{%- for tool in tools -%}{{- tool['function'] | tojson + '\\n' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}
{%- for call in message['tool_calls'] or [] -%}
{{- '<tool_call>\\n' + {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson -}}
{{- '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass
class TinyModel:
    folder: Path
    adapters: dict[str, Path] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base)

    def model(self) -> Any:
        return LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()


def write_tokenizer(
    folder: Path, template: str | None = TEMPLATE, added: Sequence[str] = ("<tool_call>", "</tool_call>")
) -> None:
    """256 bytes and some pairs; files that every transformers reads."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges = []
    for pair in [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ã", "¤"), ("â", "Ĥ"), ("l", "l"), ("ll", "o")]:
        merges.append(pair)
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<pad>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<pad>",
              "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)


def write_base(folder: Path, *, hidden: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """A random Llama; its config.json has the keys of transformers 4."""
    write_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=272, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        initializer_range=0.3, eos_token_id=266, bos_token_id=None, pad_token_id=264,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    rope = saved.pop("rope_parameters", None) or {}
    saved |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None}
    saved["torch_dtype"] = saved.pop("dtype", None) or saved.get("torch_dtype")
    (folder / "config.json").write_text(json.dumps(saved))


def write_adapter(base: Path, folder: Path, *, seed: int, **settings: Any) -> Path:
    """A random adapter whose effect is large enough to change greedy answers."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(options | settings)))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "modules_to_save" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


def make(folder: Path) -> TinyModel:
    """Base and adapters: red and blue differ in rank and targets, dora and saved are of rarer kinds."""
    made = TinyModel(folder)
    write_base(made.base)
    variants: dict[str, dict[str, Any]] = {
        "red": {},
        "blue": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "up_proj"]},
        "dora": {"use_dora": True},
        "saved": {"modules_to_save": ["norm"]},
    }
    for seed, (name, settings) in enumerate(variants.items(), 1):
        made.adapters[name] = write_adapter(made.base, folder / name, seed=seed, **settings)
    return made
