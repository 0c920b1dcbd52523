import math

import pytest
import torch

from loopmux.errors import BadRequestError, EngineError
from loopmux.messages import Sampling
from loopmux_worker.engine.sampling import Sampler, _adjusted, _mix, choose_rows, seed_of, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def sampler(sampling, seed=1, **more):
    return Sampler(sampling, seed=seed, vocabulary=len(LOGITS), **more)


def adjusted(chooser, device):
    return _adjusted(LOGITS.to(device).unsqueeze(0), [chooser], [None])[0].cpu()


def test_top_p_is_exact_where_the_first_candidates_do_not_hold_it(device):
    logits = torch.zeros(500, 5000, device=device)
    chooser = Sampler(Sampling(temperature=1.0, top_p=0.5), seed=3, vocabulary=5000, device=device)
    picks = [choose_rows(logits, [chooser] * 500, range(start, start + 500)) for start in range(0, 3000, 500)]
    tokens = {pick.token for batch in picks for pick in batch}
    # flat: half of 5000 tokens take part, and equals rank by id; 3000 draws find some 70 % of them
    assert 2300 < max(tokens) < 2500
    assert len(tokens) > 1500


def test_temperature_zero_is_greedy_and_a_tiny_one_nearly():
    assert sampler(Sampling(temperature=0)).choose(LOGITS, 0).token == 0
    for tiny in (1e-30, 1e-300, 5e-324):
        assert sampler(Sampling(temperature=tiny)).choose(LOGITS, 0).token == 0


def test_the_draw_depends_on_seed_and_position_alone():
    one, two = sampler(Sampling(temperature=1.0)), sampler(Sampling(temperature=1.0))
    forward = [one.choose(LOGITS, i).token for i in range(50)]
    backward = [two.choose(LOGITS, i).token for i in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [sampler(Sampling(temperature=1.0), seed=2).choose(LOGITS, i).token for i in range(50)]


def test_uniform_numbers_are_uniform_and_below_one():
    numbers = [uniform(seed, position) for seed in range(50) for position in range(100)]
    assert 0 <= min(numbers) < max(numbers) < 1
    buckets = torch.histc(torch.tensor(numbers), 10, 0, 1)
    assert torch.all((buckets - 500).abs() < 5 * math.sqrt(500))
    assert uniform(7, 3) == uniform(7, 3)


def test_uniform_numbers_are_those_of_splitmix64():
    """Known ones: a request that goes on at a worker of another release is to draw the same."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    gamma = 0x9E3779B97F4A7C15
    assert [_mix(1234567 + n * gamma) >> 11 for n in range(4)] == [number >> 11 for number in published]
    assert uniform(1234567, 2) == (_mix(_mix(1234567) + 2 * gamma) >> 11) / 2**53


def test_a_request_without_a_seed_has_the_same_one_in_every_attempt():
    assert seed_of(Sampling(), b"a" * 16) == seed_of(Sampling(), b"a" * 16) != seed_of(Sampling(), b"b" * 16)
    assert seed_of(Sampling(seed=5), b"a" * 16) == 5


def test_a_prompt_may_hold_ids_that_the_head_does_not_give(device):
    """An embedding can have more rows than the head has outputs."""
    wide = sampler(Sampling(repetition_penalty=2.0), prompt=[0, len(LOGITS), len(LOGITS) + 99], device=device)
    same = sampler(Sampling(repetition_penalty=2.0), prompt=[0], device=device)
    assert adjusted(wide, device).tolist() == adjusted(same, device).tolist() != LOGITS.tolist()


def test_penalties_by_their_formulas(device):
    chooser = sampler(Sampling(temperature=0, repetition_penalty=2.0), prompt=[0, 4], device=device)
    # token 0: 2.0 / 2 = 1.0 is no more than token 1's 1.0, and greedy takes the first best
    chooser.note(1)
    assert torch.equal(adjusted(chooser, device), torch.tensor([1.0, 0.5, 0.5, 0.0, -2.0, -3.0]))
    chooser = sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt=[2], device=device)
    for token in (0, 0, 1):
        chooser.note(token)
    assert torch.equal(adjusted(chooser, device), torch.tensor([1.0, 0.25, 0.5, 0.0, -1.0, -3.0]))


def test_logit_bias_moves_the_choice(device):
    chooser = sampler(Sampling(temperature=0, logit_bias={"5": 10.0}), device=device)
    assert chooser.choose(LOGITS.to(device), 0).token == 5
    with pytest.raises(BadRequestError, match=r"found token 6, expected ids below 6"):
        sampler(Sampling(logit_bias={"6": 1.0}))


@pytest.mark.parametrize(("logits", "best"), [(LOGITS, [0, 1]), (LOGITS.flip(0), [5, 4])])
def test_log_probabilities_are_the_models_own(logits, best, device):
    chooser = sampler(Sampling(temperature=0, logit_bias={"5": 10.0}), logprobs=2, device=device)
    pick = chooser.choose(logits.to(device), 0)
    reference = torch.log_softmax(logits, 0)
    assert pick.logprob.token == 5
    assert pick.logprob.logprob == pytest.approx(float(reference[5]))
    assert [token for token, _ in pick.logprob.top] == best
    assert pick.logprob.top[0][1] == pytest.approx(float(reference[best[0]]))
    assert sampler(Sampling(temperature=0)).choose(LOGITS, 0).logprob is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_with_the_position(bad):
    logits = LOGITS.clone()
    logits[3] = bad
    with pytest.raises(EngineError, match="position 7"):
        sampler(Sampling()).choose(logits, 7)


def test_impossible_tokens_are_never_drawn(device):
    logits = torch.full((6,), -torch.inf, device=device)
    logits[4] = 0.0
    chooser = sampler(Sampling(temperature=100.0), device=device)
    assert {chooser.choose(logits, i).token for i in range(200)} == {4}
