"""Marks of calls and reasoning that are special tokens: the parser sees them, a client never does."""

import shutil

import pytest
from transformers import AutoTokenizer

from enginekit import drain, job, of, opened, text
from loopmux.messages import Generate, ModelSpec, Run
from loopmux_worker.engine import templates
from loopmux_worker.engine.base import Job, Key, Produced
from loopmux_worker.engine.calls import family_of
from loopmux_worker.engine.output import Reader
from loopmux_worker.engine.served import Served
from tinymodel import TEMPLATE, write_tokenizer

KEY = Key(bytes(16), 1)
MODEL = ModelSpec("m")
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}},)
CALL = '<|im_start|>[TOOL_CALLS]f[ARGS]{"x": "[ARGS]"}<|im_start|>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """With a family's marks as special tokens, as the makers' tokenizers have them."""
    folder = tmp_path_factory.mktemp("special")
    write_tokenizer(
        folder, TEMPLATE + "{%- if thinks %}{{- '<think>\n' }}{% endif %}{# </think> [TOOL_CALLS] [ARGS] #}"
    )
    made = AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"]})
    return made


def read(tokenizer, generate, written):
    """What a reader makes of a text as the answer to a request: text, reasoning, calls."""
    prompt = tokenizer.decode(templates.render(generate, MODEL, tokenizer).ids, skip_special_tokens=False)
    served = Served(MODEL, tokenizer, frozenset(), family_of(tokenizer.chat_template), ())
    ids = tokenizer.encode(written, add_special_tokens=False)
    thinks = served.family.opens_reasoning(prompt)
    reader = Reader(served.reading(Job(KEY, Run("m"), generate), len(ids), thinks=thinks))
    pieces = [reader.push(token) for token in ids]
    calls = [(call.name, call.arguments) for piece in pieces for call in piece.calls]
    return "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces), calls


def test_the_marks_reach_the_parser_and_no_token_reaches_the_client(tokenizer):
    given = Generate(prompt="x", tools=TOOLS)
    assert read(tokenizer, given, CALL) == ("", "", [("f", {"x": "[ARGS]"})])
    assert read(tokenizer, given, "a[ARGS]b<|im_start|></think>c") == ("abc", "", [])
    # without tools they mean nothing: not even as text
    assert read(tokenizer, Generate(prompt="x"), CALL) == ('f{"x": ""}', "", [])
    assert read(tokenizer, Generate(prompt="x", tools=TOOLS, tool_choice="none"), CALL) == ('f{"x": ""}', "", [])


def test_reasoning_that_the_template_opened(tokenizer):
    opened_by_template = Generate(prompt="x", template_kwargs={"thinks": True})
    assert read(tokenizer, opened_by_template, "I add.\n</think>\n\n42") == ("42", "I add.", [])
    assert read(tokenizer, Generate(prompt="x"), "<think>I add.\n</think>\n\n42") == ("42", "I add.", [])
    assert read(tokenizer, Generate(prompt="<think>"), "42") == ("42", "", [])


def test_the_form_of_calls_is_reported_and_may_be_configured(tiny_model):
    models = (ModelSpec("m"), ModelSpec("old", tool_format="envelope"), ModelSpec("text", model_type="base"))
    engine = opened(tiny_model.base, *models, engine="plain")
    try:
        described = engine.describe()
    finally:
        engine.close()
    assert described.report["tool_formats"] == {"m": "hermes", "old": "envelope"}
    assert len({served.fingerprint for served in described.models}) == 3


def test_a_template_that_does_not_tell_how_tools_are_called_is_noted(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model.base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ tools }}{{ messages[0].content }}")
    engine = opened(folder, ModelSpec("m"), ModelSpec("told", tool_format="envelope"), engine="plain")
    try:
        (note,) = [note for note in engine.describe().report["notes"] if "tool_format" in note]
    finally:
        engine.close()
    assert note.startswith("m: its chat template shows tools, but how they are called is not known")


@pytest.mark.parametrize("kind", ["slots", "plain"])
def test_what_a_model_thinks_comes_out_of_an_engine_as_reasoning(kind, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model.base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<think>{# </think> #}")
    engine = opened(folder, engine=kind)
    try:
        one = job(None, prompt="hello", max_new_tokens=8, ignore_eos=True)
        engine.submit(one)
        outputs = of(one, drain(engine))
    finally:
        engine.close()
    assert text(outputs) == ""
    assert "".join(output.reasoning for output in outputs if isinstance(output, Produced))
