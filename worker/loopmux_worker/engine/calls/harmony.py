"""The channels of gpt-oss: reasoning, calls and text are messages, each with a header that says which it is."""

from __future__ import annotations

import re
from functools import partial

from loopmux_worker.engine.calls.bodies import enclosed
from loopmux_worker.engine.calls.output import Output
from loopmux_worker.engine.calls.source import Keep, Source, Waiting, marks
from loopmux_worker.engine.calls.values import Call, arguments

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALLED, RETURN = "<|end|>", "<|call|>", "<|return|>"
TOKENS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALLED, RETURN)

_ENDS = (END, CALLED, RETURN, START)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w*)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


def harmony(source: Source, output: Output, *, calls: bool) -> Waiting[None]:
    """Read messages up to the end of the text: ``<|channel|>analysis<|message|>…<|end|><|start|>assistant…``.

    A message that is addressed to a function is a call, the analysis channel is reasoning, the others are text.
    """
    while not (yield from source.done()):
        header: list[str] = []
        end = yield from source.until(marks(MESSAGE, END, CALLED, RETURN), header.append)
        said = "".join(header)
        recipient, channel = _RECIPIENT.search(said), _CHANNEL.search(said)
        if end != MESSAGE:
            if START not in said and CHANNEL not in said:
                output.say(said)  # an answer without headers is not lost
        elif recipient and calls:
            name = recipient[1].removeprefix("functions.")
            raw, whole = yield from enclosed(source, _ENDS)
            output.call(raw, partial(_call, name), whole=whole)
        elif channel and channel[1] == "analysis":
            yield from _content(source, output.reasoning.add)
            output.reasoning.interrupt()
        else:
            output.text.interrupt()
            yield from _content(source, output.text.add)


def _call(name: str, raw: str) -> Call:
    return name, arguments(raw)


def _content(source: Source, keep: Keep) -> Waiting[None]:
    """The content of a message, without tokens that have no place in one."""
    while (yield from source.until(marks(*TOKENS), keep)) not in (*_ENDS, ""):
        pass
