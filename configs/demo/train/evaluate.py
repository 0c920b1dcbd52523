"""Run held-out loops to the end, greedily, and print how many are right.

    python configs/demo/train/evaluate.py [configs/demo] [--form merged|adapter] [--dtype bf16|fp32]
                                          [--count 200] [--seed 1]

"Held out": no number of two or more digits, no name, no word that a request holds occurs in training; for the rows
"unseen" neither do the names of tools and parameters (see pools.py). Rows "renamed" offer
known tools under any of their family's names instead of the usual ones. A call is exact when its name and its arguments
are equal as JSON; a loop is right when every turn makes exactly the calls wanted and the final answer is the one
wanted, letter by letter. A loop ends at its first wrong turn and calls that it never came to count as wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpus import KINDS, chat, loud, system_message
from loops import Author, Conversation
from peft import PeftModel
from pools import Pools
from render import CALL, CALL_END, END, pieces
from tokenizers import Tokenizer
from tokenizing import CONTEXT, word_pieces
from transformers import AutoModelForCausalLM

_CALL = re.compile(re.escape(CALL) + r"\s*(.*?)\s*" + re.escape(CALL_END), re.DOTALL)
_BATCH = 64


@dataclass(slots=True)
class Run:
    """One conversation on its way: the ids so far, what is still to come, and the score."""

    ids: list[int]
    rest: list[tuple[list[int], str, list[int]]]
    calls: int = 0
    exact: int = 0
    right: bool = False
    trace: list[str] = field(default_factory=list)


def calls_of(text: str) -> list[object] | None:
    """The calls in a turn, or None if one of them is no JSON."""
    try:
        return [json.loads(body) for body in _CALL.findall(text)]
    except json.JSONDecodeError:
        return None


def prepare(tokenizer: Tokenizer, conversation: Conversation) -> Run:
    """Cut a conversation into the prompt, then (turn wanted, ids of what follows it)."""
    run = Run([], [])
    before: list[int] = []
    wanted = ""
    for text, mine in [*pieces(conversation), ("", True)]:
        if mine:
            if wanted:
                run.rest.append(([], wanted, before))
            else:
                run.ids = before
            wanted, before = text.removesuffix(END), []
        else:
            before = before + tokenizer.encode(text, add_special_tokens=False).ids
    run.calls = sum(len(calls_of(turn) or []) for _, turn, _ in run.rest)
    return run


@torch.inference_mode()
def advance(model: Any, tokenizer: Tokenizer, runs: list[Run]) -> list[Run]:
    """One turn of every run; returns those that go on."""
    end, pad = tokenizer.token_to_id(END), 0
    length = max(len(run.ids) for run in runs)
    inputs = torch.full((len(runs), length), pad)
    mask = torch.zeros_like(inputs)
    for row, run in enumerate(runs):
        inputs[row, length - len(run.ids) :] = torch.tensor(run.ids)
        mask[row, length - len(run.ids) :] = 1
    longest = max(len(tokenizer.encode(run.rest[0][1]).ids) for run in runs)
    made = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
        max_new_tokens=min(longest + 24, CONTEXT),
    )[:, length:]
    going = []
    for run, row in zip(runs, made.tolist(), strict=True):
        ids = row[: row.index(end)] if end in row else row
        text = tokenizer.decode(ids, skip_special_tokens=True)
        _, wanted, after = run.rest.pop(0)
        run.trace.append(text)
        hoped = calls_of(wanted) or []
        if hoped:
            got = calls_of(text) or []
            run.exact += sum(one == other for one, other in zip(hoped, got, strict=False))
            fine = got == hoped
        else:
            fine = text == wanted
        if not fine or end not in row:
            run.trace[-1] += f"   <<< wanted: {wanted}"
        elif run.rest:
            run.ids = run.ids + row[: row.index(end) + 1] + after
            going.append(run)
        else:
            run.right = True
    return going


def score(model: Any, tokenizer: Tokenizer, conversations: list[Conversation]) -> list[Run]:
    """Run conversations to their ends."""
    runs = [prepare(tokenizer, conversation) for conversation in conversations]
    # Rows of like length together, so that little of a batch is padding.
    order = sorted(runs, key=lambda run: len(run.ids))
    for start in range(0, len(order), _BATCH):
        going = order[start : start + _BATCH]
        while going:
            going = advance(model, tokenizer, going)
    return runs


def tool_loops(
    seed: int, parts: list[str], kind: str, unseen: float, count: int, renamed: float = 0.0
) -> list[Conversation]:
    """Held-out loops of a kind that fit the context."""
    author = Author(Pools(random.Random(f"{seed} {kind} {unseen}"), "test", parts), unseen, renamed)
    out: list[Conversation] = []
    while len(out) < count:
        conversation = author.conversation([kind], system_message(author.pools), 2)
        if sum(len(text) for text, _ in pieces(conversation)) < 2 * CONTEXT:
            out.append(conversation)
    return out


def set_chats(seed: int, parts: list[str], count: int, shout: bool) -> list[Conversation]:
    """Set questions in fresh dress, and unknown ones."""
    author = Author(Pools(random.Random(f"{seed} chats"), "test", parts), 0.5)
    return [loud(chat(author)) if shout else chat(author) for _ in range(count)]


def load(folder: Path, adapter: str | None, form: str, dtype: torch.dtype) -> Any:
    """The base model alone, or with an adapter beside it or merged into it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folder / "adapters" / adapter, autocast_adapter_dtype=False)
        model = model.merge_and_unload() if form == "merged" else model.to(dtype)
    return model.eval()


def report(name: str, runs: list[Run], failures: int) -> None:
    """One row of the table, and some of the failures if wanted."""
    calls = sum(run.calls for run in runs)
    exact = f"{sum(run.exact for run in runs) / calls:7.1%}" if calls else "      -"
    print(
        f"{name:28} {len(runs):5} loops   exact calls {exact}   whole loops "
        f"{sum(run.right for run in runs) / len(runs):7.1%}",
        flush=True,
    )
    for run in [run for run in runs if not run.right][:failures]:
        print("   ", run.trace[-1].replace("\n", " "))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    parser.add_argument("--form", choices=("merged", "adapter"), default="adapter")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose names contain this")
    parser.add_argument("--failures", type=int, default=0, help="failed turns to show per row")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in train.py
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    tokenizer = Tokenizer.from_file(str(options.folder / "base" / "tokenizer.json"))
    parts = word_pieces(tokenizer)
    began = time.monotonic()
    print(f"{options.form} {options.dtype}, seed {options.seed}")
    model = load(options.folder, "tools", options.form, dtype)
    rows: list[tuple[str, Callable[[], list[Conversation]]]] = []
    for label, kinds, unseen, renamed in (
        ("known", KINDS, 0.0, 0.0),
        ("renamed", ("single", "chain2", "parallel2"), 0.0, 1.0),
        ("unseen", tuple(kind for kind in KINDS if kind != "gather"), 1.0, 0.0),
    ):
        for kind in kinds:
            draw = partial(tool_loops, options.seed, parts, kind, unseen, options.count, renamed)
            rows.append((f"{label} {kind}", draw))
    rows.append(("chat among tools", partial(tool_loops, options.seed, parts, "chat", 0.5, options.count)))
    for name, draw in rows:
        if options.rows in name:
            report(name, score(model, tokenizer, draw()), options.failures)
    for name, adapter, capitals in (("base: set questions", None, False), ("shout: set questions", "shout", True)):
        if options.rows not in name:
            continue
        model = load(options.folder, adapter, options.form, dtype)
        report(name, score(model, tokenizer, set_chats(options.seed, parts, options.count, capitals)), options.failures)
    print(f"{time.monotonic() - began:.0f} seconds")


if __name__ == "__main__":
    main()
