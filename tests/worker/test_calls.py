"""The state machine for text, reasoning and calls: what holds in every family, and the form of Hermes in detail."""

import json
import time
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from callkit import TOOLS, parse, parser, results
from loopmux.messages import ToolFormat
from loopmux_worker.engine.calls import FAMILIES, Parsed, family_of
from loopmux_worker.engine.calls.source import Marks, marks


def call(name, arguments):
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"


def hermes(text, size=10**9):
    parsed = parse("hermes", text, size)
    return parsed.text, list(parsed.calls)


def test_text_without_calls_passes_unchanged():
    assert hermes(" a < b <tool_cal and\n ") == (" a < b <tool_cal and\n ", [])


def test_calls_and_the_text_around_them():
    text, calls = hermes("Let me see.\n" + call("add", {"a": 1}) + "\n" + call("mul", {"b": [2]}) + "\n")
    assert text == "Let me see."
    assert [(c.id, c.name, c.arguments, c.error) for c in calls] == [
        ("000102000", "add", {"a": 1}, None),
        ("000102001", "mul", {"b": [2]}, None),
    ]
    assert calls[0].raw == "", "it would be sent twice"


def test_text_behind_a_call_does_not_overwrite_the_text_before_it():
    assert hermes("one " + call("f", {}) + "two " + call("f", {}) + " three")[0] == "one\ntwo\nthree"


def test_a_closing_tag_inside_a_json_string_does_not_end_the_call():
    arguments = {"code": 'print("</tool_call>\\n{")'}
    text, calls = hermes(call("run", arguments) + "done")
    assert (text, calls[0].arguments) == ("done", arguments)


def test_an_unclosed_string_costs_only_its_own_call():
    broken = '<tool_call>\n{"name": "a", "arguments": {"x": "open}}\n</tool_call>\n'
    text, calls = hermes(broken + call("b", {}))
    assert text == ""
    assert [(c.name, c.error is None) for c in calls] == [("", False), ("b", True)]
    assert calls[0].raw == '{"name": "a", "arguments": {"x": "open}}'


def test_a_cut_call_is_an_error_with_what_there_is():
    text, calls = hermes('ok <tool_call>{"name": "a", "argu')
    assert text == "ok"
    assert calls[0].raw == '{"name": "a", "argu'
    assert "cut off" in calls[0].error


def test_a_forgotten_closing_tag_is_forgiven_where_the_json_is_whole():
    one = '<tool_call>{"name": "a", "arguments": {}}'
    assert [c.name for c in hermes(one)[1]] == ["a"]
    assert [(c.name, c.error) for c in hermes(one + one)[1]] == [("a", None), ("a", None)]


def test_a_mark_without_meaning_is_no_text():
    assert hermes("a</tool_call> b") == ("a b", [])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("[1]", "found list"),
        ("{}", '"name" is missing'),
        ('{"name": 3}', '"name" is missing'),
        ('{"name": "a", "arguments": [1]}', '"arguments" is list'),
        ('{"name": "a", "arguments": {"x": NaN}}', "NaN"),
        ('{"name": "a", "arguments": {"x": 1e999}}', "too large"),
        (f'{{"name": "a", "arguments": {{"x": {10**30}}}}}', "too large"),
        (f'{{"name": "a", "arguments": {{"x": 1{"0" * 5000}}}}}', "4300 digits"),
        ('{"name": "a", "arguments": {"x": "\\ud800"}}', "surrogate"),
        (json.dumps({"name": "a", "arguments": {"x": [0] * 65_537}}), "a list has more than 65536 entries"),
        (json.dumps({"name": "a", "arguments": dict.fromkeys(map(str, range(4097)))}), "has more than 4096 entries"),
        ('{"name": "a", "arguments": {"x": ' + "[" * 80 + "]" * 80 + "}}", "nested"),
        ('{"name": "a", "arguments": ' + '{"x":' * 5000 + "1" + "}" * 5001, ""),
        ('{"name": "a"} and more', "Extra data"),
        ("name(arg=1)", "malformed"),
    ],
)
def test_what_is_no_call_says_why(raw, reason):
    (made,) = hermes(f"<tool_call>{raw}</tool_call>")[1]
    assert made.error is not None
    assert reason in made.error
    assert (made.name, made.raw, made.arguments) == ("", raw, {})


@pytest.mark.parametrize(
    "least",
    [
        lambda n: [0] * (65_536 + n),
        lambda n: dict.fromkeys(map(str, range(4096 + n)), 0),
        lambda n: json.loads("[" * (63 + n) + "]" * (63 + n)),
        lambda n: json.loads('{"x":' * (62 + n) + "{}" + "}" * (62 + n)),
        lambda n: 2**64 - 1 + n,
        lambda n: -(2**63) - n,
    ],
)
def test_what_can_just_be_sent_is_sent(least):
    [made] = hermes(call("a", {"x": least(0)}))[1]
    assert (made.error, made.arguments) == (None, {"x": least(0)})
    [made] = hermes(call("a", {"x": least(1)}))[1]
    assert made.error is not None


def test_a_key_that_is_no_arguments_does_not_hide_them():
    [made] = hermes('<tool_call>{"name": "a", "parameters": {"y": 2}, "arguments": {"x": 1}}</tool_call>')[1]
    assert made.arguments == {"x": 1}


def test_arguments_written_as_a_json_text_and_raw_line_ends_are_taken():
    (made,) = hermes('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>')[1]
    assert made.arguments == {"x": 1}
    (made,) = hermes('<tool_call>{"name": "a", "arguments": {"x": "1\n2"}}</tool_call>')[1]
    assert made.arguments == {"x": "1\n2"}


# --- reasoning --------------------------------------------------------------------------------------------------------

THINKS = "{% if '</think>' in content %}<think>"


def thinking(text, **options):
    parsed = parse("hermes", text, 3, template=THINKS, **options)
    return parsed.reasoning, parsed.text, [c.name for c in parsed.calls]


def test_reasoning_is_apart_from_text_and_calls():
    answer = "<think>\nI add. \n</think>\n\nSo:\n" + call("add", {})
    assert thinking(answer) == ("I add.", "So:", ["add"])


def test_an_answer_may_begin_in_the_middle_of_reasoning():
    assert thinking("I add.</think>Done", reasoning=True) == ("I add.", "Done", [])
    family = family_of(THINKS, "hermes")
    assert family.opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not family.opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not family_of("", "hermes").opens_reasoning("<think>")


def test_what_looks_like_a_call_in_reasoning_is_none():
    assert thinking("<think>I could " + call("f", {})) == ('I could \n{"name": "f", "arguments": {}}', "", [])


def test_reasoning_is_found_without_tools_and_only_where_the_template_knows_it():
    assert thinking("<think>a</think>b<tool_call>", tools=()) == ("a", "b<tool_call>", [])
    assert family_of("", "hermes").parser(bytes(16), ()) is None
    assert hermes("<think>a</think>b")[0] == "<think>a</think>b"


def test_other_marks_around_reasoning():
    mistral = parse("mistral_list", "[THINK]a[/THINK]b", template="[THINK] [TOOL_CALLS]")
    gemma = parse("gemma", "<|channel>thought\na\n<channel|>b", template="<|tool_call> <|channel>")
    assert [(one.reasoning, one.text) for one in (mistral, gemma)] == [("a", "b")] * 2


# --- whatever comes ---------------------------------------------------------------------------------------------------

NAMES = [family.name for family in FAMILIES]
SNIPPETS = [
    "<tool_call>", "</tool_call>", "<tool", "_call>", "</", "<", '"', "'", "\\", "{", "}", "[", "]", "\n", " ", "text",
    "ü", ";", ",", "(", ")", "```", "json", "<think>", "</think>", "<function=f>", "</function>", "<parameter=a>",
    "</parameter>", "<arg_key>a</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
    "<|channel|>", "analysis", "commentary to=functions.f ", "<|message|>", "<|end|>", "<|start|>", "<|call|>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<start_function_call>", "call:f", "<escape>",
    "<end_function_call>", "<|tool_call>", '<|"|>', "<tool_call|>", "```tool_code\n", "f(a=1)", '{"tool": "f"}',
    '{"name": "f", "arguments": {"a": "b"}}', '{"name": "f", "parameters": {}}', call("f", {"x": "</tool_call>"}),
    '{"name": "<|python_tag|>"}', '{"id": "</tool_call>"}',
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(SNIPPETS), max_size=20).map("".join)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(text=TEXTS, cuts=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_the_result_does_not_depend_on_the_pieces(name, text, cuts):
    whole = parse(name, text, template=THINKS)
    for sizes in ([1], [3], [7], cuts):
        assert parse(name, text, *sizes, template=THINKS) == whole
    assert not any(made.raw for made in whole.calls if made.error is None)


WHOLE = [text for text in SNIPPETS if text not in ("<tool", "_call>", "</", "<")]
"""Without those that could make a mark together, once another one between them is left out."""


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(text=st.lists(st.sampled_from(WHOLE), max_size=20).map("".join))
def test_marks_that_may_be_special_tokens_never_become_text(name, text):
    whole = parse(name, text, template=THINKS)
    for mark in family_of(THINKS, name).tokens(calls=True):
        assert mark not in whole.text
        assert mark not in whole.reasoning


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "piece", ['"', "{", "<", "\\", " ", "[", "ab", "```", "<tool_call>", "</parameter>", "<arg_key>"]
)
def test_long_outputs_take_time_in_proportion(name, piece):
    """Twenty times the pieces may take a hundred times as long, not four hundred."""

    def seconds(count):
        start = time.process_time()
        parse(name, "".join(["<tool_call>", *[piece] * count]), 4)
        return time.process_time() - start

    seconds(100)
    # the best of three: a collection of garbage is no part of it
    assert min(seconds(1000) for _ in range(3)) < 100 * max(seconds(50), 0.0005)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("envelope", f"<tool_call>{'f(a=1);' * 1500}</tool_call>"),
        ("gemma", f"```tool_code\n[{'f(a=1),' * 1500}]```"),
        ("qwen_xml", f"<tool_call><function=f>{'<parameter=' * 15000}</parameter></function></tool_call>"),
        ("qwen_xml", f"<tool_call>{'<function=' * 15000}</tool_call>"),
    ],
)
def test_what_a_call_holds_is_read_in_proportion(name, text):
    start = time.process_time()
    parse(name, text)
    assert time.process_time() - start < 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("envelope", "<tool_call>{}</tool_call>"),
        ("gemma", "```tool_code\n{}\n```"),
        ("gemma", "[{}]"),
        ("llama_json", "[{}]"),
        ("llama_json", "<|python_tag|>{}"),
    ],
)
def test_names_that_python_could_not_read(name, around):
    code = "mcp-time_3d.x(from='a-b(c=1)', if = 2, größe=[-1])"
    tools = [{"name": "mcp-time_3d.x"}]
    said = [("mcp-time_3d.x", {"from": "a-b(c=1)", "if": 2, "größe": [-1]})]
    assert results(parse(name, around.format(code), 3, tools=tools)) == said


def test_each_call_of_code_has_its_own_text():
    text = "f('ü')\r\n# ü\n[f('ß'), print(g.h(\n  1))]\r"
    assert [c.raw for c in parse("envelope", f"<tool_call>{text}</tool_call>").calls] == [
        "f('ü')",
        "f('ß')",
        "g.h(\n  1)",
    ]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=5), JSON)), max_size=3))
@example([("f", {"x": '"'}), ("g", {"y": "\\"})])
def test_whatever_a_call_holds_comes_back_with_its_last_character(calls):
    one, made = parser("hermes", TOOLS), []
    for number, (name, arguments) in enumerate(calls):
        for character in call(name, arguments):
            assert len(made) == number
            parsed = one.push(character)
            assert parsed.text == ""
            made += parsed.calls
    assert [(c.name, c.arguments, c.error) for c in made] == [(*each, None) for each in calls]
    assert len({c.id for c in made}) == len(calls)
    assert one.flush() == Parsed()


def test_an_argument_of_a_megabyte():
    big = ('a "quoted" line\n' + "x" * 240) * 4096
    start = time.process_time()
    assert results(parse("hermes", call("f", {"x": big}), 50)) == [("f", {"x": big})]
    assert time.process_time() - start < 10


def test_many_calls_and_many_tools():
    tools = tuple({"type": "function", "function": {"name": f"t{n}", "parameters": {}}} for n in range(200))
    parsed = parse("hermes", "".join(call(f"t{n}", {}) for n in range(200)), 9, tools=tools)
    assert [c.name for c in parsed.calls] == [f"t{n}" for n in range(200)]
    assert {len(c.id) for c in parsed.calls} == {9}


@pytest.mark.parametrize("name", NAMES)
def test_schemas_that_are_none_are_no_trouble(name):
    tools = ({"function": {"name": "f", "parameters": []}}, {"name": "g", "parameters": {"properties": 3}}, {})
    text = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    assert parse(name, text, 3, tools=tools) == parse(name, text, tools=tools)


def test_no_mark_is_part_of_another():
    for family in FAMILIES:
        known = {*family.begins, *family.tokens(calls=True), *family.lists(["f", "ff"])}
        assert not [(a, b) for a in known for b in known if a != b and a in b], family.name
    assert Marks("ab", "c").held("xa", 0) == 1


def test_marks_made_of_the_names_of_tools_are_not_kept_for_ever():
    for n in range(300):
        parse("gemma", "x", tools=[{"name": f"t{n}"}])
    assert marks.cache_info().currsize < 300


def test_the_configuration_offers_every_family():
    assert set(get_args(ToolFormat)) == {"auto", *NAMES}


def test_the_parser_counts_its_calls():
    one = parser("hermes", TOOLS)
    one.push(call("f", {}) + "<tool_call>")
    assert one.count == 1
    one.flush()
    assert one.count == 2
