"""The tables of the protocol's pages say what the code says."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from loopmux import cadence, codec, errors, messages, results, stream, wire
from loopmux.errors import BadRequestError
from loopmux.messages import Generate, Sampling, Submit
from loopmux.wire import PARTS, Kind, Part
from loopmux_broker import attempts
from loopmux_broker.config import BrokerConfig
from loopmux_broker.requests import TRANSITIONS
from protocolpages import CLIENT, WORKER, Table, table, tables

# --- kinds ------------------------------------------------------------------------------------------------------------


def kinds() -> dict[int, tuple[str, str]]:
    """Number to (kind, parts), from both pages."""
    found: dict[int, tuple[str, str]] = {}
    for page in (CLIENT, WORKER):
        for number, kind, _, parts, *_ in table(page, "no.", "kind").rows:
            first, *last = (int(n) for n in re.findall(r"\d+", number))
            numbers = range(first, last[0] + 1) if "–" in number else [first, *last]
            for n, name in zip(numbers, kind.split(", "), strict=True):
                assert n not in found, f"{name} is listed twice"
                found[n] = (name, parts)
    return found


def test_the_pages_list_exactly_the_kinds_of_the_code() -> None:
    assert {number: kind for number, (kind, _) in kinds().items()} == {int(k): k.name for k in Kind}


def test_the_pages_give_each_kind_its_parts() -> None:
    for number, (kind, parts) in kinds().items():
        if parts:  # reserved kinds have none yet
            named = [part for part in Part if re.search(rf"\b{part.name}\b", parts)]
            assert sum(named) == PARTS[Kind(number)], f"{kind}: {parts}"


def test_the_pages_name_message_classes_that_exist() -> None:
    for _, parts in kinds().values():
        for name in re.findall(r"`(\w+)`", parts):
            assert hasattr(messages, name), name


def test_a_client_is_told_of_every_kind_that_it_sends_or_gets() -> None:
    for row in table(WORKER, "no.", "kind").rows:
        assert "c" not in re.findall(r"\w", row[2]), f"{row[1]} belongs on the client's page"


# --- fields -----------------------------------------------------------------------------------------------------------

NOT_ON_THIS_WIRE = {messages.ModelSpec, messages.WorkerSpec}
"""The launcher hands them to its workers as a file."""
ON_THE_WIRE: dict[str, Any] = {
    cls.__name__: cls
    for module, classes in {
        messages: [c for c in vars(messages).values() if dataclasses.is_dataclass(c)],
        results: [results.ToolCall, results.TokenLogprob, results.Usage, results.Timing],
    }.items()
    for cls in classes
    if cls not in NOT_ON_THIS_WIRE
}

NAMES = {str: "str", int: "int", float: "float", bool: "bool", bytes: "bin", types.NoneType: "nil", Any: "any"}


def in_words(kind: Any) -> str:
    """A field's annotation as the pages write it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "str"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, args))
    if origin is tuple and args[-1] is Ellipsis:
        return f"array of {in_words(args[0])}"
    if origin is tuple:
        return f"({', '.join(map(in_words, args))})"
    if origin is dict:
        return "map" if args[1] is Any else f"map of {in_words(args[1])}"
    return kind.__name__ if dataclasses.is_dataclass(kind) else NAMES[kind]


def default_of(field: Any) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "needed"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None:
        return "`nil`"
    if isinstance(value, bytes):
        return f'`"{value.decode()}"`'
    return f"`{json.dumps(codec.plain(value))}`"


def described() -> dict[str, Table]:
    """Class name to its table of fields."""
    found: dict[str, Table] = {}
    for one in (*tables(CLIENT), *tables(WORKER)):
        if one.columns[:3] == ["field", "type", "default"]:
            [name] = re.findall(r"^`(\w+)`", one.heading)
            assert name not in found, f"{name} is described twice"
            found[name] = one
    return found


def test_everything_that_travels_is_described() -> None:
    assert described().keys() == ON_THE_WIRE.keys()


@pytest.mark.parametrize("name", ON_THE_WIRE)
def test_names_types_and_defaults(name: str) -> None:
    cls = ON_THE_WIRE[name]
    hints = typing.get_type_hints(cls)
    rows = [tuple(row[:3]) for row in described()[name].rows]
    assert rows == [(f"`{f.name}`", in_words(hints[f.name]), default_of(f)) for f in dataclasses.fields(cls)]


@pytest.mark.parametrize("name", ON_THE_WIRE)
def test_every_choice_of_a_field_is_named(name: str) -> None:
    hints = typing.get_type_hints(ON_THE_WIRE[name])
    for row in described()[name].rows:
        hint = hints[row[0].strip("`")]
        if typing.get_origin(hint) is typing.Literal:
            assert re.findall(r"`(\w+)`", row[3]) == list(typing.get_args(hint))


def number(text: str) -> int:
    power = re.fullmatch(r"2\^(\d+) - 1", text)
    return 2 ** int(power[1]) - 1 if power else int(text)


def ranges() -> list[tuple[Any, str, int, int, bool]]:
    """Class, field, lowest and highest value, whether the lowest is itself out, for numbers that ``check`` knows."""
    found = []
    for cls in (Submit, Generate, Sampling):
        for field, kind, _, bounds, *_ in described()[cls.__name__].rows:
            match = re.fullmatch(r"(above )?(-?\d+) to (-?\d+|2\^\d+ - 1)", bounds)
            if match and not kind.startswith(("map", "array")):
                found.append((cls, field.strip("`"), int(match[2]), number(match[3]), bool(match[1])))
    return found


@pytest.mark.parametrize(("cls", "field", "low", "high", "above"), ranges(), ids=lambda v: getattr(v, "__name__", None))
def test_ranges(cls: Any, field: str, low: int, high: int, above: bool) -> None:
    needed: dict[str, Any] = {Submit: {"model": "m"}, Generate: {"prompt": "x"}, Sampling: {}}[cls]
    for value in (low + 1e-9 if above else low, high):
        cls(**needed | {field: value}).check()
    for value in (low if above else low - 1, high + 1):
        with pytest.raises(BadRequestError, match=field):
            cls(**needed | {field: value}).check()


def test_ranges_are_found() -> None:
    assert len(ranges()) >= 10


# --- errors, states, limits -------------------------------------------------------------------------------------------


def test_every_error_code_is_explained() -> None:
    rows = table(CLIENT, "code", "class").by("code")
    assert [(code, row["class"], row["retryable"]) for code, row in rows.items()] == [
        (f"`{code}`", cls.__name__, "yes" if cls.default_retryable else "no") for code, cls in errors.BY_CODE.items()
    ]
    assert all(row["when"] and row["what the application should do"] for row in rows.values())


def test_the_steps_of_a_request_are_those_of_the_broker() -> None:
    rows = [(a, step, b) for a, step, b, *_ in table(WORKER, "from", "step", "to").rows if step]
    real = [(a.name, step.name, b.name) for a, steps in TRANSITIONS.items() for step, b in steps.items()]
    assert sorted(rows) == sorted(real)


LIMITS = {
    "messages of one frame": wire.FRAME_MESSAGES,
    "a frame from a client or to a worker; who sends a longer one is cut off": wire.message_limit(
        wire.CLIENT_BODY_LIMIT
    ),
    "a frame from a worker, likewise": wire.message_limit(wire.WORKER_BODY_LIMIT),
    "header": wire.HEADER_SIZE,
    "request id, instance, boot": wire.ID_SIZE,
    "ROUTE": wire.ROUTE_LIMIT,
    "ROUTE of SUBMIT and ATTACH": wire.SUBMIT_ROUTE_LIMIT,
    "ROUTE: entries of one array": codec.ROUTE_LIMITS.array,
    "ROUTE: entries of one map": codec.ROUTE_LIMITS.map,
    "ROUTE: one text or blob": codec.ROUTE_LIMITS.size,
    "BODY, and TOKENS, from a client or to a worker": wire.CLIENT_BODY_LIMIT,
    "BODY, and TOKENS, from a worker": wire.WORKER_BODY_LIMIT,
    "BODY: entries of one array": codec.BODY_LIMITS.array,
    "BODY: entries of one map": codec.BODY_LIMITS.map,
    "BODY: one text or blob": codec.BODY_LIMITS.size,
    "messages, tools, schemas, reports: depth": codec.DEEPEST,
    "token id": messages.TOKEN_LIMIT,
    "tokens of one request, and the highest `limit`": wire.MOST_TOKENS,
    "highest attempt": attempts.LAST_ATTEMPT,
    "heartbeat, unless WELCOME says otherwise": cadence.HEARTBEAT,
    "heartbeats of silence until a peer is lost": cadence.SILENT_HEARTBEATS,
    "HELLO, REGISTER again": cadence.INTRODUCE_AGAIN,
    "anything else again": cadence.RESEND,
    "output and terminals wait for their acknowledgement": cadence.KEPT,
    "CREDIT again for the same gap": stream.GAP_PAUSE,
    "the broker's word after the deadline": stream.GRACE,
    "the user waits for the answer to CANCEL": stream.PATIENCE,
}


def value_of(cell: str) -> float:
    return float(re.search(r"[\d.]+", cell)[0])  # type: ignore[index]


def test_limits_and_seconds() -> None:
    [limits] = [t for t in tables(CLIENT) if t.columns == ["what", "value"]]
    assert {what: value_of(value) for what, value in limits.rows} == LIMITS


def test_settings_of_the_broker() -> None:
    config = BrokerConfig()
    for _, setting, value in table(CLIENT, "what", "setting", "value").rows:
        found: Any = config
        for name in setting.strip("`").split("."):
            found = getattr(found, name)
        assert value_of(value) == found, setting


# --- vectors ----------------------------------------------------------------------------------------------------------


def fields_in(kind: Any, value: Any, shown: set[tuple[str, str]]) -> None:
    """Note which fields of which classes a value of this type has, all the way down."""
    args = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for name, inner in value.items():
            shown.add((kind.__name__, name))
            fields_in(hints[name], inner, shown)
    elif typing.get_origin(kind) is tuple:
        for inner in value:
            fields_in(args[0], inner, shown)
    elif typing.get_origin(kind) in (typing.Union, types.UnionType):
        fields_in(args[0], value, shown)


def test_some_vector_shows_each_field_at_another_value_than_its_default() -> None:
    shown: set[tuple[str, str]] = set()
    for vector in json.loads((Path(__file__).parent / "vectors.json").read_text()):
        for part in {"route", "body"} & vector.keys():
            fields_in(ON_THE_WIRE[vector[part]["class"]], vector[part]["fields"], shown)
    assert shown == {(name, f.name) for name, cls in ON_THE_WIRE.items() for f in dataclasses.fields(cls)}
