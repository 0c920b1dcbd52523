"""The tokenizer: byte-level BPE in which a word is cut the same way wherever it stands.

Digits are single tokens and a space never joins a word, so `Paris` in a question and `"Paris"` in JSON are the same
ids and copying is exact. Only JSON punctuation joins into larger tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from render import CALL, CALL_END, END, PAD, START, TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT = 1024
VOCABULARY = 1024

# Capital humps, words, digits one by one, JSON punctuation with its spaces, and whatever is left one by one.
_WORDS = r"""[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]|[{}\[\]":,]+(?: [{}\[\]":,]+)* ?|[^\x00-\x7f]+|[\s\S]"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of `VOCABULARY` tokens, all bytes among them, so that any text survives."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The call marks are no special tokens: decoding without those must keep them for the parser.
    added = [AddedToken(text, special=True, normalized=False) for text in (PAD, START, END)]
    added += [AddedToken(text, special=False, normalized=False) for text in (CALL, CALL_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=added,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((_without_marks(text) for text in texts), trainer)
    return tokenizer


def _without_marks(text: str) -> str:
    for mark in (START, END, CALL, CALL_END):
        text = text.replace(mark, "\n")
    return text


def word_pieces(tokenizer: Tokenizer) -> list[str]:
    """The tokens of small letters alone, of which invented names are made."""
    return sorted(text for text in tokenizer.get_vocab() if text.isascii() and text.isalpha() and text.islower())


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files by hand: the class name that transformers 5 writes does not load in 4.57."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] not in (CALL, CALL_END)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
