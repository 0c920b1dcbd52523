"""Arguments of calls that are written one by one, in tags or as code, and not as one JSON object. Pure.

Such values say little of their types: what could be read as another than the schema wants is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loopmux.errors import BadRequestError
from loopmux_worker.engine.calls.values import referred, types_of
from loopmux_worker.engine.grammars.asked import Tool
from loopmux_worker.engine.grammars.rules import Rules, quoted
from loopmux_worker.engine.grammars.schemas import DESCRIBE, LAYOUT
from loopmux_worker.engine.grammars.syntaxes import KEY, TEXT, VALUE, Named

_OBJECT = DESCRIBE | {"type", "properties", "required", "additionalProperties", "x-guidance"}
_CHOICE = DESCRIBE | {"type", "anyOf", "oneOf", "enum", "const"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}  # say nothing of texts
_ARRAY = DESCRIBE | {"type", "items", "minItems", "maxItems"}


class Arguments:
    """Writes the arguments of one tool.

    Args:
        rules: gets what it takes.
        tool: whose they are.
        named: how they are written.
        family: its name, for people.
        at: what the names of its rules begin with.
    """

    def __init__(self, rules: Rules, tool: Tool, named: Named, family: str, at: str) -> None:
        self._rules, self._tool, self._named, self._family, self._at = rules, tool, named, family, at
        self._count = 0
        self._definitions = {key: tool.arguments[key] for key in ("$defs", "definitions") if key in tool.arguments}

    def written(self) -> str:
        """Them all, as Lark.

        Raises:
            BadRequestError: their schema says more than can be guaranteed in this format.
        """
        return self._object(self._tool.arguments) or '""'

    def _object(self, schema: Mapping[str, Any]) -> str:
        self._check_keys(schema, _OBJECT, "an object")
        if isinstance(schema.get("additionalProperties"), Mapping):
            raise self._refused("values whose names are not given (additionalProperties)")
        if "properties" not in schema and schema.get("additionalProperties", True):
            return self._anything()
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        for key in [*properties, *required]:
            if not self._named.key(key) or key not in properties:
                raise self._refused(f"the property {key!r}, whose name cannot be written or which has no schema")
        parts = [(self._one(key, value), key not in required) for key, value in properties.items()]
        return self._in_order(parts, quoted(self._named.between))

    def _in_order(self, parts: Sequence[tuple[str, bool]], between: str) -> str:
        """Rules in their order, of which some are optional, with something between any two that are there."""
        first: list[str] = []
        following = ""
        for name, optional in reversed(parts):
            first = [f"{name} {following}", *(first if optional else ())]
            following = self._rule(f"({between} {name}){'?' if optional else ''} {following}")
        if not first:
            return ""
        return f"({' | '.join(first)}){'?' if all(optional for _, optional in parts) else ''}"

    def _anything(self) -> str:
        """Any names and values."""
        before, middle, after = _split(self._named.one)
        value = self._value({}, after)
        one = self._rule(f"{self._rules.text(before)} /[A-Za-z_][A-Za-z0-9_]*/ {self._rules.text(middle)} {value}")
        return f"({one} ({quoted(self._named.between)} {one})*)?"

    def _one(self, key: str, schema: Any) -> str:
        before, middle, after = _split(self._named.one)
        return self._rule(f"{self._rules.text(before + key + middle)} {self._value(schema, after)}")

    def _value(self, schema: Any, after: str) -> str:
        """A value and what is behind it."""
        schema = schema if isinstance(schema, Mapping) else {}
        types = types_of(schema, self._tool.arguments)
        if self._named.text is None:
            return f"{self._json(schema)} {self._rules.text(after)}"
        if "string" in types or not schema.keys() - DESCRIBE or isinstance(schema.get("const"), str):
            return f"({' | '.join(self._texts(schema, after))})"
        if not types:
            raise self._refused(f"a value without a type, {_shown(schema)}: name its type, and write it without $ref")
        if self._named.nested and types & {"array", "object"}:
            return f"{self._nested(schema, types)} {self._rules.text(after)}"
        return f"{self._json(schema)} {self._rules.text(after)}"

    def _json(self, schema: Mapping[str, Any]) -> str:
        return self._rules.json(self._name(), {**self._definitions, **schema, "x-guidance": LAYOUT})

    def _nested(self, schema: Mapping[str, Any], types: set[str]) -> str:
        """A list or an object in the format of the arguments around it."""
        if types == {"object"}:
            return f'"{{" {self._object(schema)} "}}"'
        if types != {"array"}:
            raise self._refused(f"a value of several types, {_shown(schema)}")
        self._check_keys(schema, _ARRAY, "a list")
        entry = self._rule(self._value(schema.get("items"), ""))
        least, most = _bounds(schema, "Items")
        if most == 0:
            return '"[]"'
        upto = "" if most is None else most - 1
        filled = entry if most == 1 else f'{entry} ("," {entry}){{{max(least - 1, 0)},{upto}}}'
        return f'"[" {filled if least else f"({filled})?"} "]"'

    def _texts(self, schema: Mapping[str, Any], after: str) -> list[str]:
        """Texts that a schema allows, and what is behind them, as alternatives."""
        if isinstance(reference := schema.get("$ref"), str) and not schema.keys() - DESCRIBE - {"$ref"}:
            schema = referred(reference, self._tool.arguments)  # one behind another is refused
        self._check_keys(schema, _CHOICE | _BOUNDS | {"minLength", "maxLength"}, "a text")
        choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        if choices:
            among = [
                choice
                for choice in choices
                if isinstance(choice, Mapping) and "string" in types_of(choice, self._tool.arguments)
            ]
            if "oneOf" in schema and len(among) > 1:
                raise self._refused(f"several texts in oneOf, {_shown(schema)}: use anyOf")
            return [text for choice in among for text in self._texts(choice, after)]
        before, behind = self._around()
        after = behind + after
        literals = [schema["const"]] if "const" in schema else schema.get("enum")
        if literals is None:
            least, most = _bounds(schema, "Length")
            body = f"/(?s:.{{{least},{'' if most is None else most}}})/"
            return [
                f"{self._rules.text(before)} {self._rules.characters(self._name(), body, self._named.closing, after)}"
            ]
        texts = [text for text in literals if isinstance(text, str)]
        if not texts or any(self._named.closing in text for text in texts):
            raise self._refused(f"{_shown(schema)}, expected texts without {self._named.closing}")
        return [f"{self._rules.text(before)} {quoted(text)} {self._rules.text(after)}" for text in texts]

    def _around(self) -> list[str]:
        assert self._named.text is not None
        return self._named.text.split(TEXT)

    def _check_keys(self, schema: Mapping[str, Any], known: frozenset[str] | set[str], what: str) -> None:
        if unknown := sorted(schema.keys() - known):
            raise self._refused(f"{unknown[0]!r} for {what}")

    def _refused(self, found: str) -> BadRequestError:
        return BadRequestError(
            f"tools: the arguments of {self._tool.name!r} cannot be guaranteed in the format {self._family}: found "
            f"{found}: change its parameters, or set strict: false for it"
        )

    def _name(self) -> str:
        self._count += 1
        return f"{self._at}_{self._count}"

    def _rule(self, body: str) -> str:
        return self._rules.add(self._name(), body)


def _split(one: str) -> tuple[str, str, str]:
    before, rest = one.split(KEY)
    middle, after = rest.split(VALUE)
    return before, middle, after


def _bounds(schema: Mapping[str, Any], of: str) -> tuple[int, int | None]:
    least, most = schema.get(f"min{of}", 0), schema.get(f"max{of}")
    if (
        not isinstance(least, int)
        or not isinstance(most, int | None)
        or least < 0
        or (most is not None and most < least)
    ):
        raise BadRequestError(f"tools: found min{of} {least!r} and max{of} {most!r}, expected whole numbers in order")
    return least, most


def _shown(schema: Mapping[str, Any]) -> str:
    text = repr(dict(schema))
    return text if len(text) <= 80 else text[:79] + "…"
