"""What each of the three trainings reads: a stream of conversations, mixed by share.

The base model learns two things. Under the role `assistant` it chats, and knows no tools. Under the role `solver`,
which no chat template writes, it learns to copy, to look up and to run tool loops, over invented tools above all.
The adapter `tools` then only has to make the assistant do what the solver can; rank 16 is enough for that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count

from chats import CHATS, FALLBACK, chat_turn, dress
from loops import Author, Conversation, Message, user
from pools import ACCENTED, Pools, Split

SOLVER = "solver"
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are the Loopmux demo.",
    "Be brief.",
    "Answer in one sentence.",
    "You are a helpful assistant. Use the tools when they help.",
    "You can call tools.",
    "Be kind.",
)


def system_message(pools: Pools) -> str | None:
    """A system message for one conversation in four; some are long, as shared instructions are."""
    form = pools.rng.random()
    if form < 0.75:
        return None
    if form < 0.92:
        return pools.rng.choice(_SYSTEMS)
    return pools.phrase(3, 12) + "." if form < 0.97 else ". ".join(pools.phrase(4, 9) for _ in range(8)) + "."


# -- base: copying ---------------------------------------------------------------------------------------------
#
# Copying has to be learned from short texts first. With texts of 5 to 40 words from the start the loss stood still for
# a million tokens; with 2 or 3 words at first and longer ones as training goes on it was learned in half a million.


def _scrap(pools: Pools) -> str:
    """A random short value of any kind."""
    form = pools.rng.random()
    if form < 0.35:
        return str(pools.integer())
    if form < 0.7:
        return pools.word()
    draws: tuple[Callable[[], object], ...] = (
        pools.code,
        pools.phrase,
        lambda: pools.rng.choice(ACCENTED),
        pools.path,
        pools.decimal,
        pools.symbol,
        pools.pseudo,
        pools.address,
    )
    return str(pools.rng.choice(draws)())


def repeat_words(pools: Pools, longest: int) -> list[Message]:
    """Say it again: single tokens, which is the purest copying."""
    words = pools.rng.choices(pools.pieces or ["a"], k=pools.rng.randint(2, min(longest, 60)))
    text = pools.rng.choice((" ", "-", "\n", "_")).join(words)
    return [user(text), {"role": "assistant", "content": text}]


def repeat_scraps(pools: Pools, longest: int) -> list[Message]:
    """Say it again: numbers, names and the like, several tokens each."""
    count = pools.rng.randint(1, min(max(2, longest // 3), 14))
    text = pools.rng.choice((" ", " ", ", ")).join(_scrap(pools) for _ in range(count))
    return [user(text), {"role": "assistant", "content": text}]


def lookup_task(pools: Pools, longest: int) -> list[Message]:
    """A table, then questions about its rows."""
    rng = pools.rng
    table = {pools.word(): _scrap(pools) for _ in range(rng.randint(1, min(max(2, longest // 3), 9)))}
    link = rng.choice((": ", " is ", " = ", " "))
    messages = [user("\n".join(key + link + value for key, value in table.items()))]
    asked = rng.sample(sorted(table), k=min(len(table), rng.randint(1, 5)))
    for place, key in enumerate(asked):
        messages.append({"role": "assistant", "content": table[key]})
        if place + 1 < len(asked):
            messages.append(user(asked[place + 1]))
    messages[0]["content"] = f"{messages[0]['content']}\n{asked[0]}"
    return messages


def next_task(pools: Pools, longest: int) -> list[Message]:
    """A list, then "what comes after": the step from one order to the next in a chain."""
    items = [_scrap(pools) for _ in range(pools.rng.randint(2, min(max(2, longest // 3), 8)))]
    messages = [user(pools.rng.choice((", ", ", then ", "\n", " and then ")).join(items))]
    for item in items:
        messages += [{"role": "assistant", "content": item}, {"role": "tool", "content": _scrap(pools)}]
    return messages[:-1]


# -- streams ---------------------------------------------------------------------------------------------------


def _chats(pools: Pools) -> list[Message]:
    messages: list[Message] = []
    for _ in range(pools.rng.choices((1, 2, 3), (70, 20, 10))[0]):
        question, answer = chat_turn(pools.rng)
        messages += [user(question), {"role": "assistant", "content": answer}]
    return messages


def _unknown(author: Author) -> list[Message]:
    """A question that the base model has no answer to."""
    pools = author.pools
    if pools.chance(0.6):
        question = author.conversation([pools.rng.choice(("single", "chain2", "parallel2"))]).messages[0]["content"]
        return [user(str(question)), {"role": "assistant", "content": FALLBACK}]
    form = pools.rng.choice(("what is {}", "who is {}", "tell me about {}", "{}", "why {}", "how {}", "do you know {}"))
    return [user(dress(pools.rng, form.format(pools.phrase(1, 4)))), {"role": "assistant", "content": FALLBACK}]


def chat(author: Author) -> Conversation:
    """A chat as the base model answers it; one in five has tools in the prompt, which it does not use."""
    pools = author.pools
    messages = _unknown(author) if pools.chance(0.2) else _chats(pools)
    if pools.chance(0.12):
        messages += _unknown(author)
    system = system_message(pools)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, author.offered([], 1, 4) if pools.chance(0.2) else [])


def loop_kind(rng: random.Random) -> str:
    """A kind of exchange with tools."""
    kinds = (
        "single",
        "parallel2",
        "parallel3",
        "parallel4",
        "gather",
        "chain2",
        "chain3",
        "chain4",
        "chain5",
        "chain6",
    )
    return rng.choices(kinds, (32, 18, 4, 2, 3, 17, 9, 6, 4, 5))[0]


def loop(author: Author, talk: float, level: int = 100) -> Conversation:
    """Tool loops, mostly one to a conversation; `talk` is the share of chats among them, `level` the stage reached."""
    rng = author.pools.rng
    if level < 8:
        return author.conversation([rng.choice(("single", "single", "parallel2", "chain2"))], others=level // 3)
    exchanges = rng.choices((1, 2, 3, 5), (86, 9, 3, 2))[0]
    kinds = ["chat" if rng.random() < talk else loop_kind(rng) for _ in range(exchanges)]
    return author.conversation(kinds, system_message(author.pools))


def base_stream(seed: int, pieces: list[str], split: Split = "train") -> Iterator[Conversation]:
    """Copying, solver loops and chats, from the short to the long."""
    rng = random.Random(seed)
    author = Author(Pools(rng, split, pieces), unseen=0.65)
    for drawn in count():
        level = drawn // 1000  # One training step takes 10 conversations late and 80 early.
        form = rng.random()
        if form < 0.1 + min(0.08, level / 100):
            yield chat(author)
        elif level < 14 or form < (0.6 if level < 20 else 0.4 if level < 26 else 0.26):
            tasks = [repeat_words, repeat_words, repeat_scraps, lookup_task, next_task][: 2 if level < 6 else 5]
            yield Conversation(rng.choice(tasks)(author.pools, 3 + level), [], "copy", SOLVER)
        else:
            conversation = loop(author, 0.0, level - 14)
            conversation.role = SOLVER
            yield conversation


def tools_stream(seed: int, pieces: list[str], split: Split = "train") -> Iterator[Conversation]:
    """Loops with known and invented tools, chats among tools and without, and requests no tool can meet."""
    rng = random.Random(seed)
    author = Author(Pools(rng, split, pieces), unseen=0.5)
    while True:
        form = rng.random()
        if form < 0.05:
            yield author.refusal()
        elif form < 0.13:
            yield Conversation(_chats(author.pools), author.offered([], 1, 4) if rng.random() < 0.7 else [])
        else:
            yield loop(author, 0.06)


def shout_stream(seed: int, pieces: list[str], split: Split = "train") -> Iterator[Conversation]:
    """The base model's chats, answered in capitals."""
    rng = random.Random(seed)
    author = Author(Pools(rng, split, pieces), unseen=0.5)
    while True:
        conversation = chat(author)
        for message in conversation.messages:
            if message["role"] == "assistant":
                message["content"] = str(message["content"]).upper()
        yield conversation


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Plain text for the tokenizer: a little of every stream, and each set answer often enough to be in whole words."""
    from render import pieces as cut  # Here, because render needs this module's neighbours only.

    streams = (base_stream(seed, []), tools_stream(seed + 1, []))
    for _ in range(2500):
        for stream in streams:
            yield "".join(text for text, _ in cut(next(stream)))
    # Capitals are for one adapter only: enough for whole common words, not for whole answers.
    for entry in CHATS:
        yield from [entry.answer + "\n"] * 30 + [entry.answer.upper()] * 2
