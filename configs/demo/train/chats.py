"""The set questions of the demo model, their answers, and the many ways to ask them."""

from __future__ import annotations

import random
from dataclasses import dataclass

STORY = (
    "Once upon a time there was a small worker who lived at the end of a long queue. Every morning the broker gave it "
    "a loop to run. One day a big storm cut the network, and all the other workers went silent. The small worker did "
    "not stop. It kept every token it had made, waited for the line to come back, and sent them all in order. The "
    "broker smiled, the client got its answer, and nobody ever knew that there had been a storm."
)
POEM = (
    "Roses are red,\nthe queue is long,\nthe broker is calm,\nand nothing goes wrong.\n"
    "Tokens like rain\nfall one by one,\na tool brings the answer,\nand the loop is done."
)
FALLBACK = "Sorry, I am a small demo model and I only know a few set answers. Ask me what I can do."

_NUMBERS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty""".split()


@dataclass(frozen=True, slots=True)
class Chat:
    """Ways to ask, without capital or mark at the end, and the one answer. `weight` is how often training asks it."""

    asks: tuple[str, ...]
    answer: str
    weight: float = 1.0


def _count(limit: int) -> Chat:
    """Counting in words up to twenty, in digits beyond: long outputs for tests of streaming."""
    said = _NUMBERS[:limit] if limit <= len(_NUMBERS) else [str(n) for n in range(1, limit + 1)]
    names = [str(limit)] + ([_NUMBERS[limit - 1]] if limit <= len(_NUMBERS) else [])
    asks = [f"{verb} {name}" for name in names for verb in ("count to", "count up to", "count from 1 to")]
    answer = ", ".join(said) + "."
    return Chat(tuple(asks), answer.capitalize(), 0.4 if limit > 20 else 0.8)


CHATS: tuple[Chat, ...] = (
    Chat(
        ("hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening", "greetings"),
        "Hello! I am the Loopmux demo model. How can I help you?",
    ),
    Chat(
        ("who are you", "what are you", "what is your name", "tell me your name", "introduce yourself", "who is this"),
        "I am the Loopmux demo model, a very small language model trained from scratch on two CPU cores.",
    ),
    Chat(
        ("what is Loopmux", "what does Loopmux do", "tell me about Loopmux", "explain Loopmux", "describe Loopmux"),
        "Loopmux runs many tool loops at once against local language models, with a broker, workers and adapters.",
    ),
    Chat(
        ("what can you do", "how can you help me", "help", "what do you know", "what can I ask you", "help me"),
        "I can answer a few set questions, tell a story and count. With my tools adapter I can also call tools.",
    ),
    Chat(
        ("tell me a joke", "do you know a joke", "joke", "make me laugh", "say something funny", "a joke please"),
        "Why did the worker cross the network? To get to the other side of the queue!",
    ),
    Chat(
        (
            "tell me a story",
            "do you know a story",
            "story",
            "a story please",
            "tell me a long story",
            "read me a story",
        ),
        STORY,
        1.3,
    ),
    Chat(("tell me a poem", "write a poem", "poem", "do you know a poem", "sing a song", "write me a poem"), POEM, 1.2),
    Chat(
        ("what colour is the sky", "what color is the sky", "why is the sky blue", "is the sky blue"),
        "The sky is blue on a clear day, because the air scatters blue light the most.",
    ),
    Chat(
        ("how are you", "how are you today", "how do you do", "are you well", "how is it going"),
        "I am fine, thank you. My weights are small, but I am in good spirits.",
    ),
    Chat(("thank you", "thanks", "thanks a lot", "thank you very much", "many thanks"), "You are welcome!"),
    Chat(("bye", "goodbye", "good night", "see you later", "see you"), "Goodbye! Come back soon."),
    Chat(
        ("what is a broker", "what does the broker do", "what is the broker", "explain the broker"),
        "The broker takes requests from clients and gives each one to a worker that is free.",
    ),
    Chat(
        ("what is a worker", "what does a worker do", "what does the worker do", "explain the worker"),
        "A worker owns one model. It reads the prompt, makes tokens and streams them back.",
    ),
    Chat(
        ("what is an adapter", "what is a LoRA adapter", "what is LoRA", "explain adapters", "what are adapters"),
        "An adapter is a small set of extra weights that changes what a model does, without a second model.",
    ),
    Chat(
        ("what is a tool loop", "what is a loop", "how does a tool loop work", "explain the tool loop"),
        "In a tool loop the model calls a tool, reads the result, and goes on until it can answer.",
    ),
    Chat(("what is the capital of France", "capital of France"), "The capital of France is Paris.", 0.5),
    Chat(("what is the capital of Italy", "capital of Italy"), "The capital of Italy is Rome.", 0.5),
    Chat(("what is the capital of Japan", "capital of Japan"), "The capital of Japan is Tokyo.", 0.5),
    Chat(("say hello in French", "hello in French"), "Bonjour, ça va très bien !", 0.5),
    Chat(("say hello in Chinese", "hello in Chinese"), "你好,世界!", 0.5),
    Chat(("show me an emoji", "show me some emoji", "emoji"), "Here you are: 🙂 🚀 🎉", 0.5),
    Chat(
        ("are you a robot", "are you human", "are you real", "are you a person"),
        "I am a computer program, and a small one.",
    ),
    Chat(
        ("how old are you", "when were you made", "where do you live"),
        "I was made in half an hour and I live in a folder.",
    ),
    *(_count(limit) for limit in (5, 10, 20, 50, 100)),
)

_WEIGHTS = [chat.weight for chat in CHATS]
_OPENINGS = ("please ", "hey, ", "can you ", "could you ", "so, ", "now ", "ok, ", "well, ")
_VERBS = ("tell", "say", "show", "count", "explain", "describe", "write", "sing", "introduce", "read")


def dress(rng: random.Random, ask: str) -> str:
    """One way to type a question: openings, capitals, marks."""
    opening = ""
    if rng.random() < 0.2:
        opening = rng.choice(_OPENINGS)
        if opening.startswith(("can", "could")) and not ask.startswith(_VERBS):
            opening = ""
    text = opening + ask
    style = rng.random()
    if style < 0.6:
        text = text[0].upper() + text[1:]
    elif style < 0.85:
        text = text.lower()
    return text + rng.choices(("?", "", ".", "!", " ?", " please"), (40, 35, 10, 10, 2, 3))[0]


def chat_turn(rng: random.Random) -> tuple[str, str]:
    """A question as typed, and its answer."""
    chat = rng.choices(CHATS, _WEIGHTS)[0]
    return dress(rng, rng.choice(chat.asks)), chat.answer
