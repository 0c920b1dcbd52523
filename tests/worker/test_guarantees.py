"""Guaranteed output in engines: beside other requests, behind a prefix, with everything else that chooses tokens."""

import json

import pytest

import enginekit
from enginekit import drain, ids, of, play, text
from loopmux.errors import BadRequestError, EngineError
from loopmux.messages import ModelSpec, Sampling
from loopmux.schemacheck import problems
from loopmux_worker.engine.base import Failed, Finished, Produced
from loopmux_worker.engine.grammars.matching import Matcher

PROMPT = list(range(40, 60))
END = 266
ANSWER = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "kelvin"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["unit", "days"],
}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("weather", ANSWER), ("now", {"type": "object", "properties": {}}))
)
CALL = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module", params=["plain", "slots"])
def engine(tiny_model, request, device):
    made = enginekit.opened(tiny_model.base, ModelSpec("base"), engine=request.param, device=device)
    yield made
    made.close()


def job(seed=0, **more):
    given = {"sampling": Sampling(temperature=1.0, seed=seed), "max_new_tokens": 200}
    return enginekit.job(PROMPT, **(given | more))


def calls(outputs):
    return [call for output in outputs if isinstance(output, Produced) for call in output.calls]


def checked(outputs):
    """The one call of an output that is nothing else."""
    assert isinstance(outputs[-1], Finished), outputs[-1]
    assert (text(outputs), outputs[-1].reason) == ("", "tool_calls")
    (call,) = calls(outputs)
    assert call.error is None
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}[call.name]
    assert problems(parameters, call.arguments, closed=True) == []
    return call


def test_a_forced_call_is_the_whole_output(engine):
    jobs = [job(seed, **CALL) for seed in range(6)]
    outputs = play(engine, jobs)
    assert {checked(of(one, outputs)).name for one in jobs} == {"weather", "now"}
    named = [job(seed, **CALL | {"tool_choice": "now"}) for seed in range(3)]
    outputs = play(engine, named)
    assert {checked(of(one, outputs)).name for one in named} == {"now"}


def test_it_ends_with_its_call_whatever_end_tokens_are_worth(engine):
    checked(play(engine, [job(1, ignore_eos=True, **CALL)]))


def test_an_answer_in_json(engine):
    jobs = [job(seed, response_format=ANSWER) for seed in range(3)]
    outputs = play(engine, jobs)
    for one in jobs:
        assert problems(ANSWER, json.loads(text(of(one, outputs))), closed=True) == []
        assert of(one, outputs)[-1].reason == "stop"


def test_beside_others_each_is_what_it_is_alone(engine):
    jobs = [
        job(0, max_new_tokens=60),
        job(1, **CALL),
        job(2, max_new_tokens=60, ignore_eos=True),
        job(3, response_format=ANSWER),
    ]
    alone = [ids(play(engine, [one])) for one in jobs]
    together = play(engine, jobs)
    assert [ids(of(one, together)) for one in jobs] == alone


def test_it_resumes_behind_a_prefix(engine):
    sampling = Sampling(temperature=1.0, seed=5, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2)
    for options, step, reason in (({"response_format": ANSWER}, 7, "stop"), (CALL, 25, "tool_calls")):
        written = ids(play(engine, [job(sampling=sampling, **options)]))
        counts = range(0, len(written) + 1, step)
        again = [job(sampling=sampling, prefix=written[:count], **options) for count in counts]
        outputs = play(engine, again)
        for count, other in zip(counts, again, strict=True):
            own = of(other, outputs)
            assert (ids(own), own[-1].reason) == (written[count:], reason)


def test_a_prefix_that_does_not_fit_is_refused(engine):
    with pytest.raises(EngineError, match="held to its grammar"):
        engine.submit(job(prefix=[5], **CALL))
    assert engine.due() is None


def test_deterministic_requests_too(engine):
    jobs = [job(7, deterministic=True, **CALL) for _ in range(2)]
    outputs = play(engine, jobs)
    first, second = (ids(of(one, outputs)) for one in jobs)
    assert first == second
    checked(of(jobs[0], outputs))


def test_what_a_bias_forbids_is_written_where_nothing_else_may_be(engine, tiny_model):
    forbidden = {str(token): -1000.0 for token in tiny_model.tokenizer.encode('<tool_call>{"')}
    checked(play(engine, [job(sampling=Sampling(temperature=0, logit_bias=forbidden), **CALL)]))


def test_stop_tokens_that_leave_nothing_to_write_are_named(engine, tiny_model):
    begins = tuple(tiny_model.tokenizer.encode("<tool_call>"))
    (failed,) = play(engine, [job(stop_token_ids=begins, **CALL)])
    assert isinstance(failed, Failed)
    assert "stop_token_ids" in failed.error.message
    assert engine.due() is None


def test_log_probabilities_are_the_models_own(engine):
    free, held = job(max_new_tokens=1, logprobs=3), job(max_new_tokens=1, logprobs=3, **CALL)
    outputs = play(engine, [free, held])
    (free_one,), (held_one,) = (of(one, outputs)[0].logprobs for one in (free, held))
    assert [token for token, _ in held_one.top] == [token for token, _ in free_one.top]
    assert [value for _, value in held_one.top] == pytest.approx([value for _, value in free_one.top], abs=1e-4)
    assert held_one.logprob < 0


def test_a_grammar_that_fails_in_a_step_fails_its_request_alone(engine, monkeypatch):
    broken, fine, free = job(1, **CALL), job(2, **CALL), job(3, max_new_tokens=20)
    expected = ids(play(engine, [fine])), ids(play(engine, [free]))
    asked = []
    allowed = Matcher.allowed

    def failing(matcher):
        if not asked:
            asked.append(matcher)  # the first one that is asked, and only that one
        if matcher is asked[0]:
            raise EngineError("too complex")
        return allowed(matcher)

    monkeypatch.setattr(Matcher, "allowed", failing)
    outputs = play(engine, [broken, fine, free])
    (failed,) = of(broken, outputs)
    assert isinstance(failed, Failed)
    assert failed.error.message == "too complex"
    assert (ids(of(fine, outputs)), ids(of(free, outputs))) == expected
    assert engine.due() is None


def test_requests_that_ask_for_what_cannot_be_leave_the_engine_as_it_was(engine):
    unknown = {"type": "object", "not": {}}
    for bad, reason in [
        (job(tools=TOOLS, tool_choice="later"), "later"),
        (job(response_format=unknown), "response_format.*not"),
    ]:
        with pytest.raises(BadRequestError, match=reason):
            engine.submit(bad)
    assert drain(engine) == []
