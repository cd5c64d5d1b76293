"""Tests of advantages against their formulas."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.rl.advantages import (
    centered,
    generalized_advantages,
    group_advantages,
    informative,
    leave_one_out,
    overlong_penalty,
    standardized,
)
from alignment.rounding import EXACT

REWARDS = [1.0, 4.0, None, 2.0, 7.0, 7.0, 3.0, None, 5.0]
GROUPS = ["a", "b", "a", "a", "c", "c", "a", "d", "b"]


def by_hand(rule: str) -> list[float]:
    result = []
    for place, (reward, group) in enumerate(zip(REWARDS, GROUPS)):
        peers = [r for r, g in zip(REWARDS, GROUPS) if g == group and r is not None]
        others = [
            r
            for other, (r, g) in enumerate(zip(REWARDS, GROUPS))
            if g == group and r is not None and other != place
        ]
        if reward is None or not others:
            result.append(0.0)
        elif rule == "leave_one_out":
            result.append(reward - statistics.mean(others))
        else:
            spread = statistics.stdev(peers) if rule == "standardized" else 1.0
            result.append((reward - statistics.mean(peers)) / spread if spread else 0.0)
    return result


@pytest.mark.parametrize("rule", [standardized, centered, leave_one_out])
def test_group_advantages_with_missing_rewards_in_any_order(rule) -> None:
    result = group_advantages(REWARDS, GROUPS, rule)
    np.testing.assert_allclose(result, by_hand(rule.__name__), atol=1e-12)


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_advantages_of_equal_rewards_are_0(reward: float, count: int) -> None:
    assert not group_advantages([reward] * count, [0] * count).any()


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=16))
def test_standardized_advantages_have_mean_0_and_deviation_1(rewards: list[float]) -> None:
    result = group_advantages(rewards, [0] * len(rewards))
    assert abs(result.sum()) < 1e-6
    assert not result.any() or math.isclose(result.std(ddof=1), 1, rel_tol=1e-6)


RULES = [standardized, centered, leave_one_out]
NOISE = [3.9309329, 3.9309329, 3.9309351, 3.9309307]  # of padding, in fp32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e5])
def test_advantages_of_rewards_that_differ_by_rounding_are_0(rule, unit) -> None:
    rewards = [reward * unit for reward in NOISE]
    assert not group_advantages(rewards, [0] * 4, rule).any()
    assert not informative(rewards, [0] * 4).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "rewards",
    [[0.30, 0.31], [7, 7.01, 7], [0.0, 1e-3], [1e-6, 2e-6, 3e-6], [10**6, 10**6 + 1], [1e-200, 0]],
)
def test_advantages_of_rewards_with_small_differences_are_not_0(rule, rewards) -> None:
    assert informative(rewards, [0] * len(rewards)).all()
    result = group_advantages(rewards, [0] * len(rewards), rule)
    if rule is standardized:
        assert result.std(ddof=1) == pytest.approx(1)
    assert result.any() and np.argsort(result).tolist() == np.argsort(rewards).tolist()


def test_advantages_depend_on_the_rounding_error_of_rewards() -> None:
    groups = [0] * 4
    exact = group_advantages(NOISE, groups, errors=[0.0] * 4)
    assert exact == pytest.approx(
        (np.array(NOISE) - np.mean(NOISE)) / np.std(NOISE, ddof=1), rel=1e-6
    )
    assert informative(NOISE, groups, [0.0] * 4).all()
    coarse = [7.0, 7.01, 7.02, 7.0]  # of a model in bf16
    assert group_advantages(coarse, groups).any() and informative(coarse, groups).any()
    assert not group_advantages(coarse, groups, errors=[7 / 256] * 4).any()
    assert not informative(coarse, groups, [7 / 256] * 4).any()
    # Win rates that are equal, from sums in another order.
    assert not informative([1 - 5 / 6, 1 / 6], [0, 0], [EXACT] * 2).any()


def test_advantages_of_equal_rewards_with_an_overlong_penalty() -> None:
    shaped = [reward + penalty for reward, penalty in zip(NOISE, (0, -0.5, 0, 0))]
    errors = [4e-5] * 4
    assert not informative(NOISE, [0] * 4, errors).any()
    assert group_advantages(shaped, [0] * 4, errors=errors)[1] == pytest.approx(-1.5, rel=1e-4)


def test_advantages_of_an_infinite_reward_are_refused() -> None:
    with pytest.raises(ValueError, match="response 1 is nan"):
        group_advantages([1.0, math.nan], [0, 0])
    with pytest.raises(ValueError, match="1 rewards of 2 responses"):
        group_advantages([1.0], [0, 0])


def test_informative_groups_have_rewards_that_differ() -> None:
    retained = informative(REWARDS, GROUPS)
    assert [group for group, keep in zip(GROUPS, retained) if keep] == list("abaaab")


def test_overlong_penalty_falls_within_the_margin() -> None:
    result = overlong_penalty([10, 80, 85, 95, 100, 200], limit=100, margin=20)
    np.testing.assert_allclose(result, [0, 0, -0.25, -0.75, -1, -1])
    with pytest.raises(ValueError, match="margin 0"):
        overlong_penalty([1], 10, 0)


@pytest.mark.parametrize("discount, trace", [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_generalized_advantages_are_the_sum_of_discounted_errors(discount, trace) -> None:
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=7), generator.normal(size=7)
    after = [*values[1:], 0.0]
    errors = [r + discount * n - v for r, n, v in zip(rewards, after, values)]
    hand = [
        sum((discount * trace) ** (later - now) * errors[later] for later in range(now, 7))
        for now in range(7)
    ]
    advantages, returns = generalized_advantages(rewards, values, discount, trace)
    np.testing.assert_allclose(advantages, hand)
    np.testing.assert_allclose(returns, hand + values)
