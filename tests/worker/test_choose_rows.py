"""Rows chosen together are chosen as each would be alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmux.errors import EngineError
from loopmux.messages import Sampling
from loopmux_worker.engine.sampling import Sampler, choose_rows

ROWS = 16
VOCABULARY = 700  # more than the candidates that are looked at first

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-300, 0.01, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 300, 650, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.3, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    seed=st.integers(0, 2**63 - 1),
    logit_bias=st.dictionaries(
        st.integers(0, VOCABULARY - 1).map(str), st.sampled_from([-100.0, 1.0, 100.0]), max_size=3
    ),
)
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=5)


@st.composite
def samplers(draw):
    """What makes a sampler on a device."""
    sampling, prompt, output = draw(samplings), draw(tokens), draw(tokens)
    logprobs = draw(st.sampled_from([None, None, 0, 1, 5]))

    def make(device):
        made = sampler(sampling, device, sampling.seed, prompt=prompt, logprobs=logprobs)
        for token in output:
            made.note(token)
        return made

    return make


def sampler(sampling, device, seed=0, **more):
    return Sampler(sampling, seed=seed, vocabulary=VOCABULARY, device=device, **more)


def logits_of(seed, device, dtype=torch.float32, rows=ROWS, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, VOCABULARY, generator=generator) * scale).to(device, dtype)


def plain(device, count=ROWS, **fields):
    return [sampler(Sampling(**fields), device, i) for i in range(count)]


def assert_same(pick, alone):
    assert pick.token == alone.token
    if alone.logprob is None:
        assert pick.logprob is None
        return
    assert pick.logprob.token == alone.logprob.token
    assert pick.logprob.logprob == pytest.approx(alone.logprob.logprob, abs=1e-5)
    assert [token for token, _ in pick.logprob.top] == [token for token, _ in alone.logprob.top]
    assert [p for _, p in pick.logprob.top] == pytest.approx([p for _, p in alone.logprob.top], abs=1e-5)


@settings(max_examples=40)
@given(
    made=st.lists(samplers(), min_size=ROWS, max_size=ROWS),
    positions=st.lists(st.integers(0, 2**20), min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.0, 0.01, 3.0, 50.0]),
)
def test_a_batch_is_chosen_as_its_rows_alone(device, made, positions, seed, dtype, scale):
    logits, row_samplers = logits_of(seed, device, dtype, scale=scale), [make(device) for make in made]
    before = logits.clone()
    picks = choose_rows(logits, row_samplers, positions)
    assert torch.equal(logits, before)
    for pick, row, row_sampler, position in zip(picks, logits, row_samplers, positions, strict=True):
        assert_same(pick, row_sampler.choose(row, position))


def test_a_row_that_is_no_numbers_fails_alone(device):
    logits = logits_of(1, device)
    logits[2, 5] = math.nan
    logits[3, 7] = math.inf
    logits[4] = -math.inf
    logits[5] = math.nan
    for fields in ({"temperature": 0}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 20, "min_p": 0.1}):
        row_samplers = plain(device, **fields)
        picks = choose_rows(logits, row_samplers, range(10, 10 + ROWS))
        for i, pick in enumerate(picks):
            if i in (2, 3, 4, 5):
                assert isinstance(pick, EngineError)
                assert f"position {10 + i}:" in str(pick)
            else:
                assert pick == row_samplers[i].choose(logits[i], 10 + i)


def test_no_rows_are_no_picks(device):
    assert choose_rows(torch.zeros(0, VOCABULARY, device=device), [], []) == []


def test_one_position_per_row():
    with pytest.raises(ValueError, match="zip"):
        choose_rows(logits_of(1, "cpu"), plain("cpu"), range(ROWS - 1))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 100.0, "top_p": 1e-12},
        {"temperature": 100.0, "top_k": 600, "top_p": 1e-12},
    ],
    ids=str,
)
def test_one_token_left_is_the_best_one_the_first_of_equals(fields, device):
    logits = logits_of(2, device)
    best = logits.argmax(-1).tolist()
    assert [pick.token for pick in choose_rows(logits, plain(device, **fields), range(ROWS))] == best
    flat = torch.zeros(ROWS, VOCABULARY, device=device)
    assert {pick.token for pick in choose_rows(flat, plain(device, **fields), range(ROWS))} == {0}


def test_min_p_one_leaves_the_best_token_and_its_equals(device):
    logits = logits_of(3, device)
    logits[:, [7, 500]] = 50.0
    chosen = {pick.token for pick in choose_rows(logits, plain(device, temperature=5.0, min_p=1.0), range(ROWS))}
    assert chosen == {7, 500}


def test_bias_forces_and_forbids(device):
    logits = logits_of(4, device)
    forced = choose_rows(logits, plain(device, temperature=1.0, logit_bias={"3": 100.0}), range(ROWS))
    assert {pick.token for pick in forced} == {3}
    best = [str(token) for token in logits.argmax(-1).tolist()]
    forbidden = choose_rows(logits, plain(device, temperature=1.0, logit_bias=dict.fromkeys(best, -100.0)), range(ROWS))
    assert not {str(pick.token) for pick in forbidden} & set(best)


def test_penalties_are_each_rows_own(device):
    logits = torch.zeros(3, VOCABULARY, device=device)
    logits[:, 9], logits[:, 4] = 3.0, 2.0
    row_samplers = [
        sampler(Sampling(temperature=0, **fields), device)
        for fields in ({"repetition_penalty": 2.0}, {}, {"frequency_penalty": 0.6})
    ]
    chosen = []
    for position in range(4):
        picks = choose_rows(logits, row_samplers, [position] * 3)
        for row_sampler, pick in zip(row_samplers, picks, strict=True):
            row_sampler.note(pick.token)
        chosen.append([pick.token for pick in picks])
    # halved: 3, 1.5; less 0.6 per use: 3, 2.4, 1.8
    assert chosen == [[9, 9, 9], [4, 9, 9], [9, 9, 4], [9, 9, 9]]


def test_the_same_seed_and_position_give_the_same_token_in_any_company(device):
    logits = logits_of(6, device)
    fields = {"temperature": 1.5, "top_p": 0.97, "repetition_penalty": 1.2}
    for row in range(ROWS):
        company = plain(device, temperature=0.8, top_k=40)
        company[row] = sampler(Sampling(**fields), device, 77)
        mixed = logits.clone()
        mixed[row] = logits[0]
        alone = sampler(Sampling(**fields), device, 77).choose(logits[0], 123)
        assert choose_rows(mixed, company, [row] * row + [123] + [5] * (ROWS - row - 1))[row] == alone


def test_a_replayed_prefix_goes_on_as_the_first_attempt(device):
    fields = {"temperature": 1.2, "top_p": 0.9, "presence_penalty": 0.8, "repetition_penalty": 1.1}
    steps = [logits_of(100 + i, device) for i in range(12)]

    def attempt(prefixes):
        row_samplers = plain(device, **fields)
        for row_sampler, prefix in zip(row_samplers, prefixes, strict=True):
            for token in prefix:
                row_sampler.note(token)
        outputs = [list(prefix) for prefix in prefixes]
        for position in range(len(outputs[0]), len(steps)):
            picks = choose_rows(steps[position], row_samplers, [position] * ROWS)
            for row_sampler, output, pick in zip(row_samplers, outputs, picks, strict=True):
                row_sampler.note(pick.token)
                output.append(pick.token)
        return outputs

    whole = attempt([[]] * ROWS)
    assert attempt([output[:7] for output in whole]) == whole
    assert len({tuple(output) for output in whole}) == ROWS


def test_logprobs_are_the_models_own_and_as_many_as_each_row_asks_for(device):
    logits = logits_of(8, device, torch.bfloat16, rows=3)
    reference = torch.log_softmax(logits.float(), -1)
    row_samplers = [
        sampler(Sampling(temperature=0.5, logit_bias={"1": 100.0}), device, logprobs=logprobs)
        for logprobs in (4, None, 0)
    ]
    many, none, zero = (pick.logprob for pick in choose_rows(logits, row_samplers, [0, 0, 0]))
    assert none is None
    assert (many.token, zero.token, zero.top) == (1, 1, ())
    assert many.logprob == pytest.approx(float(reference[0, 1]), abs=1e-5)
    assert [p for _, p in many.top] == pytest.approx(reference[0].topk(4).values.tolist(), abs=1e-5)
    assert [float(reference[0, token]) for token, _ in many.top] == pytest.approx([p for _, p in many.top], abs=1e-5)


def test_all_of_it_runs_where_no_gradients_are_kept(device):
    with torch.inference_mode():
        picks = choose_rows(
            logits_of(9, device), plain(device, temperature=1.0, top_p=0.9, frequency_penalty=0.1), range(ROWS)
        )
    assert all(0 <= pick.token < VOCABULARY for pick in picks)


class Only:
    """A grammar that allows some tokens, or fails."""

    complete = False

    def __init__(self, *tokens):
        self.tokens = tokens

    def allowed(self):
        if not self.tokens:
            raise EngineError("too much")
        mask = torch.zeros(VOCABULARY, dtype=torch.bool)
        mask[list(self.tokens)] = True
        return mask


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 1}])
def test_a_grammar_leaves_what_it_allows_and_other_rows_alone(device, fields):
    logits = logits_of(4, device)
    grammars = [None, Only(5, 6), Only(), Only(7)] * (ROWS // 4)
    held = [sampler(Sampling(**fields), device, i, logprobs=0, grammar=one) for i, one in enumerate(grammars)]
    picks = choose_rows(logits, held, range(ROWS))
    free = choose_rows(logits, [sampler(Sampling(**fields), device, i, logprobs=0) for i in range(ROWS)], range(ROWS))
    own = torch.log_softmax(logits, -1)
    for row, (grammar, pick) in enumerate(zip(grammars, picks, strict=True)):
        if grammar is None:
            assert_same(pick, free[row])
        elif grammar.tokens:
            assert pick.token in grammar.tokens
            assert pick.logprob.logprob == pytest.approx(float(own[row, pick.token]), abs=1e-4)
        else:
            assert isinstance(pick, EngineError)
