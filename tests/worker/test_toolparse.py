import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmux_worker.engine.toolparse import CallParser, read_call

REQUEST = bytes(range(16))


def parse(text: str, size: int = 10**9):
    parser, out, calls = CallParser(REQUEST), "", []
    for i in range(0, len(text), size):
        parsed = parser.push(text[i : i + size])
        out += parsed.text
        calls += parsed.calls
    parsed = parser.flush()
    return out + parsed.text, [*calls, *parsed.calls]


def call(name, arguments):
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"


def test_text_without_calls_passes_unchanged():
    assert parse(" a < b <tool_cal and\n ") == (" a < b <tool_cal and\n ", [])


def test_calls_and_the_text_around_them():
    text, calls = parse("Let me see.\n" + call("add", {"a": 1}) + "\n" + call("mul", {"b": [2]}) + "\n")
    assert text == "Let me see."
    assert [(c.id, c.name, c.arguments, c.error) for c in calls] == [
        ("call_0_0001", "add", {"a": 1}, None),
        ("call_1_0001", "mul", {"b": [2]}, None),
    ]
    assert calls[0].raw == '{"name": "add", "arguments": {"a": 1}}'


def test_a_closing_tag_inside_a_json_string_does_not_end_the_call():
    arguments = {"code": 'print("</tool_call>\\n{")'}
    text, calls = parse(call("run", arguments) + "done")
    assert (text, calls[0].arguments) == ("done", arguments)


def test_an_unclosed_string_costs_only_its_own_call():
    broken = '<tool_call>\n{"name": "a", "arguments": {"x": "open}}\n</tool_call>\n'
    text, calls = parse(broken + call("b", {}))
    assert text == ""
    assert [(c.name, c.error is None) for c in calls] == [("", False), ("b", True)]
    assert calls[0].raw == '{"name": "a", "arguments": {"x": "open}}'


def test_a_cut_call_is_an_error_with_what_there_is():
    text, calls = parse('ok <tool_call>{"name": "a", "argu')
    assert text == "ok"
    assert calls[0].raw == '{"name": "a", "argu'
    assert "cut off" in calls[0].error


def test_a_forgotten_closing_tag_is_forgiven_where_the_json_is_whole():
    one = '<tool_call>{"name": "a", "arguments": {}}'
    assert [c.name for c in parse(one)[1]] == ["a"]
    assert [(c.name, c.error) for c in parse(one + one)[1]] == [("a", None), ("a", None)]


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
        ('{"name": "a", "arguments": {"x": "\\ud800"}}', "surrogate"),
        ('{"name": "a", "arguments": {"x": ' + "[" * 80 + "]" * 80 + "}}", "nested"),
        ('{"name": "a", "arguments": ' + '{"x":' * 5000 + "1" + "}" * 5001, ""),
        ("name(arg=1)", "malformed"),
    ],
)
def test_what_is_no_call_says_why(raw, reason):
    made = read_call(raw, "id")
    assert made.error is not None
    assert reason in made.error
    assert made.raw == raw
    assert made.arguments == {}


def test_arguments_written_as_a_json_text_and_raw_line_ends_are_taken():
    assert read_call('{"name": "a", "arguments": "{\\"x\\": 1}"}', "id").arguments == {"x": 1}
    assert parse('<tool_call>{"name": "a", "arguments": {"x": "1\n2"}}</tool_call>')[1][0].arguments == {"x": "1\n2"}


SNIPPETS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<tool", "_call>", "</", "<", '"', "\\", "{", "}", "\n", " ", "text", "ü",
        '{"name": "f", "arguments": {"a": "b"}}', call("f", {"x": "</tool_call>"}), call("g", {"y": ['"', "}"]}),
    ]
)  # fmt: skip


@given(st.lists(SNIPPETS, max_size=25).map("".join))
def test_the_result_does_not_depend_on_the_pieces(text):
    whole = parse(text)
    for size in (1, 3, 7):
        assert parse(text, size) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=5), JSON)), max_size=3))
def test_whatever_a_call_holds_comes_back(calls):
    text, parsed = parse("".join(call(name, arguments) for name, arguments in calls), 3)
    assert text == ""
    assert [(c.name, c.arguments, c.error) for c in parsed] == [(n, a, None) for n, a in calls]
    assert len({c.id for c in parsed}) == len(calls)
