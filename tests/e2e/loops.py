"""The demo model's example loops with tools that know their script."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import loopmux


def scripted_tools(example: dict[str, Any]) -> list[loopmux.Tool]:
    """Tools that answer what the example says they answer, and insist on the calls it expects."""
    answers: Iterator[tuple[dict[str, Any], Any]] = iter(
        [
            (call, result)
            for turn in example["turns"]
            for call, result in zip(turn["calls"], turn["results"], strict=True)
        ]
    )
    lock = threading.Lock()

    def answer(name: str, arguments: dict[str, Any]) -> Any:
        with lock:
            expected, result = next(answers)
        assert (name, arguments) == (expected["name"], expected["arguments"])
        return result

    def make(schema: dict[str, Any]) -> loopmux.Tool:
        about = schema.get("function", schema)
        name = about["name"]
        return loopmux.Tool(
            name=name,
            description=about.get("description", ""),
            parameters=about["parameters"],
            function=lambda **arguments: answer(name, arguments),
        )

    return [make(schema) for schema in example["tools"]]
