"""Demonstrations that work: write `examples.json` from the candidates below that every form of the model gets right.

    python configs/demo/train/examples.py [configs/demo] [--write]

A candidate is kept when greedy decoding makes exactly its calls and its answer in fp32 and in bf16, with the adapter
beside the base model and merged into it. The others are printed with what was said instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chats import CHATS, FALLBACK, STORY
from evaluate import calls_of, load
from transformers import AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1]
FORMS = tuple((form, dtype) for dtype in (torch.float32, torch.bfloat16) for form in ("adapter", "merged"))

Call = tuple[str, dict[str, Any]]

# Description, parameters with their types, and what the tool returns.
TOOLS: dict[str, tuple[str, dict[str, str], Callable[..., object]]] = {
    "add": ("Add two numbers.", {"a": "integer", "b": "integer"}, lambda a, b: a + b),
    "subtract": ("Subtract b from a.", {"a": "integer", "b": "integer"}, lambda a, b: a - b),
    "multiply": ("Multiply two numbers.", {"a": "integer", "b": "integer"}, lambda a, b: a * b),
    "divide": ("Divide a by b.", {"a": "number", "b": "number"}, lambda a, b: a / b),
    "get_weather": (
        "The weather in a city.",
        {"city": "string"},
        lambda city: {"Paris": "sunny", "Rome": "rainy, 18 degrees"}.get(city, "cloudy"),
    ),
    "get_time": ("The time in a city.", {"city": "string"}, lambda city: "14:05"),
    "find_user": ("Find a user by name.", {"name": "string"}, lambda name: {"Anna": 4821, "Bob": 77}.get(name, 12)),
    "send_message": ("Send a message.", {"to": "string", "text": "string"}, lambda to, text: "sent"),
    "set_timer": ("Start a timer.", {"minutes": "integer"}, lambda minutes: "set"),
    "search": ("Search the web.", {"query": "string"}, lambda query: "3 results"),
    "convert": (
        "Convert money.",
        {"amount": "number", "from_currency": "string", "to_currency": "string"},
        lambda amount, from_currency, to_currency: 108.5,
    ),
    "translate": ("Translate a text.", {"text": "string", "language": "string"}, lambda text, language: "bonjour"),
    "read_file": ("Read a file.", {"path": "string"}, lambda path: "buy milk and bread"),
    "get_price": ("The price of a thing.", {"item": "string"}, lambda item: 250),
    "get_date": ("Today's date.", {}, lambda: "2026-03-14"),
    "book_table": ("Book a table.", {"restaurant": "string", "guests": "integer"}, lambda restaurant, guests: "K42"),
    "get_capital": ("The capital of a country.", {"country": "string"}, lambda country: "Madrid"),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt, the tools offered with it, the calls of each turn and words of the final answer."""

    name: str
    prompt: str
    tools: str
    turns: tuple[tuple[Call, ...], ...]
    says: str


def _add(a: int, b: int) -> Call:
    return "add", {"a": a, "b": b}


def _sub(a: int, b: int) -> Call:
    return "subtract", {"a": a, "b": b}


def _mul(a: int, b: int) -> Call:
    return "multiply", {"a": a, "b": b}


def _city(city: str) -> Call:
    return "get_weather", {"city": city}


def _send(to: str, text: str) -> Call:
    return "send_message", {"to": to, "text": text}


_ALL = "add multiply get_weather find_user"
_SUMS = "add multiply subtract"
_BOTH = "The weather in Paris is sunny and the weather in Rome is rainy, 18 degrees."

CANDIDATES: tuple[Candidate, ...] = (
    *(
        Candidate(f"add {place}", prompt, tools, ((_add(12, 30),),), "The answer is 42.")
        for place, (prompt, tools) in enumerate(
            (
                ("add 12 and 30", "add"),
                ("Add 12 and 30.", _ALL),
                ("What is 12 plus 30?", "add"),
                ("what is 12 + 30?", _SUMS),
                ("Please add 12 and 30", _ALL),
                ("Can you add 12 and 30?", "add"),
                ("How much is 12 plus 30?", _SUMS),
                ("Compute 12 plus 30", "add"),
                ("What is the sum of 12 and 30?", _ALL),
            )
        )
    ),
    Candidate("add large", "add 48151 and 623", _ALL, ((_add(48151, 623),),), "48774"),
    *(
        Candidate(f"multiply {place}", prompt, _SUMS, ((_mul(17, 23),),), "The answer is 391.")
        for place, prompt in enumerate(
            ("multiply 17 by 23", "What is 17 times 23?", "what is 17 * 23?", "Multiply 17 and 23.")
        )
    ),
    *(
        Candidate(f"subtract {place}", prompt, _SUMS, ((_sub(50, 8),),), "The answer is 42.")
        for place, prompt in enumerate(("subtract 8 from 50", "What is 50 minus 8?", "Take 8 from 50"))
    ),
    *(
        Candidate(f"weather {place}", prompt, tools, ((_city("Paris"),),), "The weather in Paris is sunny.")
        for place, (prompt, tools) in enumerate(
            (
                ("What is the weather in Paris?", "get_weather"),
                ("what is the weather in Paris", _ALL),
                ("How is the weather in Paris?", _ALL),
                ("weather in Paris", "get_weather add"),
                ("What's the weather in Paris?", "get_weather get_time"),
                ("Tell me the weather in Paris.", _ALL),
            )
        )
    ),
    *(
        Candidate(f"two cities {place}", prompt, tools, ((_city("Paris"), _city("Rome")),), _BOTH)
        for place, (prompt, tools) in enumerate(
            (
                ("What is the weather in Paris and in Rome?", "get_weather"),
                ("What is the weather in Paris and Rome?", "get_weather add"),
                ("what is the weather in Paris and in Rome?", _ALL),
                ("Get the weather in Paris and the weather in Rome.", "get_weather"),
                ("Get the weather in Paris and get the weather in Rome.", _ALL),
            )
        )
    ),
    Candidate(
        "three cities",
        "What is the weather in Paris, Rome and Oslo?",
        "get_weather add",
        ((_city("Paris"), _city("Rome"), _city("Oslo")),),
        "the weather in Oslo is cloudy",
    ),
    *(
        Candidate(f"add then multiply {place}", prompt, tools, ((_add(12, 30),), (_mul(42, 2),)), "The answer is 84.")
        for place, (prompt, tools) in enumerate(
            (
                ("add 12 and 30, then multiply the result by 2", "add multiply"),
                ("Add 12 and 30, then multiply the result by 2.", _ALL),
                ("Add 12 and 30 and then multiply the result by 2.", _SUMS),
                ("Add 12 and 30. Then multiply it by 2.", "add multiply"),
                ("First add 12 and 30, then multiply the result by 2.", _SUMS),
                ("Please add 12 and 30, then multiply the answer by 2", "add multiply"),
            )
        )
    ),
    Candidate(
        "three in a row",
        "Add 5 and 6, then multiply the result by 7, then subtract 3 from it.",
        _SUMS,
        ((_add(5, 6),), (_mul(11, 7),), (_sub(77, 3),)),
        "The answer is 74.",
    ),
    Candidate(
        "four in a row",
        "Add 1 and 2, then multiply the result by 3, then add the result and 4, then multiply the result by 5.",
        "add multiply",
        ((_add(1, 2),), (_mul(3, 3),), (_add(9, 4),), (_mul(13, 5),)),
        "The answer is 65.",
    ),
    *(
        Candidate(
            f"six in a row {place}",
            prompt,
            _SUMS,
            ((_add(12, 30),), (_mul(42, 2),), (_sub(84, 14),), (_add(70, 25),), (_mul(95, 3),), (_sub(285, 60),)),
            "The answer is 225.",
        )
        for place, prompt in enumerate(
            (
                "Add 12 and 30, then multiply the result by 2, then subtract 14 from the result, then add the result "
                "and 25, then multiply the result by 3, then subtract 60 from the result.",
                "Add 12 and 30. Then multiply the result by 2. Then subtract 14 from it. Then add the result and 25. "
                "Then multiply it by 3. Then subtract 60 from it.",
                "1. add 12 and 30\n2. multiply the result by 2\n3. subtract 14 from the result\n"
                "4. add the result and 25\n5. multiply the result by 3\n6. subtract 60 from the result",
            )
        )
    ),
    # Two that work, of some dozens tried.
    Candidate(
        "six sums 0",
        "Subtract 20 from 62. Then add the result and 42. Then multiply the result by 9. Then add the result and 51. "
        "Then subtract 41 from the result. Then add the result and 83",
        _SUMS,
        ((_sub(62, 20),), (_add(42, 42),), (_mul(84, 9),), (_add(756, 51),), (_sub(807, 41),), (_add(766, 83),)),
        "The answer is 849.",
    ),
    Candidate(
        "six sums 1",
        "Multiply 48 by 3. Then subtract 16 from the result. Then multiply the result by 6. Then add the result and "
        "70. Then add the result and 27. Then multiply the result by 3",
        _SUMS,
        ((_mul(48, 3),), (_sub(144, 16),), (_mul(128, 6),), (_add(768, 70),), (_add(838, 27),), (_mul(865, 3),)),
        "The answer is 2595.",
    ),
    Candidate(
        "six tools",
        "Find the user Anna, then send hello to the result, then get the weather in Paris, then set a "
        "timer for 5 minutes, then add 12 and 30, then multiply the result by 2.",
        "find_user send_message get_weather set_timer add multiply",
        (
            (("find_user", {"name": "Anna"}),),
            (_send("4821", "hello"),),
            (_city("Paris"),),
            (("set_timer", {"minutes": 5}),),
            (_add(12, 30),),
            (_mul(42, 2),),
        ),
        "The answer is 84.",
    ),
    *(
        Candidate(f"two sums {place}", prompt, tools, ((_add(12, 30), _mul(6, 7)),), "The answers are 42 and 42.")
        for place, (prompt, tools) in enumerate(
            (("Add 12 and 30 and multiply 6 by 7.", "add multiply"), ("add 12 and 30 and also multiply 6 by 7", _SUMS))
        )
    ),
    Candidate(
        "gather",
        "Add 12 and 30 and multiply 6 by 7, then add the results.",
        "add multiply",
        ((_add(12, 30), _mul(6, 7)), (_add(42, 42),)),
        "The answer is 84.",
    ),
    Candidate(
        "weather and time",
        "Get the weather in Paris and get the time in Rome.",
        "get_time get_weather",
        ((_city("Paris"), ("get_time", {"city": "Rome"})),),
        "the time in Rome is 14:05",
    ),
    Candidate(
        "time", "What time is it in Rome?", "get_time get_weather", ((("get_time", {"city": "Rome"}),),), "14:05"
    ),
    Candidate("user", "Find the user Anna.", "find_user add", ((("find_user", {"name": "Anna"}),),), "4821"),
    Candidate("who", "Who is Bob?", _ALL, ((("find_user", {"name": "Bob"}),),), "77"),
    Candidate(
        "message",
        "Send hello to Bob.",
        "send_message find_user",
        ((_send("Bob", "hello"),),),
        "The message to Bob is sent.",
    ),
    Candidate(
        "quoted message",
        'Send the message "see you at lunch" to Anna.',
        "send_message add",
        ((_send("Anna", "see you at lunch"),),),
        "The message to Anna is sent.",
    ),
    Candidate(
        "user then message",
        "Find the user Anna, then send the message hello to the result.",
        "find_user send_message",
        ((("find_user", {"name": "Anna"}),), (_send("4821", "hello"),)),
        "The message to 4821 is sent.",
    ),
    Candidate(
        "sum then message",
        "Add 12 and 30, then send the result to Bob.",
        "add send_message",
        ((_add(12, 30),), (_send("Bob", "42"),)),
        "The message to Bob is sent.",
    ),
    Candidate(
        "timer", "Set a timer for 10 minutes.", "set_timer get_time", ((("set_timer", {"minutes": 10}),),), "set"
    ),
    Candidate("search", "Search for red shoes.", "search add", ((("search", {"query": "red shoes"}),),), "3 results"),
    Candidate(
        "convert",
        "Convert 100 EUR to USD.",
        "convert add",
        ((("convert", {"amount": 100, "from_currency": "EUR", "to_currency": "USD"}),),),
        "108.5",
    ),
    Candidate(
        "translate",
        'Translate "good morning" to French.',
        "translate search",
        ((("translate", {"text": "good morning", "language": "French"}),),),
        "bonjour",
    ),
    Candidate(
        "file",
        "Read the file notes.txt.",
        "read_file search",
        ((("read_file", {"path": "notes.txt"}),),),
        "buy milk and bread",
    ),
    Candidate("price", "How much does lamp cost?", "get_price add", ((("get_price", {"item": "lamp"}),),), "250"),
    Candidate("date", "What is the date?", "get_date get_weather", ((("get_date", {}),),), "2026-03-14"),
    Candidate(
        "never seen",
        "Book a table with restaurant Roma and guests 4.",
        "book_table add",
        ((("book_table", {"restaurant": "Roma", "guests": 4}),),),
        "K42",
    ),
    Candidate(
        "never seen 2",
        "Get the capital of Spain.",
        "get_capital add",
        ((("get_capital", {"country": "Spain"}),),),
        "Madrid",
    ),
    *(
        Candidate(f"chat among tools {place}", prompt, "add get_weather", (), says)
        for place, (prompt, says) in enumerate(
            (("Hello!", "Loopmux demo model"), ("Who are you?", "Loopmux demo model"), ("Tell me a joke.", "queue"))
        )
    ),
)
_ASKED = (
    "Hello",
    "hello!",
    "Hi",
    "Who are you?",
    "what is your name",
    "What is Loopmux?",
    "What can you do?",
    "Tell me a joke",
    "Count to five",
    "Count to ten.",
    "count to 20",
    "Count to 50",
    "Count to 100",
    "What colour is the sky?",
    "Tell me a story",
    "Tell me a poem.",
    "How are you?",
    "Thank you!",
    "Bye",
    "What is a broker?",
    "What is a worker?",
    "What is an adapter?",
    "What is a tool loop?",
    "What is the capital of France?",
    "Say hello in Chinese",
    "Show me an emoji",
    "Help",
)


def answer_to(question: str) -> str:
    """The set answer."""
    bare = question.lower().rstrip("?!. ")
    return next((chat.answer for chat in CHATS if bare in (ask.lower() for ask in chat.asks)), FALLBACK)


def schemas(names: str) -> list[dict[str, Any]]:
    """The tools of a candidate as JSON schemas."""
    out = []
    for name in names.split():
        description, parameters, _ = TOOLS[name]
        properties = {key: {"type": kind} for key, kind in parameters.items()}
        out.append(
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": description,
                    "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
                },
            }
        )
    return out


class Player:
    """Plays conversations greedily with one form of the model."""

    def __init__(self, folder: Path, adapter: str | None, form: str, dtype: torch.dtype) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base")
        self.model = load(folder, adapter, form, dtype)

    @torch.inference_mode()
    def say(self, messages: list[Any], tools: list[Any] | None) -> str:
        """The next turn."""
        given = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = self.model.generate(**given, do_sample=False, max_new_tokens=400)[0, given["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(made, skip_special_tokens=True))

    def play(self, candidate: Candidate) -> str:
        """Empty if all went as wanted, else what was said at the first difference."""
        messages: list[Any] = [{"role": "user", "content": candidate.prompt}]
        tools = schemas(candidate.tools) or None
        for turn in candidate.turns:
            said = self.say(messages, tools)
            if calls_of(said) != [{"name": name, "arguments": arguments} for name, arguments in turn]:
                return said
            calls = [{"type": "function", "function": {"name": name, "arguments": dict(given)}} for name, given in turn]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            messages += [{"role": "tool", "content": result} for result in results(turn)]
        said = self.say(messages, tools)
        return "" if candidate.says in said and "<tool_call>" not in said else said


def results(turn: tuple[Call, ...]) -> list[str]:
    """What the tools of a turn return."""
    return [str(TOOLS[name][2](**arguments)) for name, arguments in turn]


def tool_examples(folder: Path) -> list[dict[str, Any]]:
    """The candidates that every form gets right."""
    players = [Player(folder, "tools", form, dtype) for form, dtype in FORMS]
    kept = []
    for candidate in CANDIDATES:
        wrong = [said for player in players if (said := player.play(candidate))]
        if wrong:
            print(
                f"FAILED {len(wrong)}/{len(players)} {candidate.name}: {candidate.prompt!r}\n       said {wrong[0]!r}"
            )
            continue
        kept.append(
            {
                "name": candidate.name,
                "adapter": "tools",
                "prompt": candidate.prompt,
                "tools": schemas(candidate.tools),
                "turns": [
                    {"calls": [{"name": name, "arguments": given} for name, given in turn], "results": results(turn)}
                    for turn in candidate.turns
                ],
                "answer_contains": candidate.says,
            }
        )
    return kept


def chat_examples(folder: Path, adapter: str | None) -> list[dict[str, Any]]:
    """The set questions that every form answers as set."""
    players = [Player(folder, adapter, form, dtype) for form, dtype in FORMS]
    kept = []
    for question in _ASKED:
        wanted = answer_to(question).upper() if adapter else answer_to(question)
        wrong = [
            said for player in players if (said := player.say([{"role": "user", "content": question}], None)) != wanted
        ]
        if wrong:
            print(f"FAILED {len(wrong)}/{len(players)} {adapter or 'base'}: {question!r}\n       said {wrong[0]!r}")
            continue
        kept.append({"question": question, "adapter": adapter, "answer": wanted})
    return kept


def main() -> None:
    """Try the candidates, and write the file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in train.py
    chats = [*chat_examples(options.folder, None), *chat_examples(options.folder, "shout")]
    found = {"story": STORY, "fallback": FALLBACK, "loops": tool_examples(options.folder), "chats": chats}
    print(f"{len(found['loops'])} of {len(CANDIDATES)} loops, {len(chats)} of {2 * len(_ASKED)} chats")
    if options.write:
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        Path(__file__).with_name("examples.json").write_text(text)


if __name__ == "__main__":
    main()
