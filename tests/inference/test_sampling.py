"""Tests of the changes of logits in sampling against the logits processors of transformers."""

import pytest
import torch
from transformers.generation import logits_process as theirs

from megatron_ext.errors import UserError
from megatron_ext.inference.sampling import Sampling, adjust, choose

VOCAB = 50
PROMPT, TOKENS, ENDS = [3, 7, 7, 20], [20, 9, 9, 9], frozenset({1, 30})


def logits():
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))


def adjusted(tokens=TOKENS, **fields):
    return adjust(logits(), Sampling(**fields), PROMPT, tokens, ENDS)


def processed(*processors):
    """Return the result of transformers for the same logits."""
    ids, scores = torch.tensor([PROMPT + TOKENS]), logits().unsqueeze(0)
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0]


@pytest.mark.parametrize("penalty", [1.7, 0.5])
def test_repetition_penalty_equals_transformers(penalty):
    expected = processed(theirs.RepetitionPenaltyLogitsProcessor(penalty))
    assert torch.equal(adjusted(repetition_penalty=penalty), expected)
    assert not torch.equal(expected, logits())


def test_logit_bias_equals_transformers_and_comes_before_penalties():
    bias = ((7, 4.0), (40, -100.0))
    biased = theirs.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias])
    assert torch.equal(adjusted(logit_bias=bias), processed(biased))
    both = processed(biased, theirs.RepetitionPenaltyLogitsProcessor(1.5))
    assert torch.equal(adjusted(logit_bias=bias, repetition_penalty=1.5), both)


def test_end_tokens_are_impossible_before_min_tokens():
    for least in (4, 5):
        expected = processed(
            theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), least, list(ENDS))
        )
        result = adjusted(min_tokens=least)
        assert torch.equal(result, expected)
        assert result[list(ENDS)].isinf().all() == (least == 5)


def test_frequency_and_presence_penalties_count_the_continuation_alone():
    changed = adjusted(frequency_penalty=0.5, presence_penalty=0.25) - logits()
    expected = torch.zeros(VOCAB)
    expected[20], expected[9] = -0.75, -1.75
    torch.testing.assert_close(changed, expected, atol=1e-6, rtol=0)
    assert torch.equal(adjusted([], frequency_penalty=0.5, presence_penalty=0.25), logits())


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 0.1},
        {"min_p": 0.05, "temperature": 2.0},
        {"min_p": 0.02, "temperature": 1.5, "top_k": 9, "top_p": 0.8},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_sampled_tokens_follow_the_distribution_of_transformers(fields):
    warpers = [theirs.TemperatureLogitsWarper(fields.get("temperature", 1.0))]
    warpers += [theirs.MinPLogitsWarper(fields["min_p"])]
    if "top_k" in fields:
        warpers += [theirs.TopKLogitsWarper(fields["top_k"])]
        warpers += [theirs.TopPLogitsWarper(fields["top_p"])]
    expected = processed(*warpers).softmax(-1)
    draws = 4000
    generators = [torch.Generator().manual_seed(i) for i in range(draws)]
    chosen = choose(logits().expand(draws, -1), Sampling(**fields), generators)
    shares = torch.bincount(chosen, minlength=VOCAB) / draws
    assert set(chosen.tolist()) <= set(expected.nonzero().flatten().tolist())
    # Four standard deviations of a share.
    bound = 4 * (expected * (1 - expected) / draws).sqrt() + 1e-9
    assert ((shares - expected).abs() <= bound).all()


def test_sampling_at_a_temperature_near_0_takes_the_likeliest_token():
    for temperature in (1e-3, 1e-300):
        sampling = Sampling(temperature=temperature)
        [chosen] = choose(logits().unsqueeze(0), sampling, [torch.Generator()])
        assert chosen == logits().argmax()


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 1.5},
        {"min_p": float("nan")},
        {"min_tokens": -1},
        {"min_tokens": 65},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
    ],
    ids=str,
)
def test_sampling_refusals_name_the_field(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        Sampling(**fields)
