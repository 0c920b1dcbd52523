"""What every engine asks of a request before it starts, and refuses: a model or token that it does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopmux.errors import AdapterNotFoundError, BadRequestError, ContextLengthError, ModelNotFoundError
from loopmux.messages import Generate, ModelSpec, Run


def asks_guarantee(generate: Generate) -> bool:
    """Whether a request wants its output held to something: a call, a tool's parameters, a JSON schema."""
    if generate.tool_choice not in ("auto", "none") or generate.response_format is not None:
        return True
    return generate.tool_choice == "auto" and any(_strict(tool) for tool in generate.tools)


def _strict(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function", tool)
    return isinstance(function, Mapping) and function.get("strict") is True


def check_stop_tokens(generate: Generate, vocabulary: int) -> None:
    """Refuse to wait for a token that can never come.

    Raises:
        BadRequestError: ``stop_token_ids`` holds an id that the model's head, ``vocabulary`` wide, does not produce.
    """
    for i, token in enumerate(generate.stop_token_ids):
        if token >= vocabulary:
            raise BadRequestError(
                f"stop_token_ids[{i}]: found {token}, this model produces ids from 0 to {vocabulary - 1}: give ids of "
                "its own tokenizer, or end at a text with stop"
            )


def callable_tools(generate: Generate) -> tuple[dict[str, Any], ...]:
    """The tools that the model may call: the output is searched for such calls."""
    return () if generate.tool_choice == "none" else generate.tools


def model_of(run: Run, models: Mapping[str, ModelSpec]) -> ModelSpec:
    """The model that a request names.

    Raises:
        ModelNotFoundError: this worker does not serve it.
    """
    if run.model not in models:
        raise ModelNotFoundError(
            f"model {run.model!r} is not served here; this worker has {', '.join(sorted(models))}", model=run.model
        )
    return models[run.model]


def adapter_of(run: Run, models: Mapping[str, ModelSpec]) -> str | None:
    """The model id whose adapter a request runs with, None for the base alone.

    An adapter is named by the model id that it is served as.

    Raises:
        AdapterNotFoundError: no adapter of that name is loaded.
    """
    name = run.adapter or (run.model if models[run.model].adapter_dir else None)
    if name is None or (name in models and models[name].adapter_dir):
        return name
    known = ", ".join(sorted(n for n, m in models.items() if m.adapter_dir)) or "none"
    raise AdapterNotFoundError(f"adapter {name!r} is not loaded; loaded: {known}", model=run.model)


def room_for(prompt: int, prefix: int, wanted: int, context: int) -> int:
    """How many tokens a request may produce: what it wants, or what the context leaves.

    A prompt that leaves no room for a single token is refused; one that leaves less than was asked for is run and ends
    with ``length``.

    Raises:
        ContextLengthError: naming the numbers.
    """
    room = context - prompt
    if room < 1 or prefix > room:
        raise ContextLengthError(
            f"the prompt has {prompt} tokens{f' and resumes behind {prefix}' if prefix else ''}, the context holds "
            f"{context}, and {wanted} new ones were asked for: shorten the prompt to at most {context - 1} tokens"
        )
    return min(wanted, room)
