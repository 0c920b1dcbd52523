"""Show that the files read alike in every version of transformers, and that the chat template keeps its promises.

    python configs/demo/train/check_versions.py REFERENCE.safetensors

The first run writes the file of logits and ids, a run in another environment compares with it. Each run also checks
that the template renders conversations to the very ids that training used, that a longer conversation begins with the
ids of the shorter one, and that any text survives the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import MIXED, base_stream, tools_stream
from evaluate import load
from loops import Conversation
from render import CALL, CALL_END, END, START, pieces
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1]
_TEXTS = (
    "Zürich, São Paulo, 你好世界 🙂🚀",
    "tabs\tand\r\nlines\n\n",
    "  two  spaces ",
    '{"a": [1, 2.5, "x"]}',
    "\u200b\ufeff\x00",
    "Ελλάδα Москва עברית العربية हिन्दी",
    "".join(map(chr, range(32, 0x250))),
)


def sample(count: int) -> list[Conversation]:
    """Conversations of every kind."""
    out = []
    for stream in (tools_stream(7, []), base_stream(8, [], start=MIXED)):
        out += [next(stream) for _ in range(count)]
    for conversation in out:
        conversation.role = "assistant"
    return out


def ids_of(tokenizer: Any, messages: list[Any], tools: list[Any] | None, prompt: bool) -> list[int]:
    """What `apply_chat_template` makes of a conversation."""
    made = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    return list(made["input_ids"])


def check_template(tokenizer: Any, count: int) -> int:
    """Template and training agree by ids, and every turn's rendering begins with what came before it."""
    turns = 0
    for conversation in sample(count):
        tools = [tool.schema() for tool in conversation.tools] or None
        ids: list[int] = []
        before = ""
        shown = 1 if conversation.messages[0]["role"] == "system" else 0
        for text, mine in pieces(conversation):
            if mine:
                shown = next(
                    index
                    for index, message in enumerate(conversation.messages)
                    if index >= shown and message["role"] == "assistant"
                )
                ids += tokenizer.encode(before, add_special_tokens=False)
                assert ids_of(tokenizer, conversation.messages[:shown], tools, True) == ids, conversation
                before, shown, turns = "", shown + 1, turns + 1
                ids += tokenizer.encode(text, add_special_tokens=False)
            else:
                before += text
        bare = [tool["function"] for tool in tools] if tools else None
        whole = ids_of(tokenizer, conversation.messages, bare, False)
        assert whole == ids + tokenizer.encode(before, add_special_tokens=False), conversation
    return turns


def check_tokens(tokenizer: Any) -> None:
    """Marks are one id each, call marks survive decoding, any text comes back as it was."""
    for mark in (START, END, CALL, CALL_END):
        assert len(tokenizer.encode(mark, add_special_tokens=False)) == 1, mark
    assert tokenizer.eos_token == END
    ids = tokenizer.encode(f"{START}assistant\n{CALL}\n{{}}\n{CALL_END}{END}", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"assistant\n{CALL}\n{{}}\n{CALL_END}"
    for text in _TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text, text


@torch.inference_mode()
def outputs(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Ids and fp32 logits of some prompts under every adapter, beside the base model and merged."""
    random.seed(0)
    found: dict[str, torch.Tensor] = {}
    for place, conversation in enumerate(sample(3)):
        tools = [tool.schema() for tool in conversation.tools] or None
        found[f"ids {place}"] = torch.tensor(ids_of(tokenizer, conversation.messages, tools, False))
    for adapter, form in ((None, "adapter"), ("tools", "adapter"), ("tools", "merged"), ("shout", "adapter")):
        model = load(FOLDER, adapter, form, torch.float32)
        for place in range(6):
            logits = model(input_ids=found[f"ids {place}"][None]).logits[0]
            found[f"logits {adapter} {form} {place}"] = logits.float().clone()
    return found


def main() -> None:
    """Check, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in train.py
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    check_tokens(tokenizer)
    turns = check_template(tokenizer, options.count)
    print(f"transformers {transformers.__version__}, {type(tokenizer).__name__}: tokens and {turns} turns are right")
    found = outputs(tokenizer)
    if not options.reference.exists():
        save_file(found, options.reference)
        print("reference written")
        return
    known = load_file(options.reference)
    for name, value in found.items():
        if name.startswith("ids"):
            assert torch.equal(value, known[name]), name
    worst = max(float((found[name] - known[name]).abs().max()) for name in found if name.startswith("logits"))
    print(json.dumps({"ids": "equal", "largest logit difference": worst}))


if __name__ == "__main__":
    main()
