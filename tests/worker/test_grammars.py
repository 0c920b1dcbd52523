"""Grammars alone: whatever a model would rather write, its tokens make calls that are read back as they were meant."""

import json
import random
import time
from dataclasses import replace
from typing import ClassVar

import pytest

from loopmux.errors import BadRequestError, EngineError
from loopmux.messages import Generate
from loopmux.schemacheck import problems
from loopmux_worker.engine.calls.families import BY_NAME, FAMILIES
from loopmux_worker.engine.calls.parser import Reasoning
from loopmux_worker.engine.grammars import matching
from loopmux_worker.engine.grammars.asked import asked
from loopmux_worker.engine.grammars.matching import Grammars
from loopmux_worker.engine.grammars.syntaxes import syntax_of
from tinymodel import write_tokenizer

END = 266
HEAD = 320
"""More than the tokenizers have tokens."""
FORMS = {
    "deepseek V3": ("deepseek", "```json"),
    "deepseek V3.1": ("deepseek", ""),
    "FunctionGemma": ("gemma", "<start_function_call>"),
    "Gemma 4": ("gemma", "<|tool_call>"),
    "Gemma 3": ("gemma", "tool_code"),
} | {family.name: (family.name, "") for family in FAMILIES if family.name not in ("deepseek", "gemma")}
"""Families and chat templates that tell between their forms."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Makes tokenizers that have some texts as tokens."""
    from transformers import AutoTokenizer

    made = {}

    def make(added, template=""):
        if added not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            write_tokenizer(folder, None, added)
            made[added] = AutoTokenizer.from_pretrained(folder)
        made[added].chat_template = template
        return made[added]

    return make


def tokens_of(family):
    """The marks of a family that its models have as tokens."""
    return family.tokens(calls=True)


def tool(name="weather", strict=None, **properties):
    required = [key.removesuffix("_") for key in properties if not key.endswith("_")]
    schema = {key.removesuffix("_"): value for key, value in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


def generate(*tools, choice="required", **more):
    return Generate(prompt="x", tools=tools, tool_choice=choice, **more)


class Writing:
    """A model that has no idea, held to what a request asks for."""

    def __init__(self, request, family, tokenizer, *, thinks=False, grammars=None):
        self.tokenizer, self.family, self.request, self.thinks = tokenizer, family, request, thinks
        self.matcher = (grammars or Grammars(HEAD)).matcher(
            asked(request), family, tokenizer, eos=frozenset({END}), ends=frozenset({END}), thinks=thinks
        )
        self.ids = []

    def say(self, text, *, spelled=False):
        """Write a text; whether it may be written. ``spelled``: the tokenizer's own tokens in it as characters, too."""
        parts = [text[:1], text[1:]] if spelled else [text]
        for token in [token for part in parts for token in self.tokenizer.encode(part, add_special_tokens=False)]:
            if not self.matcher.allowed()[token]:
                return False
            self.push(token)
        return True

    def push(self, token):
        self.matcher.push(token)
        self.ids.append(token)

    def ramble(self, seed, end=0.5, limit=3000):
        """Write tokens at random; ``end`` is how probable the end is wherever it may be."""
        chance = random.Random(seed)
        while not self.matcher.complete:
            assert len(self.ids) < limit, self.text
            allowed = self.matcher.allowed().nonzero().flatten().tolist()
            self.push(END if END in allowed and chance.random() < end else chance.choice(allowed))
        return self

    @property
    def text(self):
        return self.tokenizer.decode([token for token in self.ids if token != END], skip_special_tokens=False)

    @property
    def read(self):
        """What the family's parser reads: text and calls."""
        parser = self.family.parser(bytes(16), self.request.tools, reasoning=self.thinks)
        parts = [parser.push(self.text), parser.flush()]
        return "".join(part.text for part in parts), [call for part in parts for call in part.calls]

    def checked(self):
        """The calls, each of which is as its tool wants it; and the text around them."""
        text, calls = self.read
        by_name = {one["function"]["name"]: one["function"]["parameters"] for one in self.request.tools}
        for call in calls:
            assert call.error is None, (call.error, self.text)
            assert problems(by_name[call.name], call.arguments, closed=True) == [], self.text
        return text, calls


TEXT = {"type": "string", "minLength": 2, "maxLength": 6}
PLACE = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "of": {"type": "string", "maxLength": 3}},
    "required": ["x", "of"],
}
WEATHER = tool(
    place=TEXT,
    unit={"type": "string", "enum": ["celsius", "kelvin"]},
    days={"type": "integer", "minimum": -3, "maximum": 120},
    ratio_={"type": "number"},
    note_={"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
    hours={"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    tags_={"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    at=PLACE,
)
NOTHING = tool("now")


SPECIAL = pytest.mark.parametrize("special", [True, False], ids=["tokens", "characters"])
"""Whether the marks around calls are tokens of their own, as in the makers' tokenizers, or written out."""


@SPECIAL
@pytest.mark.parametrize("form", FORMS)
def test_every_family_reads_back_what_was_forced(tokenizer, form, special):
    if form == "gpt_oss" and not special:
        pytest.skip("its channels are tokens")
    name, template = FORMS[form]
    family = BY_NAME[name]
    named = generate(WEATHER, NOTHING, choice="weather", parallel_tool_calls=False)
    some = tokenizer(tokens_of(family) if special else (), template)
    grammars = Grammars(HEAD)
    written = [Writing(named, family, some, grammars=grammars).ramble(seed).checked() for seed in range(3)]
    assert [(text, len(calls)) for text, calls in written] == [("", 1)] * 3
    assert len({str(calls[0].arguments) for _, calls in written}) == 3
    several = generate(WEATHER, NOTHING)
    counts = (
        len(Writing(several, family, some, grammars=grammars).ramble(seed, 0.2).checked()[1])
        for seed in range(2 if family.channels else 20)
    )
    assert any(count > 1 for count in counts) is not family.channels, "a channel ends with its call"


def strict(one, is_strict=True):
    return {**one, "function": {**one["function"], "strict": is_strict}}


@SPECIAL
@pytest.mark.parametrize("form", sorted({*FORMS} - {"llama_json", "envelope", "gpt_oss"}))
def test_strict_tools_are_held_to_among_text(tokenizer, form, special):
    name, template = FORMS[form]
    family = BY_NAME[name]
    request = generate(strict(WEATHER), strict(NOTHING), choice="auto")
    grammars = Grammars(HEAD)
    opening = syntax_of(family, template).opening

    def writing(*said):
        made = Writing(request, family, tokenizer(tokens_of(family) if special else (), template), grammars=grammars)
        assert all(made.say(text) for text in said), said
        return made

    assert writing("Nothing to { do <here>.").ramble(0, end=0.05).checked()[1] == []
    assert not writing("Let me see: ").say(f"{opening}\n[]", spelled=special), "no call may begin without being held to"
    assert not writing("Let me see: ", START[form]).say("later"), "no such tool"
    assert writing("[1] [weather: ").say("[weather(") is (family.name != "gemma"), "a list of calls is code"
    for seed in range(3):
        text, calls = writing("Let me see: ", START[form]).ramble(seed, end=0.05).checked()
        assert text.startswith("Let me see:")
        assert calls


START = {
    "hermes": '<tool_call>\n{"name": "',
    "qwen_xml": "<tool_call>\n<function=",
    "glm": "<tool_call>",
    "mistral_list": '[TOOL_CALLS] [{"name": "',
    "mistral_args": "[TOOL_CALLS]",
    "deepseek V3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "deepseek V3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "FunctionGemma": "<start_function_call>call:",
    "Gemma 4": "<|tool_call>call:",
    "Gemma 3": "```tool_code\n",
}
"""How calls begin, up to the name."""


def test_names_that_python_could_not_read_may_be_forced(tokenizer):
    gemma = BY_NAME["gemma"]
    request = generate(tool("mcp-time_3d", **{"from": TEXT, "größe": {"type": "integer"}}))
    _, (made,) = Writing(request, gemma, tokenizer(tokens_of(gemma), "tool_code")).ramble(1).checked()
    assert (made.name, set(made.arguments)) == ("mcp-time_3d", {"from", "größe"})


@pytest.mark.parametrize("name", ["llama_json", "envelope"])
def test_calls_that_begin_like_text_cannot_be_strict_among_it(tokenizer, name):
    with pytest.raises(BadRequestError, match=rf"strict.*{name} begins like any text.*'required'"):
        Writing(generate(strict(NOTHING), choice="auto"), BY_NAME[name], tokenizer(()))


def test_channels_hold_either_text_or_a_call(tokenizer):
    family = BY_NAME["gpt_oss"]
    some, grammars = tokenizer(tokens_of(family)), Grammars(HEAD)

    def writing(*said):
        made = Writing(generate(strict(WEATHER), choice="auto"), family, some, grammars=grammars)
        assert all(made.say(text) for text in said), said
        return made

    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    assert len(writing(thought, call).ramble(1).checked()[1]) == 1
    assert writing(thought, "<|channel|>final<|message|>It is ").ramble(1, end=0.05).checked()[0].startswith("It is")
    assert not writing().say("It is")


def test_reasoning_comes_first_where_it_has_begun_or_may(tokenizer):
    family = replace(BY_NAME["hermes"], reasoning=Reasoning("<think>", "</think>"))
    for added in ((), ("<think>", "</think>", "<tool_call>", "</tool_call>")):
        some = tokenizer(added)
        thinks = Writing(generate(WEATHER), family, some, thinks=True)
        assert thinks.say("The user <tool_call> </tool_call> wants that.\n</think>\n\n")
        assert not thinks.say("x")
        assert thinks.say('<tool_call>\n{"name": "weather')
        may = Writing(generate(WEATHER), family, some)
        assert may.say("<think>\nHm\n</think>\n\n<tool_call>")
        assert Writing(generate(WEATHER), family, some).say("<tool_call>")
        assert not Writing(generate(WEATHER), family, some).say("Hm")


def test_an_answer_in_json(tokenizer):
    family, some = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"]))
    schema = WEATHER["function"]["parameters"]
    grammars = Grammars(HEAD)
    for seed in range(4):
        written = Writing(Generate(prompt="x", response_format=schema), family, some, grammars=grammars).ramble(seed)
        assert problems(schema, json.loads(written.text), closed=True) == []
    both = generate(NOTHING, choice="auto", response_format=schema)
    assert Writing(both, family, some).say('{"place": "')
    assert Writing(both, family, some).say('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not Writing(both, family, some).say("well")


REFERENCE = {
    "type": "object",
    "$defs": {
        "leaf": {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}}}
    },
    "properties": {"tree": {"$ref": "#/$defs/leaf"}},
    "required": ["tree"],
}


@pytest.mark.parametrize("name", ["hermes", "glm", "qwen_xml"])
def test_references_within_a_tools_schema(tokenizer, name):
    family = BY_NAME[name]
    referring = {"type": "function", "function": {"name": "grow", "parameters": REFERENCE}}
    for seed in range(3):
        assert Writing(generate(referring), family, tokenizer(tokens_of(family))).ramble(seed).checked()[1]


@pytest.mark.parametrize("name", ["hermes", "glm", "qwen_xml"])
def test_references_to_what_is_written_without_quotes(tokenizer, name):
    family = BY_NAME[name]
    color = {"$ref": "#/$defs/Color"}
    definitions = {"Level": {"type": "integer", "enum": [1, 2]}, "Color": {"type": "string", "enum": ["red", "1"]}}
    one = tool("f", level={"$ref": "#/$defs/Level"}, color=color, other={"anyOf": [color, {"type": "null"}]})
    one["function"]["parameters"]["$defs"] = definitions
    for seed in range(3):
        assert Writing(generate(one), family, tokenizer(tokens_of(family))).ramble(seed).checked()[1]


@pytest.mark.parametrize(
    ("said", "held"),
    [
        ('{"a": 1}', False),
        ('{"x": 1, "y": 2}', False),
        ('{"x":1}', False),
        ('{"x": 10000000000000000000}', False),
        ('{"x": 9007199254740993}', True),
    ],
)
def test_arguments_are_closed_laid_out_and_within_64_bits(tokenizer, said, held):
    """And but for the size of numbers none of it where the tool says that it is not strict."""
    family, some = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"]))
    one = tool("f", x={"type": "integer"})
    call = f'<tool_call>\n{{"name": "f", "arguments": {said}}}\n</tool_call>'
    assert Writing(generate(one), family, some).say(call) is held
    if ":1" not in said:
        assert Writing(generate(strict(one, False)), family, some).say(call) is (len(said) < 25)


FREE = [
    {},
    {"additionalProperties": True},
    {"properties": {"x": {}}},
    {"properties": {"x": True}},
    {"properties": {"x": {"description": "anything"}}},
    {"properties": {"x": {"type": ["number", "array", "object"]}}},
    {"properties": {"x": {"anyOf": [{"type": "number"}, {"type": "array"}, {"type": "object"}]}}},
]


@pytest.mark.parametrize("parameters", FREE)
def test_numbers_in_what_a_schema_leaves_open_are_such_as_can_be_read(tokenizer, parameters):
    """1e999 is JSON, and infinite where it is read."""
    family, some, grammars = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"])), Grammars(HEAD)
    for value in ("%s", "[%s]", '{"y": [%s]}'):
        for number, readable in [("-1.5", True), ("1e9", False), ("1" * 20, False)]:
            written = Writing(generate({"name": "f", "parameters": parameters}), family, some, grammars=grammars)
            call = f'<tool_call>\n{{"name": "f", "arguments": {{"x": {value % number}}}}}\n</tool_call>'
            assert written.say(call) is readable, call


def test_an_answer_of_any_kind_is_one_that_can_be_read(tokenizer):
    family, some = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"]))
    for answer, held in [("[1.5, null]", True), ('{"x": "1e9"}', True), ("1e9", False), ("[1e", False)]:
        assert Writing(Generate(prompt="x", response_format={}), family, some).say(answer) is held, answer


def test_one_of_several_that_only_their_types_tell_apart(tokenizer):
    family, some = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"]))
    values = [{"type": "integer"}, {"type": "array"}]
    objects = [{"type": "object", "properties": {"x": value}, "required": ["x"]} for value in values]
    for schema, said in (({"oneOf": values}, "1"), ({"oneOf": objects}, '{"x": 1}')):
        assert Writing(Generate(prompt="x", response_format=schema), family, some).say(said)


def test_choices_in_choices_take_no_longer_than_others(tokenizer):
    deep = {"type": "null"}
    for _ in range(30):
        deep = {"oneOf": [deep]}
    assert Writing(Generate(prompt="x", response_format=deep), BY_NAME["hermes"], tokenizer(())).say("null")


def test_bounds_of_a_schema_that_are_farther_than_numbers_may_be(tokenizer):
    family, some = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"]))
    far = {"type": "integer", "minimum": -1e30, "maximum": 1e30}
    assert not Writing(Generate(prompt="x", response_format=far), family, some).say("1" * 20)
    assert Writing(Generate(prompt="x", response_format=far), family, some).say("-" + "1" * 18)


@pytest.mark.parametrize("name", ["hermes", "qwen_xml"])
def test_hundreds_of_optional_properties(tokenizer, name):
    family = BY_NAME[name]
    many = tool("f", **{f"p{i}_": {"type": "boolean"} for i in range(900)})
    said = {
        "hermes": '{"name": "f", "arguments": {"p3": true, "p899": false}}',
        "qwen_xml": "<function=f>\n<parameter=p3>\ntrue\n</parameter>\n<parameter=p899>\nfalse\n</parameter>\n"
        "</function>",
    }
    written = Writing(generate(many), family, tokenizer(tokens_of(family)))
    assert written.say(f"<tool_call>\n{said[name]}\n</tool_call>")


BASE = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
MORE = {"properties": {"y": {"type": "integer"}}, "required": ["y"]}


@pytest.mark.parametrize(
    "parameters",
    [
        BASE | {"anyOf": [MORE, {"required": []}]},
        BASE | {"$ref": "#/$defs/more", "$defs": {"more": MORE}},
        {"allOf": [BASE, MORE]},
    ],
)
def test_properties_that_are_named_in_several_places_may_all_be_given(tokenizer, parameters):
    family, some = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"]))
    one = {"name": "f", "parameters": parameters}
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": 2}}\n</tool_call>'
    assert Writing(generate(one), family, some).say(call)


@pytest.mark.parametrize(
    ("request_", "name", "reason"),
    [
        (generate(choice="required"), "hermes", "tool_choice: found 'required'.*there are none"),
        (generate(NOTHING, choice="later"), "hermes", "tool_choice: found 'later'.*now"),
        (
            generate(tool(x={"not": {"type": "string"}})),
            "hermes",
            "arguments of 'weather' cannot be.*not.*strict: false",
        ),
        (generate(tool(x={"type": "array", "uniqueItems": True})), "hermes", "'weather'.*uniqueItems"),
        (generate(tool(x={"$ref": "https://example.org/x.json"})), "hermes", "'weather'.*example.org"),
        (generate(NOTHING, tool(x={"type": "string", "pattern": "(?=a)b"})), "hermes", "'weather'"),
        (
            generate({"name": "f", "parameters": {"type": "array"}}),
            "hermes",
            r"tools\[0\].*found 'array', expected 'object'",
        ),
        (generate({"name": "f", "parameters": {"type": "object", "x": float("nan")}}), "hermes", r"tools\[0\].*JSON"),
        (
            Generate(prompt="x", response_format={"$ref": "#/%64efault/x", "default": {"x": {"type": "null"}}}),
            "hermes",
            r"response_format: found \$ref '#/%64efault/x'.*\$defs",
        ),
        (generate({"name": "f", "strict": "yes"}), "hermes", r"tools\[0\].function.strict: found 'yes'"),
        (Generate(prompt="x", response_format={"type": "json_object"}), "hermes", "response_format.*json_object"),
        (Generate(prompt="x", response_format={"enum": ["x" * 8000] * 70}), "hermes", "characters of schemas"),
        (Generate(prompt="x", response_format={"anyOf": [{}] * 1000}), "hermes", "response_format: found 1001 objects"),
        (generate(tool(x={"type": "integer", "multipleOf": 9999991})), "hermes", r"tools\[0\].*multipleOf 9999991"),
        (
            Generate(prompt="x", response_format={"multipleOf": 999.99}),
            "hermes",
            "response_format: found multipleOf 999",
        ),
        (generate(tool(x={"type": "string", "pattern": "a"})), "qwen_xml", "'weather'.*qwen_xml.*'pattern' for a text"),
        (generate(tool(x={"$ref": "#/$defs/y"})), "glm", r"'weather'.*glm.*\$ref"),
        (generate({"name": "f", "parameters": {"anyOf": []}}), "qwen_xml", "'f'.*'anyOf' for an object"),
        (generate(tool("-a")), "gemma", "'-a'.*begins with a letter"),
        (generate(tool(**{"a b": TEXT})), "gemma", "'a b'.*name cannot be written"),
    ],
)
def test_what_cannot_be_guaranteed_is_refused_with_the_reason(tokenizer, request_, name, reason):
    with pytest.raises(BadRequestError, match=reason):
        Writing(request_, BY_NAME[name], tokenizer(tokens_of(BY_NAME[name]), "tool_code"))


def objects(count):
    return [{"type": "object", "properties": {f"a{i}": {}}, "required": [f"a{i}"]} for i in range(count)]


TOO_MUCH = {
    "a text that is long": ({"const": "x" * 10_000}, "spells out 10000 characters"),
    "a pattern that is long": ({"type": "string", "pattern": "^(a{1000}){1000}$"}, "spells out 1000000 characters"),
    "names of properties": ({"type": "object", "properties": {"x" * 10_000: {}}}, "spells out 10000 characters"),
    "optional letters": ({"type": "string", "pattern": "^(a?){500}a{500}$"}, "a step takes too long"),
    "products": ({"allOf": [{"anyOf": objects(10)}] * 5}, "schema too large"),
    "patterns at once": ({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcd"]}, "regex"),
    "remainders at once": ({"allOf": [{"type": "integer", "multipleOf": n} for n in (67, 71)]}, "multipleOf 67 and 71"),
    "required names": ({"type": "object", "required": [f"p{i}" for i in range(5000)]}, "5000 required properties"),
}


@pytest.mark.parametrize("title", TOO_MUCH)
def test_what_would_take_too_long_is_refused_soon(tokenizer, title):
    schema, reason = TOO_MUCH[title]
    began = time.thread_time()
    with pytest.raises(BadRequestError, match=f"response_format: .*{reason}"):
        Writing(Generate(prompt="x", response_format=schema), BY_NAME["hermes"], tokenizer(()))
    assert time.thread_time() - began < 5, "seconds for what is to take two at most"


@pytest.mark.parametrize(
    ("limit", "most", "schema"),
    [
        ("step_lexer_fuel", 1000, {"type": "string", "pattern": ".*a.{300}b"}),
        (
            "step_lexer_fuel",
            1000,
            tool(x=TEXT, y={"type": "string", "pattern": ".*a.{300}b"})["function"]["parameters"],
        ),
        ("step_lexer_fuel", 5000, {"anyOf": [{"type": "string", "maxLength": n} for n in range(900)]}),
        ("step_max_items", 500, {"anyOf": [{"type": "array", "items": {"maxLength": n}} for n in range(100)]}),
    ],
)
def test_what_takes_too_long_a_step_is_refused(tokenizer, monkeypatch, limit, most, schema):
    """The limit is lowered in proportion to this small vocabulary; what is costly need not come first."""
    monkeypatch.setitem(matching._LIMITS, limit, most)
    with pytest.raises(BadRequestError, match="response_format: it cannot be guaranteed: a step takes too long"):
        Writing(Generate(prompt="x", response_format=schema), BY_NAME["hermes"], tokenizer(()))


def test_what_takes_long_in_sum_is_refused_when_its_time_is_over(tokenizer, monkeypatch):
    monkeypatch.setattr(matching, "_SECONDS", 0.02)
    texts = {f"p{n}": {"type": "string", "format": "email", "maxLength": n + 9} for n in range(200)}
    began = time.thread_time()
    with pytest.raises(
        BadRequestError, match=r"arguments of 'weather' .* takes more than 0.02 s to compile.*strict: false"
    ):
        Writing(generate(tool(**texts)), BY_NAME["hermes"], tokenizer(()))
    assert time.thread_time() - began < 1, "seconds: what comes behind is not tried"


LARGE = {
    "optional properties": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(900)}},
    "alternatives": {"anyOf": objects(240)},
    "a pattern": {"type": "string", "pattern": "^(.*[ab]c){50}$"},
    "alternatives in a pattern": {"type": "string", "pattern": f"^({'|'.join(f'{n:x}' * 2 for n in range(9**4))})$"},
    "a long text": {"type": "string", "maxLength": 10**6},
    "choices": {"enum": [f"{n:x}" * 3 for n in range(9**4)]},
    "lists of lists": {"type": "array", "minItems": 100, "items": {"type": "array", "minItems": 100, "maxItems": 200}},
    "references": {
        "$defs": {
            f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{(n + k) % 60}"} for k in (1, 7, 9)] + objects(2)}
            for n in range(60)
        },
        "$ref": "#/$defs/d0",
    },
}


@pytest.mark.parametrize("title", LARGE)
def test_what_is_let_in_takes_little_in_each_step(tokenizer, title):
    made = Writing(Generate(prompt="x", response_format=LARGE[title]), BY_NAME["hermes"], tokenizer(()))
    chance, worst = random.Random(0), 0.0
    for _ in range(60):
        if made.matcher.complete:
            break
        began = time.thread_time()
        allowed = made.matcher.allowed()
        worst = max(worst, time.thread_time() - began)
        made.push(chance.choice(allowed.nonzero().flatten().tolist()))
    assert worst < 0.1, "seconds for what is to take half of it"


def test_what_values_look_like_is_no_matter(tokenizer):
    looks = {"pattern": "(", "multipleOf": 7}
    said = tool(pattern={"type": "object", "default": looks, "examples": [looks], "enum": [looks]})
    written = Writing(generate(said), BY_NAME["hermes"], tokenizer(()))
    assert written.say('<tool_call>\n{"name": "weather", "arguments": {"pattern": {"pattern": "("')


def test_a_grammar_that_failed_for_one_is_compiled_again_for_the_next(tokenizer, monkeypatch):
    """Requests share the states that a grammar has come to, and their end."""
    monkeypatch.setitem(matching._LIMITS, "max_lexer_states", 2000)
    family, some, grammars = BY_NAME["hermes"], tokenizer(()), Grammars(HEAD)
    request = Generate(prompt="x", response_format={"type": "string", "pattern": "^[ab]*a[ab]{18}b$"})

    with pytest.raises(EngineError, match="too many states"):
        Writing(request, family, some, grammars=grammars).say('"' + "".join(random.Random(0).choices("ab", k=5000)))
    assert Writing(request, family, some, grammars=grammars).say('"aab')


def test_without_llguidance_the_remedy_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(matching, "find_spec", lambda name: None)
    with pytest.raises(BadRequestError, match=r"needs llguidance.*add 'llguidance>=1.9,<2' to its requirements"):
        Writing(generate(NOTHING), BY_NAME["hermes"], tokenizer(()))


def test_a_tokenizer_that_llguidance_cannot_read():
    with pytest.raises(BadRequestError, match=r"cannot use this model's tokenizer.*Odd"):
        Writing(generate(NOTHING), BY_NAME["hermes"], Odd())


class Odd:
    """A tokenizer without a tokenizer.json."""

    chat_template = None
    added_tokens_encoder: ClassVar[dict] = {}


def test_a_model_without_an_end(tokenizer):
    with pytest.raises(BadRequestError, match=r"no end token.*eos_token_id"):
        Grammars(HEAD).matcher(
            asked(generate(NOTHING)), BY_NAME["hermes"], tokenizer(()), eos=frozenset(), ends=frozenset(), thinks=False
        )


def test_two_hundred_tools_are_compiled_once_and_soon(tokenizer, monkeypatch):
    family, some, grammars = BY_NAME["hermes"], tokenizer(tokens_of(BY_NAME["hermes"])), Grammars(HEAD)
    tools = [{**WEATHER, "function": {**WEATHER["function"], "name": f"weather_{i}"}} for i in range(200)]
    began = time.process_time()
    first = Writing(generate(*tools), family, some, grammars=grammars)
    assert time.process_time() - began < 5, "seconds for what is to take a part of one"
    monkeypatch.setattr(matching, "_compile", None)
    assert first.say('<tool_call>\n{"name": "weather_7", ')
    assert Writing(generate(*tools), family, some, grammars=grammars).say('<tool_call>\n{"name": "weather_199", ')


def test_the_last_grammars_are_kept_and_no_more(tokenizer, monkeypatch):
    monkeypatch.setattr(matching, "_KEPT", 2)
    family, some, grammars = BY_NAME["hermes"], tokenizer(()), Grammars(HEAD)
    compiled = []
    compile_ = matching._compile
    monkeypatch.setattr(matching, "_compile", lambda *given: compiled.append(1) or compile_(*given))
    for name, count in [("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4)]:
        Writing(generate(tool(name)), family, some, grammars=grammars)
        assert len(compiled) == count, name


def test_a_token_that_does_not_fit_is_an_error_and_another_end_token_an_end(tokenizer):
    family, some = BY_NAME["hermes"], tokenizer(())
    with pytest.raises(EngineError, match="held to its grammar"):
        Writing(generate(NOTHING), family, some).push(5)
    made = Grammars(HEAD).matcher(
        asked(Generate(prompt="x", response_format={"type": "integer"})), family, some,
        eos=frozenset({END}), ends=frozenset({END, 7}), thinks=False,
    )  # fmt: skip
    assert not made.allowed()[[END, 7]].any()
    made.push(some.encode("1")[0])
    assert made.allowed()[[END, 7]].all(), "a whole number may be whole here"
    made.push(7)
    assert made.complete


def test_behind_every_prefix_the_same_may_come(tokenizer):
    family, grammars = BY_NAME["hermes"], Grammars(HEAD)
    some = tokenizer(tokens_of(family))
    whole = Writing(generate(WEATHER), family, some, grammars=grammars).ramble(3, 0.9)
    first = Writing(generate(WEATHER), family, some, grammars=grammars)
    for count, token in enumerate(whole.ids):
        again = Writing(generate(WEATHER), family, some, grammars=grammars)
        for known in whole.ids[:count]:
            again.push(known)
        assert again.matcher.allowed().equal(first.matcher.allowed())
        first.push(token)
    assert first.matcher.complete


@pytest.mark.parametrize(
    ("parameters", "any_"), [({}, True), ({"additionalProperties": False}, False), ({"properties": {}}, False)]
)
def test_arguments_that_have_no_names_in_the_schema(tokenizer, parameters, any_):
    family = BY_NAME["glm"]
    some = tokenizer(tokens_of(family))
    request = generate({"name": "f", "parameters": parameters})
    assert Writing(request, family, some).say("<tool_call>f\n</tool_call>")
    one = "<arg_key>x</arg_key>\n<arg_value>1 & 2</arg_value>\n"
    written = Writing(request, family, some)
    assert written.say(f"<tool_call>f\n{one}</tool_call>") is any_
    if any_:
        assert written.read[1][0].arguments == {"x": "1 & 2"}
