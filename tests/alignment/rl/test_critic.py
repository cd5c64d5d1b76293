"""Tests of a critic's advantages when values have the rounding error of a model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignment.engines.batch import TokenBatch, TokenSample
from tests.distributed import run_ranks

LENGTHS = [3, 5, 2, 4]


def judged(rewards, values, dtype):
    """Return the advantages of the trained tokens and the metrics, with values of a critic."""
    from alignment.rl.critic import Critic, CriticSettings

    samples = [
        TokenSample([1] * (2 + length), 2, {"reward": reward})
        for length, reward in zip(LENGTHS, rewards)
    ]
    batch = TokenBatch.of(samples)
    table = torch.zeros(batch.tokens.shape)
    table[batch.loss_mask] = torch.tensor(values)
    engine: Any = SimpleNamespace(
        dtype=dtype, data_rank=0, data_size=1, values=lambda batch, token, trained_only: table,
        parameters=lambda: iter([("lm_head.weight", torch.ones(8, 2))]),
        load_parameters=lambda tensors: list(tensors),
    )  # fmt: skip
    critic = Critic(engine, {1}, CriticSettings(gae_lambda=1.0))
    [result], row = critic.compute_advantages([batch])
    return result.extras["advantage"][batch.loss_mask].double().numpy(), row


def of_rank(cases):
    return [judged(*case) for case in cases]


def test_critic_advantages_are_whitened_unless_they_are_rounding():
    draw = np.random.default_rng(0)
    count = sum(LENGTHS)
    exact = np.full(count, 5.0)
    noisy = exact * (1 + draw.uniform(-2e-7, 2e-7, count))
    coarse = exact * (1 + draw.uniform(-2e-3, 2e-3, count))
    far = exact + draw.normal(0, 0.1, count)
    fp32, bf16 = torch.float32, torch.bfloat16
    equal, better = [5.0] * 4, [5.0, 5.01, 5.0, 4.99]
    cases = [
        (equal, [0.0] * count, fp32), (equal, noisy.tolist(), fp32),
        (equal, coarse.tolist(), bf16), (equal, coarse.tolist(), fp32),
        (equal, far.tolist(), bf16), (better, noisy.tolist(), fp32),
    ]  # fmt: skip
    [result] = run_ranks(of_rank, 1, cases)
    for (rewards, values, dtype), (advantages, row) in zip(cases, result):
        raw = np.repeat(rewards, LENGTHS) - np.float32(values)  # with lambda 1 and no discount
        if raw.std() < 1e-2 and ((rewards is equal and dtype is bf16) or raw.std() < 1e-5):
            assert not advantages.any()
        else:
            hand = (raw - raw.mean()) / raw.std(ddof=1)
            assert advantages == pytest.approx(hand, abs=2e-3)
        returns = np.repeat(rewards, LENGTHS)
        explained = 1 - raw.var() / returns.var() if rewards is better else 0.0
        assert row["explained_variance"] == pytest.approx(explained, abs=1e-2)
    assert [bool(advantages.any()) for advantages, _ in result] == [False] * 3 + [True] * 3
