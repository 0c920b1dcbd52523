"""Scripts for the echo engine: tool loops without weights.

The last user message may hold lines of directives, one assistant turn after the other:

- ``!call NAME {json}`` calls a tool; a following line ``+call NAME {json}`` is another call of the same turn,
- ``!say TEXT`` answers with that text.

The assistant turns behind that message are counted, so each run plays the next line. Behind the last line comes an
answer that repeats the tool results. Malformed JSON goes out as it is.
"""

from __future__ import annotations

from typing import Any

from loopmux.messages import Generate
from loopmux_worker.engine.calls.jsoncalls import CLOSE, OPEN

_PIECE = 4
"""Characters of one token of a script: so that tags and JSON are cut in awkward places, as models do."""
_MOST = 4096
"""Tokens of a script; in a longer one each has more characters, so that a call of a megabyte takes no minute."""


def script_of(generate: Generate) -> str | None:
    """The text of this turn, or None where the last user message is no script."""
    messages = generate.messages or ({"role": "user", "content": generate.prompt or ""},)
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        return None
    turns = _turns(str(messages[users[-1]].get("content") or ""))
    if not turns:
        return None
    behind = messages[users[-1] + 1 :]
    done = sum(message.get("role") == "assistant" for message in behind)
    return turns[done] if done < len(turns) else _summary(behind)


def pieces_of(text: str) -> list[str]:
    """The text of each token; at least one token."""
    size = max(_PIECE, -(-len(text) // _MOST))
    return [text[i : i + size] for i in range(0, len(text), size)] or [""]


def _turns(content: str) -> list[str]:
    turns: list[str] = []
    for line in content.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "!call":
            turns.append(_call(rest))
        elif word == "+call" and turns:
            turns[-1] += "\n" + _call(rest)
        elif word == "!say":
            turns.append(rest)
        elif not turns:
            return []
    return turns


def _call(rest: str) -> str:
    name, _, arguments = rest.partition(" ")
    return f'{OPEN}\n{{"name": "{name}", "arguments": {arguments or "{}"}}}\n{CLOSE}'


def _summary(messages: Any) -> str:
    return "; ".join(str(message.get("content")) for message in messages if message.get("role") == "tool")
