"""What a caller may say with a request, turned into the two halves of a SUBMIT in one place.

``prepare`` refuses everything that can be refused without a broker: unknown options, wrong types, values out of range,
texts that are not text, requests that are too large.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from loopmux import codec, wire
from loopmux.errors import BadRequestError, PayloadTooLargeError, ProtocolError
from loopmux.messages import DEFAULT_TIMEOUT, Generate, Sampling, Submit
from loopmux.nearest import did_you_mean

_HASHED = 32
"""Messages at the beginning, and at the end, of a conversation that the broker is told the hashes of."""
_ROUTE_LIMIT = wire.SUBMIT_ROUTE_LIMIT - 128
"""Largest ROUTE of SUBMIT, bytes; ATTACH has a fingerprint as well."""
_SHOWN_BEFORE = 12
"""Characters shown in front of the offending one in a text that is not valid Unicode."""


class Defaults(TypedDict, total=False):
    """Options that ``Client(...)`` takes beside its own ``timeout``; see ``Options``."""

    model: str
    adapter: str | None
    session: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logit_bias: Mapping[int, float] | Mapping[str, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: int | None
    response_format: Mapping[str, Any] | None
    deterministic: bool
    ignore_eos: bool
    priority: int
    idle_timeout: float | None
    wait: bool
    cancel_on_disconnect: bool
    tool_choice: str
    parallel_tool_calls: bool
    reasoning: bool | None
    template_kwargs: Mapping[str, Any]
    continues: bool
    trace: str | None


class Options(Defaults, total=False):
    """What may be said with every call, and once for all calls with ``with_options``.

    ``timeout`` is the total deadline in seconds; ``idle_timeout`` ends a stream that has begun and then brings no token
    for that long. ``model`` defaults to "default", ``max_new_tokens`` to 256, ``temperature`` to 0.7. An option that is
    None counts as not given. ``continues`` is set by the tool loop for a later turn.
    """

    timeout: float


class PromptOptions(Options, total=False):
    """Options of ``generate`` and ``stream``, where messages or token ids may stand in for the prompt."""

    messages: Sequence[Mapping[str, Any]]
    prompt_token_ids: Sequence[int]
    tools: Sequence[Any]


KNOWN = PromptOptions.__optional_keys__ | {"prompt"}
"""Every option name."""

_SUBMIT = {f.name for f in fields(Submit)}
_SAMPLING = {f.name for f in fields(Sampling)}
_GENERATE = {f.name for f in fields(Generate)}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that may be sent: ROUTE still typed (its timeout shrinks while it waits), BODY packed; seconds."""

    submit: Submit
    body: bytes
    idle_timeout: float | None = None


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of several layers, the later ones winning, those that are None left out.

    Raises:
        BadRequestError: an unknown option, naming the nearest known one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        check_known(layer, KNOWN)
        merged |= layer
    return {name: value for name, value in merged.items() if value is not None}


def prepare(options: Mapping[str, Any]) -> Prepared:
    """Check options (merged, with the prompt among them) and turn them into a request.

    Raises:
        BadRequestError: naming the option, what was found and what was expected.
        PayloadTooLargeError: prompt, messages and tools are larger than a message may be.
    """
    given = merge(options)
    given.setdefault("model", "default")
    timeout = seconds("timeout", given.pop("timeout", DEFAULT_TIMEOUT))
    idle = given.pop("idle_timeout", None)
    idle = None if idle is None else seconds("idle_timeout", idle)
    _normalise(given)
    generate = _generate(given)
    body = _pack(generate, str(given["model"]))
    return Prepared(_submit(given, timeout, generate), body, idle)


def check_known(given: Iterable[str], known: Set[str]) -> None:
    """Refuse a name that is none of these.

    Raises:
        BadRequestError: naming the nearest one.
    """
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or "known are " + ", ".join(sorted(known))
            raise BadRequestError(f"unknown option {name!r}: {hint}")


def seconds(name: str, value: object, *, forever: bool = False) -> float:
    """A time that a caller named; infinite only where it may last for ever.

    Raises:
        BadRequestError: naming it, what was found and what was expected.
    """
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (0 < value <= sys.float_info.max or (forever and value == math.inf))
    ):
        return float(value)
    raise BadRequestError(f"{name}: found {codec.show(value)}, expected a number of seconds above 0")


def _normalise(given: dict[str, Any]) -> None:
    """Bring what may be written in several ways into the form of the messages; ``given`` is ours to change."""
    if "prompt" in given:
        _check_prompt(given["prompt"])
    for name in ("messages", "tools", "stop_token_ids"):
        if isinstance(given.get(name), (str, bytes)):
            raise BadRequestError(f"{name}: found {codec.show(given[name])}, expected a list")
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    if given.get("tools"):
        from loopmux.tools import schemas

        given["tools"] = schemas(given["tools"])
    if "prompt_token_ids" in given:
        given["prompt_token_ids"] = _pack_ids(given["prompt_token_ids"], "prompt_token_ids")
    if isinstance(given.get("logit_bias"), Mapping):
        given["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
    for name in ("messages", "tools", "response_format", "template_kwargs", "stop", "model", "adapter", "session"):
        if name in given:
            check_plain(given[name], name, 0)
    if isinstance(given.get("messages"), (list, tuple)):
        given["messages"] = [_with_packed_ids(message, f"messages[{i}]") for i, message in enumerate(given["messages"])]


def _check_prompt(prompt: object) -> None:
    if isinstance(prompt, (bytes, bytearray)):
        raise BadRequestError(
            f"prompt: found {codec.show(prompt)}, expected a text: decode it first, as in prompt.decode('utf-8')"
        )
    if not isinstance(prompt, str):
        raise BadRequestError(f"prompt: found {codec.show(prompt)}, expected a text")
    _check_text(prompt, "prompt")


def _with_packed_ids(message: object, path: str) -> object:
    """A long answer has more ids than the peer's decoder takes in a list."""
    if not isinstance(message, Mapping) or not message.get("token_ids"):
        return message
    return {**message, "token_ids": _pack_ids(message["token_ids"], f"{path}.token_ids")}


def _pack_ids(ids: object, path: str) -> bytes:
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes, bytearray, memoryview)):
        raise BadRequestError(f"{path}: found {codec.show(ids)}, expected a list of token ids")
    try:
        return wire.pack_tokens(list(ids))
    except ProtocolError as error:
        raise BadRequestError(f"{path}: {error.message}") from error


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - _SHOWN_BEFORE) : error.start]
        raise BadRequestError(
            f"{path}: found the lone surrogate {text[error.start]!r} at character {error.start} (after {before!r}), "
            "expected valid Unicode text: it was probably decoded from bytes that are not UTF-8"
        ) from error


def check_plain(value: object, path: str, depth: int) -> None:
    """Refuse what MessagePack or the peer's decoder would refuse, and say where it is.

    Raises:
        BadRequestError: naming the path, what was found and what was expected.
    """
    if depth > codec.DEEPEST:
        raise BadRequestError(f"{path}: nested more than {codec.DEEPEST} levels deep")
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise BadRequestError(f"{path}: found the key {codec.show(key)}, expected keys that are texts")
            _check_text(key, f"a key of {path}")
            check_plain(entry, f"{path}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            check_plain(entry, f"{path}[{i}]", depth + 1)
    elif type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise BadRequestError(f"{path}: found {codec.show(value)}, expected a number of no more than 64 bits")
    elif value is not None and type(value) not in (bool, float):
        raise BadRequestError(
            f"{path}: found {codec.show(value)}, expected text, number, true, false, nothing, list or mapping"
        )


def _generate(given: Mapping[str, Any]) -> Generate:
    body = {name: value for name, value in given.items() if name in _GENERATE}
    body["sampling"] = {name: value for name, value in given.items() if name in _SAMPLING}
    try:
        generate = codec.build(Generate, body)
    except codec.FieldError as error:
        path = error.path.removeprefix("sampling.")
        raise BadRequestError(f"{path}: found {error.found}, expected {error.expected}") from error
    generate.check()
    return generate


def _submit(given: Mapping[str, Any], timeout: float, generate: Generate) -> Submit:
    route = {name: value for name, value in given.items() if name in _SUBMIT}
    try:
        measured = {"timeout": timeout, "prompt_size": _size(given), "hashes": _hashes(generate)}
        submit = codec.build(Submit, route | measured)
        submit.check()
        size = len(codec.pack(submit))
    except codec.FieldError as error:
        raise BadRequestError(str(error)) from error
    except ProtocolError as error:
        raise BadRequestError(error.message) from error
    if not submit.model:
        raise BadRequestError("model: found an empty text, expected a model id")
    if size > _ROUTE_LIMIT:
        texts = {name: len(str(given[name])) for name in ("model", "adapter", "session", "trace") if name in given}
        longest = max(texts, key=texts.__getitem__)
        raise BadRequestError(
            f"{longest}: found a text of {texts[longest]} characters; model, adapter, session and trace "
            f"take {size} bytes with the rest, at most {_ROUTE_LIMIT} fit"
        )
    return submit


def _size(given: Mapping[str, Any]) -> int:
    """Characters or token ids of the prompt, roughly: the broker's hint for load."""
    if "prompt_token_ids" in given:
        return len(given["prompt_token_ids"]) // 4
    contents = [m.get("content") for m in given.get("messages", ()) if isinstance(m, Mapping)]
    return len(given.get("prompt", "")) + sum(len(text) for text in contents if isinstance(text, str))


def _hashes(generate: Generate) -> tuple[bytes, ...]:
    """Of every beginning of the prompt that ends with a message, the shortest first; each goes over the one before.

    Who has the same one has begun alike, tools included, which templates put in front. Of many messages the first and
    the last: a conversation shares its beginning with others, and nearly all of it with its own turns.
    """
    parts: Sequence[object] = generate.messages or (generate.prompt or generate.prompt_token_ids,)
    last = _hash(b"", [generate.tools, generate.reasoning, generate.template_kwargs])
    chain = [last := _hash(last, part) for part in parts]
    return tuple(chain if len(chain) <= 2 * _HASHED else chain[:_HASHED] + chain[-_HASHED:])


def _hash(before: bytes, part: object) -> bytes:
    return hashlib.blake2b(codec.pack(part), key=before, digest_size=8).digest()


def _pack(generate: Generate, model: str) -> bytes:
    try:
        body = codec.pack(generate)
    except ProtocolError as error:
        raise BadRequestError(error.message, model=model) from error
    if len(body) > wire.CLIENT_BODY_LIMIT:
        raise PayloadTooLargeError(
            f"the request has {len(body)} bytes, at most {wire.CLIENT_BODY_LIMIT} are accepted: shorten it",
            model=model,
        )
    return body
