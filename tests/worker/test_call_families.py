# ruff: noqa: E501 - transcripts are as long as they are
"""Transcripts in the form of the makers' documents, and the chat templates that tell whose they are."""

import re
from pathlib import Path

import pytest

from callkit import TOOLS, parse, results
from loopmux.messages import ModelSpec
from loopmux_worker.engine.calls import FAMILIES, family_of

TRANSCRIPTS = {
    # https://qwen.readthedocs.io/en/latest/framework/function_call.html
    # https://github.com/NousResearch/Hermes-Function-Calling (README, prompt format)
    "Hermes, Qwen2.5, Qwen3": (
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {}, "name": "g"}\n</tool_call>',
        "",
        [("f", {"city": "Paris", "days": 2}), ("g", {})],
    ),
    # https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct/blob/main/chat_template.jinja
    "Qwen3-Coder": (
        "qwen_xml",
        "I look.\n<tool_call>\n<function=f>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "<parameter=exact>\nTrue\n</parameter>\n<parameter=points>\n[1, 2.5]\n</parameter>\n</function>\n</tool_call>",
        "I look.",
        [("f", {"city": "Paris", "days": 2, "exact": True, "points": [1, 2.5]})],
    ),
    "Qwen3-Coder without the outer tag, several lines, other tags inside": (
        "qwen_xml",
        "<function=f>\n<parameter=city>\n<a>\n\n</tool_call></function>\n</parameter>\n</function>\n</tool_call>ok",
        "ok",
        [("f", {"city": "<a>\n\n</tool_call></function>"})],
    ),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/ (JSON based tool calling)
    "Llama 3.1": (
        "llama_json",
        '{"name": "f", "parameters": {"city": "Paris"}}; {"name": "g", "parameters": {}}',
        "",
        [("f", {"city": "Paris"}), ("g", {})],
    ),
    "Llama 3.1 behind its tag": (
        "llama_json",
        'Well. <|python_tag|>{"type": "function", "name": "f", "parameters": {"days": "2"}};{"name":"g","parameters":{}}',
        "Well.",
        [("f", {"days": "2"}), ("g", {})],
    ),
    # the same page (built-in tools)
    "Llama 3.1, its own tools": (
        "llama_json",
        '<|python_tag|>f.call(city="Paris (x)")<|python_tag|>g.call()',
        "",
        [("f", {"city": "Paris (x)"}), ("g", {})],
    ),
    # https://github.com/meta-llama/llama-models/blob/main/models/llama3_3/prompt_format.md (zero shot function calling)
    "Llama 3.2 and 3.3, a list": (
        "llama_json",
        "[f(city='it\\'s ]', days=2),\n g()]",
        "",
        [("f", {"city": "it's ]", "days": 2}), ("g", {})],
    ),
    # https://docs.mistral.ai/guides/tokenization/ (v3)
    "Mistral v3": (
        "mistral_list",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"city": "[Paris]"}, "id": "VvvODy9mT"}, {"name": "g", "arguments": {}}]',
        "",
        [("f", {"city": "[Paris]"}), ("g", {})],
    ),
    # https://github.com/mistralai/mistral-common, src/mistral_common/tokens/tokenizers/instruct.py (v11, v13)
    "Mistral v13": (
        "mistral_args",
        '[TOOL_CALLS]f[ARGS]{"city": "Paris"}[TOOL_CALLS]g[ARGS]{}',
        "",
        [("f", {"city": "Paris"}), ("g", {})],
    ),
    "Mistral v11": (
        "mistral_args",
        '[TOOL_CALLS]f[CALL_ID]VvvODy9mT[ARGS]{"city": "[TOOL_CALLS]"}',
        "",
        [("f", {"city": "[TOOL_CALLS]"})],
    ),
    # https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
    "FunctionGemma": (
        "gemma",
        "<start_function_call>call:f{city:<escape>Paris, {x}: <end_function_call><escape>,days:2,exact:true}"
        "<end_function_call>",
        "",
        [("f", {"city": "Paris, {x}: <end_function_call>", "days": 2, "exact": True})],
    ),
    # https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4
    "Gemma 4": (
        "gemma",
        '<|tool_call>call:f{city:<|"|>Paris "x"\n<|"|>,points:[1,2.5],o:{a-b:null}}<tool_call|><|tool_call>call:g{}<tool_call|>',
        "",
        [("f", {"city": 'Paris "x"\n', "points": [1, 2.5], "o": {"a-b": None}}), ("g", {})],
    ),
    # https://ai.google.dev/gemma/docs/meme-generator
    "Gemma 3": (
        "gemma",
        "So:\n```tool_code\nf(city='```', days=-2, points=[1, 2.5])\nprint(g())\n```\nWait.",
        "So:\nWait.",
        [("f", {"city": "```", "days": -2, "points": [1, 2.5]}), ("g", {})],
    ),
    # https://ai.google.dev/gemma/docs/capabilities/function-calling
    "Gemma 3, a list": (
        "gemma",
        '[f(city="[Paris](x) \\ud83d\\ude00", points=[1, [2]]), g()]',
        "",
        [("f", {"city": "[Paris](x) 😀", "points": [1, [2]]}), ("g", {})],
    ),
    # https://cookbook.openai.com/articles/openai-harmony
    "gpt-oss": (
        "gpt_oss",
        "<|channel|>analysis<|message|>Need to use f.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment."
        '<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"city":"<|end|>"}<|call|>',
        "One moment.",
        [("f", {"city": "<|end|>"})],
    ),
    "gpt-oss, the recipient with the role": (
        "gpt_oss",
        ' to=functions.f<|channel|>commentary json<|message|>{"city": "Paris"}',
        "",
        [("f", {"city": "Paris"})],
    ),
    "gpt-oss, an answer": (
        "gpt_oss",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
        "It is 4.",
        [],
    ),
    "gpt-oss, no channel": ("gpt_oss", "It is 4.", "It is 4.", []),
    # https://huggingface.co/zai-org/GLM-4.5/blob/main/chat_template.jinja
    "GLM-4.5": (
        "glm",
        "\n<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>2 </tool_call></arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>",
        "",
        [("f", {"city": "2 </tool_call>", "days": 2}), ("g", {})],
    ),
    # https://huggingface.co/deepseek-ai/DeepSeek-V3-0324/blob/main/tokenizer_config.json (chat_template)
    "DeepSeek V3": (
        "deepseek",
        'Ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"city": "```"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Ok",
        [("f", {"city": "```"}), ("g", {})],
    ),
    # https://huggingface.co/deepseek-ai/DeepSeek-V3.1 (model card, ToolCall)
    "DeepSeek V3.1": (
        "deepseek",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        [("f", {"city": "Paris"})],
    ),
    "envelope": (
        "envelope",
        'I call it: {"tool": "f", "args": {"city": "{\\"tool\\"}"}, "id": "1"} and {"id": 2, "tool": "g"}',
        "I call it:\nand",
        [("f", {"city": '{"tool"}'}), ("g", {})],
    ),
    "envelope in a fence": (
        "envelope",
        'Two:\n```json\n{"tool": "f", "args": {"days": 2}}\n{"tool": "g", "args": {}}\n```\nDone.',
        "Two:\nDone.",
        [("f", {"days": 2}), ("g", {})],
    ),
    "envelope as a call": (
        "envelope",
        '<tool_call>f(city="it\'s </tool_call>", exact=true, days=2, unit=None)</tool_call>\n'
        '```\n<tool_call>g()</tool_call>\n```<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "",
        [("f", {"city": "it's </tool_call>", "exact": True, "days": 2, "unit": None}), ("g", {}), ("g", {})],
    ),
}


@pytest.mark.parametrize("title", TRANSCRIPTS)
@pytest.mark.parametrize("size", [1, 3, 7, 10**6])
def test_transcripts(title, size):
    name, output, text, calls = TRANSCRIPTS[title]
    parsed = parse(name, output, size)
    assert (parsed.text, results(parsed)) == (text, calls)


def test_channels_of_reasoning():
    assert parse("gpt_oss", TRANSCRIPTS["gpt-oss"][1], 3).reasoning == "Need to use f."
    answer = parse("gpt_oss", TRANSCRIPTS["gpt-oss, an answer"][1], 3, tools=())
    assert (answer.text, answer.reasoning) == ("It is 4.", "Easy.")
    two = "<|channel|>commentary<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two."
    assert parse("gpt_oss", two, 3).text == "One.\nTwo."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama_json", 'Look: {"name": "f", "parameters": {}}'),
        ("llama_json", '{"name": "Ann", "age": 3}'),
        ("llama_json", "See [f(city=1)]"),
        ("llama_json", "[h(x=1)]"),
        ("gemma", "[1] and [f](g(1))"),
        ("llama_json", '{"answer": {"name": "f", "parameters": {}}}'),
        ("envelope", '{"answer": 4, "tool": "f"} {} { } {"args": 1}'),
        ("envelope", 'Code:\n```python\nd = {"a": 1}\n```\nand ```x``` is text\n'),
        ("envelope", "```"),
        ("gemma", "```python\nf(city=1)\n```"),
        ("mistral_list", 'an array: [{"name": "f"}]'),
        ("hermes", '```json\n{"tool": "f", "args": {}}\n```'),
    ],
)
def test_text_that_is_no_call_stays_as_it_is(name, text):
    for size in (1, 3, 7, 10**6):
        assert parse(name, text, size).text == text
    assert parse(name, text).calls == ()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("qwen_xml", "<tool_call>{}</tool_call>", "found no <function=name>"),
        ("qwen_xml", "<tool_call><function=f><parameter=city>Par", "cut off"),
        ("glm", "<tool_call>f<arg_key>a</arg_key></tool_call>", "expected pairs"),
        ("glm", "<tool_call></tool_call>", '"name" is missing'),
        ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>1", "cut off"),
        ("llama_json", '{"name": "f", "parameters": {"city": "Par', "cut off"),
        ("llama_json", "<|python_tag|>import math", "found no call"),
        ("llama_json", "[f(city='Par", "cut off"),
        ("gemma", "[f(city='x)]\n", "found no call"),
        ("llama_json", '{"name": "f", "parameters": 3}', '"parameters" is int'),
        ("mistral_list", '[TOOL_CALLS] [{"name": "f", "argum', "cut off"),
        ("mistral_list", "[TOOL_CALLS] [f, g]", "malformed"),
        ("mistral_args", '[TOOL_CALLS]f[ARGS]{"city": "Par', "cut off"),
        ("mistral_args", "[TOOL_CALLS]f[ARGS][TOOL_CALLS]g[ARGS]{}", "in front of the arguments"),
        ("deepseek", "<｜tool▁call▁begin｜>f{}<｜tool▁call▁end｜>", "found no <｜tool▁sep｜>"),
        ("gemma", "<start_function_call>f{}<end_function_call>", "expected call:name"),
        ("gemma", "<start_function_call>call:f{city:Paris}<end_function_call>", "malformed"),
        ("gemma", "<|tool_call>call:f{a:1", "cut off"),
        ("gemma", '```tool_code\nf("Paris")\n```', "needs its name"),
        ("gemma", "```tool_code\nf(city=open('x'))\n```", "expected a value"),
        ("gemma", "```tool_code\nf(city='x\n```", "found no call"),
        ("gpt_oss", '<|channel|>commentary to=functions.f<|message|>{"a": ', "cut off"),
        ("gpt_oss", "<|channel|>commentary to=python<|message|>print(1)<|call|>", "malformed"),
        ("envelope", '{"tool": "f", "args": [1]}', '"args" is list'),
        ("envelope", '{"tool": 3}', '"name" is missing'),
        ("envelope", '```json\n{"tool": "f", "args": {', "cut off"),
        ("envelope", "<tool_call>f(**x)</tool_call>", "needs its name"),
        ("envelope", "<tool_call>f(x='\\ud83d')</tool_call>", "surrogate"),
        ("envelope", "<tool_call>f(x=1j)</tool_call>", "expected a value"),
        ("envelope", f"<tool_call>{'a.' * 50_000}b(x=1)</tool_call>", "malformed"),
        ("envelope", f"<tool_call>f(x={'[' * 300}{']' * 300})</tool_call>", "malformed"),
        ("envelope", "<tool_call></tool_call>", "found 0 calls"),
    ],
)
def test_what_is_no_call_says_why_and_keeps_its_text(name, text, reason):
    for size in (1, 3, 7, 10**6):
        parsed = parse(name, text, size)
        assert len(parsed.calls) == 1
        (made,) = parsed.calls
        assert reason in (made.error or "")
        assert (made.name, made.arguments) == ("", {})
        assert made.raw or "missing" in reason or "0 calls" in reason
        assert parsed.text == ""


def test_a_broken_element_of_a_list_costs_only_itself():
    parsed = parse("mistral_list", '[TOOL_CALLS] [{"name": 3}, {"name": "g", "arguments": {}}] ok', 3)
    assert [(made.name, made.error is None) for made in parsed.calls] == [("", False), ("g", True)]
    assert parsed.text == "ok"


def test_the_same_escapes_in_all_of_json():
    parsed = parse("llama_json", '{"name": "f", "parameters": {"city": "\\u00e9\\ud834\\udd1e\\"}"}}', 1)
    assert results(parsed) == [("f", {"city": 'é𝄞"}'})]


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ("2", "city", "2"),
        ("2", "days", 2),
        ("two", "days", "two"),
        ("false", "exact", False),
        ("False", "exact", False),
        ("[1", "points", "[1"),
        ("null", "unit", None),
        ("kelvin", "unit", "kelvin"),
        ("2", "level", 2),
        ("2", "unknown", "2"),
        ('{"a": 1}', "unknown", {"a": 1}),
    ],
)
def test_the_schema_gives_values_without_quotes_their_type(value, key, expected):
    text = f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>"
    assert results(parse("glm", text)) == [("f", {key: expected})]


DEFINITIONS = {
    "Level": {"type": "integer", "enum": [1, 2]},
    "Color": {"type": "string"},
    "Circle": {"anyOf": [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Level"}]},
}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"$ref": "#/$defs/Level"}, "2", 2),
        ({"allOf": [{"$ref": "#/$defs/Level"}]}, "2", 2),
        ({"$ref": "#/$defs/Circle"}, "2", 2),
        ({"$ref": "#/$defs/Color"}, "[2]", "[2]"),
        ({"anyOf": [{"$ref": "#/$defs/Color"}, {"type": "null"}]}, "2", "2"),
        ({"anyOf": [{"$ref": "#/$defs/Color"}, {"type": "null"}]}, "null", None),
        ({"$ref": "#/$defs/Nothing"}, "2", "2"),
        ({"const": 2}, "2", 2),
    ],
)
def test_types_are_found_behind_references(schema, value, expected):
    tools = ({"name": "f", "parameters": {"properties": {"a": schema}, "$defs": DEFINITIONS}},)
    text = f"<tool_call>f<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>"
    assert results(parse("glm", text, tools=tools)) == [("f", {"a": expected})]


TEMPLATES = {
    # what stands in the templates of: Qwen3, Qwen3-Coder, Llama 3.1 and 3.2, Mistral 7B v0.3, Mistral Small 3.1,
    # Ministral 3, FunctionGemma, Gemma 3, Gemma 4, gpt-oss, GLM-4.5, DeepSeek V3.1
    "hermes": ['{{- \'<tool_call>\\n{"name": "\' }}'],
    "qwen_xml": ["{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}"],
    "llama_json": [
        '{{- "<|python_tag|>" + tool_call.name + ".call(" }}',
        '{{- \'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\' }}',
    ],
    "mistral_list": ['{{- "[TOOL_CALLS] [" }}', '{{- "[TOOL_CALLS][" }}'],
    "mistral_args": ["{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"],
    "gemma": [
        "{{- '<start_function_call>call:' + function['name'] + '{' -}}",
        "{{ '<start_of_turn>' + role + '\\n' }}",
        "{{- '<|tool_call>call:' + function['name'] + '{' -}}",
    ],
    "gpt_oss": ['{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}'],
    "glm": ["{{ '\\n<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key>"],
    "deepseek": ["{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' }}"],
    "envelope": ["{{ tools | tojson }}", ""],
}


@pytest.mark.parametrize(("name", "template"), [(n, t) for n, templates in TEMPLATES.items() for t in templates])
def test_the_chat_template_tells_the_family(name, template):
    assert family_of(template).name == name
    assert family_of(template, "hermes").name == "hermes"
    assert family_of(template, ModelSpec("m").tool_format).name == name


def test_a_model_without_a_chat_template_writes_text():
    family = family_of(None)
    assert (family.name, family.reasoning, family.parser(bytes(16), ())) == ("envelope", None, None)
    assert family.parser(bytes(16), TOOLS) is not None


def test_the_guide_lists_the_families_in_their_order_with_what_tells_them():
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?[^\\]) \|", page[page.index("## How models write calls") :], re.MULTILINE)
    told = [(name, tuple(re.findall(r"`(.*?)`", cell.replace("\\|", "|")))) for name, cell in rows]
    assert told == [(family.name, family.tells) for family in FAMILIES]
