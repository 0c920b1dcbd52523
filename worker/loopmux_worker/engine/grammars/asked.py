"""What a request asks to be guaranteed: that it calls tools, with what arguments, or answers in JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopmux.errors import BadRequestError
from loopmux.messages import Generate
from loopmux_worker.engine import admission, templates
from loopmux_worker.engine.grammars import schemas


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that may be called; ``arguments`` is the schema that they are held to."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is guaranteed of an output.

    Attributes:
        tools: those that it may call.
        forced: it is calls and nothing else; otherwise it may be text, too.
        several: it may be more than one call.
        answer: the schema of an output that calls nothing; None for any text.
    """

    tools: tuple[Tool, ...]
    forced: bool
    several: bool
    answer: Mapping[str, Any] | None = None


def asked(generate: Generate) -> Asked | None:
    """What a request asks for; None if nothing.

    A tool's arguments are held to its schema where it says ``strict: true``, and where a call is forced unless it says
    ``strict: false``. A forced call leaves no room for an answer, so ``response_format`` says nothing beside it.

    Raises:
        BadRequestError: ``tool_choice`` names no tool, or a schema is none that arguments or answers can be held to.
    """
    if not admission.asks_guarantee(generate):
        return None
    choice = generate.tool_choice
    forced = choice not in ("auto", "none")
    given = () if choice == "none" else generate.tools
    functions = {f"tools[{i}]": templates.checked_tool(tool, f"tools[{i}]")["function"] for i, tool in enumerate(given)}
    tools = tuple(
        Tool(function["name"], _arguments(function, path, forced=forced))
        for path, function in functions.items()
        if choice in ("auto", "required", function["name"])
    )
    if forced and not tools:
        known = ", ".join(sorted(function["name"] for function in functions.values())) or "there are none"
        raise BadRequestError(f"tool_choice: found {choice!r}, expected the call of a tool among these: {known}")
    answer = None
    if generate.response_format is not None and not forced:
        answer = schemas.held(generate.response_format, "response_format")
    return Asked(tools, forced, generate.parallel_tool_calls, answer)


def _arguments(function: Mapping[str, Any], path: str, *, forced: bool) -> dict[str, Any]:
    strict = function.get("strict")
    if strict or (forced and strict is None):
        return schemas.arguments(function["parameters"], f"{path}.function.parameters")
    return schemas.arguments({}, path)
