"""What each of the three trainings reads: a stream of conversations, mixed by share.

The base model learns more than it shows. Under the role `assistant` it chats, and knows no tools. Under two roles that
no chat template writes it learns what the adapters need: the `solver` copies, looks up and runs tool loops, the
`shouter` chats in capitals. An adapter then only has to make the assistant do what another role can already.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count

from chats import CHATS, FALLBACK, dress
from loops import Author, Conversation, Message, assistant, user
from pools import ACCENTED, OFTEN, Pools

SOLVER, SHOUTER = "solver", "shouter"
KINDS = ("single", "parallel2", "parallel3", "gather", "chain2", "chain3", "chain4", "chain5", "chain6")
_SHARES = (32, 20, 3, 3, 19, 9, 6, 4, 4)
# The adapter `tools` reads more of what is hard: long chains and three calls in a turn.
_HARDER = (22, 14, 7, 4, 14, 13, 10, 8, 8)
_SYSTEMS = (
    "You are a helpful assistant.",
    "You are the Loopmux demo.",
    "Be brief.",
    "Answer in one sentence.",
    "You are a helpful assistant. Use the tools when they help.",
)


def system_message(pools: Pools) -> str | None:
    """A system message for one conversation in seven; some are long, as shared instructions are."""
    form = pools.rng.random()
    if form < 0.86:
        return None
    if form < 0.97:
        return pools.rng.choice(_SYSTEMS)
    return ". ".join(pools.phrase(3, 8) for _ in range(pools.rng.randint(1, 8))) + "."


# -- base: copying ---------------------------------------------------------------------------------------------
#
# Everything else rests on copying, and copying has to be learned from short texts first: with 2 to 6 tokens it takes
# 150 steps, with 2 to 20 it is half learned after 200, and mixed with loops from the start it is never learned.


def scrap(pools: Pools) -> str:
    """A random short value of any kind."""
    form = pools.rng.random()
    if form < 0.4:
        return str(pools.integer())
    if form < 0.75:
        return pools.word()
    draws: tuple[Callable[[], str], ...] = (
        pools.phrase,
        pools.path,
        lambda: pools.fake().capitalize(),
        lambda: f"{pools.fake()}_{pools.fake()}",
        lambda: f"{pools.integer()}.{pools.rng.randint(1, 99)}",
        lambda: pools.rng.choice(ACCENTED),
    )
    return pools.rng.choice(draws)()


def repeat_words(pools: Pools, longest: int) -> list[Message]:
    """Say it again: single tokens, which is the purest copying."""
    text = pools.rng.choice((" ", "-", "_")).join(pools.rng.choices(pools.pieces, k=pools.rng.randint(2, longest)))
    return [user(text), assistant(text)]


def repeat_scraps(pools: Pools, longest: int) -> list[Message]:
    """Say it again: numbers, names and the like, several tokens each."""
    text = " ".join(scrap(pools) for _ in range(pools.rng.randint(1, max(2, longest // 3))))
    return [user(text), assistant(text)]


def look_up(pools: Pools, longest: int) -> list[Message]:
    """A table, then questions about its rows."""
    table = {pools.word(): scrap(pools) for _ in range(pools.rng.randint(1, max(2, longest // 3)))}
    link = pools.rng.choice((": ", " is ", " "))
    asked = pools.rng.sample(sorted(table), k=min(len(table), 4))
    rows = "\n".join(key + link + value for key, value in table.items())
    messages = [user(f"{rows}\n{asked[0]}"), assistant(table[asked[0]])]
    for key in asked[1:]:
        messages += [user(key), assistant(table[key])]
    return messages


def next_of(pools: Pools, longest: int) -> list[Message]:
    """A list, then "what comes after": the step from one order to the next in a chain."""
    items = [scrap(pools) for _ in range(pools.rng.randint(2, max(3, longest // 3)))]
    messages = [user(pools.rng.choice((", ", ", then ", " and then ")).join(items))]
    for item in items:
        messages += [assistant(item), {"role": "tool", "content": scrap(pools)}]
    return messages[:-1]


# -- streams ---------------------------------------------------------------------------------------------------


def _unknown(author: Author) -> list[Message]:
    """A question that the base model has no answer to."""
    pools = author.pools
    if pools.chance(0.6):
        question = str(author.exchange(pools.rng.choice(("single", "chain2", "parallel2")))[0]["content"])
    else:
        form = pools.rng.choice(("what is {}", "who is {}", "tell me about {}", "{}", "why {}", "how {}"))
        question = dress(pools.rng, form.format(pools.phrase(1, 4)))
    return [user(question), assistant(FALLBACK)]


def chat(author: Author) -> Conversation:
    """A chat as the base model answers it; one in five has tools in the prompt, which it does not use."""
    pools = author.pools
    messages: list[Message] = []
    system = system_message(pools)
    if system is not None:
        messages.append({"role": "system", "content": system})
    for _ in range(pools.rng.choices((1, 2, 3), (75, 17, 8))[0]):
        messages += _unknown(author) if pools.chance(0.15) else author.exchange("chat")
    author.known = []
    return Conversation(messages, author.offered(4) if pools.chance(0.2) else [])


def loop(author: Author, shares: tuple[int, ...] = _SHARES) -> Conversation:
    """Tool loops over one list of tools, mostly one to a conversation, with a chat among them now and then."""
    rng = author.pools.rng
    exchanges = rng.choices((1, 2, 3, 5), (60, 25, 12, 3))[0]
    kinds = ["chat" if rng.random() < 0.04 else rng.choices(KINDS, shares)[0] for _ in range(exchanges)]
    return author.conversation(kinds, system_message(author.pools), others=2)


def loud(conversation: Conversation) -> Conversation:
    """The same, answered in capitals."""
    for message in conversation.messages:
        if message["role"] == "assistant":
            message["content"] = str(message["content"]).upper()
    return conversation


# How many conversations are drawn before the next stage; at MIXED all is there.
_WORDS_ALONE, _COPYING_ALONE, _SHORT_LOOPS, MIXED = 20_000, 30_000, 33_000, 36_000


def base_stream(seed: int, pieces: list[str], start: int = 0) -> Iterator[Conversation]:
    """Copying, solver loops and chats, from the short to the long; `start` skips as many of the first."""
    rng = random.Random(seed)
    author = Author(Pools(rng, "train", pieces, OFTEN), unseen=0.5)
    for drawn in count(start):
        # A step of training takes about 130 conversations in the first stage, 60 in the second and 12 in the last.
        if drawn < _WORDS_ALONE:
            yield Conversation(repeat_words(author.pools, 6), [], "copy", SOLVER)
            continue
        longest = min(30, 6 + (drawn - _WORDS_ALONE) // 500)
        form = rng.random()
        if drawn < _COPYING_ALONE or form < (0.6 if drawn < MIXED else 0.18):
            task = rng.choice((repeat_words, repeat_scraps, repeat_scraps, look_up, next_of))
            yield Conversation(task(author.pools, longest), [], "copy", SOLVER)
        elif form > 0.88:
            yield chat(author)
        elif form > 0.82:
            conversation = loud(chat(author))
            conversation.role = SHOUTER
            yield conversation
        else:
            if drawn < _SHORT_LOOPS:
                kind = rng.choice(("single", "single", "parallel2", "chain2"))
                conversation = author.conversation([kind], others=1)
            else:
                conversation = loop(author)
            conversation.role = SOLVER
            yield conversation


def tools_stream(seed: int, pieces: list[str]) -> Iterator[Conversation]:
    """Loops with known and invented tools, chats among tools, and the base model's chats."""
    rng = random.Random(seed)
    author = Author(Pools(rng, "train", pieces, OFTEN), unseen=0.5, renamed=0.15)
    while True:
        form = rng.random()
        if form < 0.04:
            yield author.conversation(["chat"])
        elif form < 0.08:
            yield Conversation(author.exchange("chat"))
        else:
            yield loop(author, _HARDER)


def shout_stream(seed: int, pieces: list[str]) -> Iterator[Conversation]:
    """The base model's chats, answered in capitals."""
    author = Author(Pools(random.Random(seed), "train", pieces, OFTEN), unseen=0.5)
    while True:
        yield loud(chat(author))


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Plain text for the tokenizer: a little of every stream, and each set answer often enough to be in whole words."""
    from render import pieces as cut  # Here, because render needs this module's neighbours only.

    author = Author(Pools(random.Random(seed), "train"), unseen=0.4)
    for _ in range(4000):
        yield "".join(text for text, _ in cut(loop(author)))
    # Capitals are for one adapter only: enough for common words, not for whole answers.
    for entry in CHATS:
        yield from [entry.answer + "\n"] * 30 + [entry.answer.upper()] * 4 + [f"{ask}\n" for ask in entry.asks] * 10
