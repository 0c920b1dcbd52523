"""Where the text of a call ends: marks inside of its strings, or of tags that hold values, mean nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loopmux_worker.engine.calls.source import Keep, Source, Waiting, marks


def json_object(source: Source, keep: Keep, *closing: str) -> Waiting[str]:
    """Read on behind the opening brace of a JSON object.

    Returns:
        ``}`` behind its last brace; one of ``closing`` (read, not kept) where that comes first, outside of strings; a
        line end where one came inside of a string and something closes; nothing at the end of the text.
    """
    depth = 1
    while depth:
        mark = yield from source.until(marks('"', "{", "}", "[", "]", *closing), keep)
        if not mark or mark in closing:
            return mark
        keep(mark)
        if mark == '"':
            mark = yield from string(source, keep, '"', *(("\n",) if closing else ()))
            if mark != '"':
                return mark
        else:
            depth += 1 if mark in "{[" else -1
    return "}"


def string(source: Source, keep: Keep, *ends: str) -> Waiting[str]:
    """Read a string with backslash escapes up to what ends it, which is kept and returned; nothing at the text's end.

    A line end among ``ends`` means that a quote was left open: neither JSON nor Python has any inside of strings.
    """
    while True:
        mark = yield from source.until(marks("\\", *ends), keep)
        keep(mark)
        if mark != "\\":
            return mark
        keep((yield from source.character()))


def enclosed(source: Source, closing: tuple[str, ...], again: str = "") -> Waiting[tuple[str, bool]]:
    """Read a call that holds a JSON object, up to and past one of ``closing``: its text, and whether it is whole.

    It is whole, too, where its object is and nothing can close it, the text ends there, or the next call begins
    (``again``, not read).
    """
    raw: list[str] = []
    mark = yield from source.until(marks("{", *closing), raw.append)
    if mark == "{":
        raw.append(mark)
        mark = yield from json_object(source, raw.append, *closing)
        if mark == "}":
            raw.append("" if not closing else (yield from source.space()))
            if not closing or (yield from source.done()) or (again and (yield from source.starts(again))):
                return "".join(raw).strip(), True
    if mark not in closing:
        mark = yield from source.until(marks(*closing), raw.append)
    return "".join(raw).strip(), mark in closing


def bare_object(source: Source, keys: tuple[str, ...], sign: re.Pattern[str]) -> Waiting[tuple[str, bool | None]]:
    """Read on behind a brace in the middle of text, which may begin a call: a JSON object that begins with one of
    ``keys`` and has ``sign`` in it.

    Returns:
        What was read, brace included; whether the call is whole, None if it is none.
    """
    raw = ["{", (yield from source.space())]
    for key in keys:
        if (yield from source.starts(f'"{key}"')):
            mark = yield from json_object(source, raw.append)
            text = "".join(raw)
            return text, mark == "}" if sign.search(text) else None
    return "".join(raw), None


def tagged(source: Source, keep: Keep, values: Mapping[str, str], *closing: str) -> Waiting[str]:
    """Read up to one of ``closing`` outside of values, which is returned; ``values`` has what begins and ends these."""
    while True:
        mark = yield from source.until(marks(*values, *closing), keep)
        if mark not in values:
            return mark
        keep(mark)
        end = yield from source.until(marks(values[mark]), keep)
        keep(end)
        if not end:
            return ""
