"""Calls as Python writes them: ``name(key="value")``. The code is read, never run."""

from __future__ import annotations

import ast
import re
import warnings
from keyword import iskeyword
from typing import Any

from loopmux_worker.engine.calls.bodies import string
from loopmux_worker.engine.calls.output import Output
from loopmux_worker.engine.calls.source import Source, Waiting, marks
from loopmux_worker.engine.calls.values import Call, MalformedCall

TOOL_NAME = re.compile(r"\w[\w.:-]*", re.ASCII)
"""What may be the name of a tool."""
_NAME = re.compile(
    r"""
    "(?:\\.|[^"\\\n])*+"? | '(?:\\.|[^'\\\n])*+'?  # a text, in which nothing is a name
    | (?<![\w.:-]) \w[\w.:-]*+ (?=\s*\()            # of a tool
    | (?<!\w) [A-Za-z_]\w*+ (?=\s*=)                # of an argument
    """,
    re.ASCII | re.DOTALL | re.VERBOSE,
)
_LINE_END = re.compile(rb"\r\n?|\n")
_JSON_WORDS = {"true": True, "false": False, "null": None}
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""A character in the two halves of a JSON escape, which models write in code, too; Python leaves them apart."""


def python_calls(source: Source, output: Output, closing: str) -> Waiting[None]:
    """Read the calls in front of ``closing``, and that."""
    raw: list[str] = []
    while True:
        mark = yield from source.until(marks('"', "'", closing), raw.append)
        if mark in (closing, ""):
            break
        raw.append(mark)
        if (yield from string(source, raw.append, mark, "\n")) == "\n":
            mark = yield from source.until(marks(closing), raw.append)
            break
    _tell(output, "".join(raw).strip(), whole=bool(mark))


def python_list(source: Source, output: Output, mark: str) -> Waiting[None]:
    """Read on behind the bracket, the name and the parenthesis that a list of calls begins with, up to its end.

    Behind other text it is text.
    """
    if output.text.begun:
        output.say(mark)
        return
    raw, depth = [mark], 1
    while depth and mark:
        mark = yield from source.until(marks('"', "'", "[", "]"), raw.append)
        raw.append(mark)
        if mark in ('"', "'"):
            if (yield from string(source, raw.append, mark, "\n")) == "\n":
                break
        else:
            depth += 1 if mark == "[" else -1
    _tell(output, "".join(raw).strip(), whole=bool(mark))


def _tell(output: Output, text: str, *, whole: bool) -> None:
    for one in _each(text) if whole else [text]:
        output.call(one, python_call, whole=whole)


def _each(text: str) -> list[str]:
    """The text of each call; all of it where that is no code."""
    try:
        code = _Code(text)
    except (ValueError, RecursionError):
        return [text]
    return [code.text_of(one) for one in code.calls] or [text]


class _Code:
    """Code as Python reads it, and as it is written: models write names that Python has for itself or not at all.

    Raises:
        MalformedCall: it is none.
    """

    def __init__(self, text: str) -> None:
        self.calls = _call_nodes(_NAME.sub(_stand_in, text))
        self._data = text.encode()  # columns are counted in bytes
        self._lines = [0, *(found.end() for found in _LINE_END.finditer(self._data))]

    def text_of(self, node: ast.expr | ast.keyword) -> str:
        """What stands there."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._lines[node.lineno - 1] + node.col_offset
        return self._data[start : self._lines[node.end_lineno - 1] + node.end_col_offset].decode()


def _stand_in(found: re.Match[str]) -> str:
    """A text as it is; a name that Python could not read as another one of its length."""
    word = found.group()
    read = word[0] in "\"'" or all(part.isidentifier() and not iskeyword(part) for part in word.split("."))
    return word if read else "_" * len(word)


def python_call(raw: str) -> Call:
    """One call.

    Raises:
        MalformedCall: it is none; the message says why.
    """
    code = _Code(raw)
    if len(code.calls) != 1:
        raise MalformedCall(f"found {len(code.calls)} calls, expected one")
    call = code.calls[0]
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise MalformedCall("each argument needs its name")
    if not TOOL_NAME.fullmatch(name := code.text_of(call.func)):
        raise MalformedCall("found no name in front of the arguments")
    return name, {code.text_of(one).partition("=")[0].strip(): _value(one.value) for one in call.keywords}


def _call_nodes(text: str) -> list[ast.Call]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape in a string, which stays as it is
            body = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise MalformedCall(f"found no call name(key=value): {error}") from None
    nodes: list[ast.Call] = []
    for statement in body:
        value = statement.value if isinstance(statement, ast.Expr) else None
        for one in value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]:
            nodes.append(_inner_call(one))
    return nodes


def _inner_call(node: ast.expr | None) -> ast.Call:
    if not isinstance(node, ast.Call):
        raise MalformedCall("found no call name(key=value)")
    if (
        isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Call)
    ):
        return node.args[0]
    return node


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() as text):
            return _PAIR.sub(lambda pair: pair.group().encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)
        case ast.Constant(value=bool() | int() | float() | None):
            return node.value
        case ast.Name(id=word) if word in _JSON_WORDS:
            return _JSON_WORDS[word]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=entries) | ast.Tuple(elts=entries):
            return [_value(entry) for entry in entries]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {str(_value(key)): _value(value) for key, value in zip(keys, values, strict=True) if key}
    raise MalformedCall(f"found {ast.unparse(node)[:80]!r}, expected a value")
