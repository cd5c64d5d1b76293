"""Tests of strengths against scikit-learn, on simulated policies, and without a maximum."""

from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from alignment.statistics.bradley_terry import fitting_perfectly, maximum_likelihood, strengths


def simulated(seed: int, n: int, true: list[float], weights: list[float]) -> tuple[Any, Any, Any]:
    """Return policies, outcomes of two games each, and style."""
    draw = np.random.default_rng(seed)
    policies = np.repeat(np.arange(len(true)), n)
    # A stronger policy writes longer: without control, style passes for strength.
    style = draw.normal(size=(len(policies), len(weights))) + 0.5 * np.array(true)[policies, None]
    wins = expit(np.array(true)[policies] + style @ np.array(weights))
    return policies, draw.binomial(2, wins) / 2, style


def by_sklearn(design: Any, outcomes: Any) -> Any:
    """Return scikit-learn's fit, in which a share counts as that many wins and losses."""
    twice = np.vstack([design, design])
    labels = np.repeat([1, 0], len(outcomes))
    shares = np.concatenate([outcomes, 1 - outcomes])
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    return model.fit(twice, labels, sample_weight=shares).coef_[0]


@pytest.mark.parametrize("seed", range(3))
def test_strengths_equal_scikit_learn(seed: int) -> None:
    policies, outcomes, style = simulated(seed, 150, [0.8, -0.4, 0.1], [0.6, -0.3])
    alone = strengths(policies, outcomes, 3)
    rates = [outcomes[policies == policy].mean() for policy in range(3)]
    assert alone == pytest.approx(logit(rates), abs=1e-8)
    dummies = policies[:, None] == np.arange(3)
    assert alone == pytest.approx(by_sklearn(dummies, outcomes), abs=1e-4)
    both = strengths(policies, outcomes, 3, style)
    assert both == pytest.approx(by_sklearn(np.hstack([dummies, style]), outcomes), abs=1e-4)


def test_strengths_recover_simulated_strengths_and_style_weights() -> None:
    true, weights = [1.0, -0.5], [0.8, 0.4]
    policies, outcomes, style = simulated(0, 20_000, true, weights)
    assert strengths(policies, outcomes, 2, style) == pytest.approx(true + weights, abs=0.05)
    biased = strengths(policies, outcomes, 2)
    assert np.abs(biased - true).max() > 0.15


def test_strength_of_a_policy_that_always_wins_is_infinite() -> None:
    policies, outcomes, style = simulated(1, 100, [0.8, -0.4, 0.1, 0.0], [0.6])
    outcomes[policies == 1], outcomes[policies == 2] = 1.0, 0.0
    result = strengths(policies, outcomes, 4, style)
    assert result[1] == np.inf and result[2] == -np.inf
    others = np.isin(policies, [0, 3])
    design = np.hstack([policies[others, None] == [0, 3], style[others]])
    assert result[[0, 3, 4]] == pytest.approx(by_sklearn(design, outcomes[others]), abs=1e-4)


def test_style_that_only_winners_have_has_no_weight() -> None:
    policies, outcomes, style = simulated(2, 100, [0.3, -0.4], [0.5])
    rare = np.zeros(len(policies))
    rare[[3, 120]], outcomes[[3, 120]] = [2.0, 5.0], 1.0
    both = np.column_stack([style, rare])
    result = strengths(policies, outcomes, 2, both)
    assert np.isnan(result[3])
    # In the limit the two comparisons fit perfectly: the rest is as if they were not there.
    left = rare == 0
    design = np.hstack([policies[left, None] == np.arange(2), style[left]])
    assert result[:3] == pytest.approx(by_sklearn(design, outcomes[left]), abs=1e-4)
    # A loss with the same style, and there is a maximum again.
    rare[50], outcomes[50] = 3.0, 0.0
    both = np.column_stack([style, rare])
    design = np.hstack([policies[:, None] == np.arange(2), both])
    result = strengths(policies, outcomes, 2, both)
    assert result == pytest.approx(by_sklearn(design, outcomes), abs=1e-3)


def test_strengths_that_cannot_be_identified_are_undefined() -> None:
    policies, outcomes, _ = simulated(3, 50, [0.2, -0.3], [0.0])
    # The first policy is always longer by the same, and the second never is.
    constant = (policies == 0).astype(float)[:, None]
    result = strengths(policies, outcomes, 2, constant)
    assert np.isnan(result[[0, 2]]).all()
    assert result[1] == pytest.approx(logit(outcomes[policies == 1].mean()))
    # Style separates every win from every loss.
    sure = np.where(outcomes == 0.5, 0.0, outcomes - 0.5)[:, None]
    pure = outcomes != 0.5
    assert np.isnan(strengths(policies[pure], outcomes[pure], 2, sure[pure])).all()
    # A third policy that has no comparison takes nothing from the others.
    result = strengths(policies, outcomes, 3)
    assert np.isnan(result[2]) and result[:2] == pytest.approx(strengths(policies, outcomes, 2))


def test_strengths_distinguish_separation_from_large_logits() -> None:
    x = np.array([[-40.0], [-0.1], [0.1], [40.0]])
    assert fitting_perfectly(x, np.array([0.0, 0.0, 1.0, 1.0])).tolist() == [True] * 4
    crossed = np.array([0.0, 1.0, 0.0, 1.0])
    assert not fitting_perfectly(x, crossed).any()
    # The maximum has suspiciously large logits and is still reached.
    [weight] = maximum_likelihood(x * 3, crossed)
    slope = (x * 3)[:, 0] @ (crossed - expit(x[:, 0] * 3 * weight))
    assert slope == pytest.approx(0, abs=1e-6) and np.isfinite(weight)


@pytest.mark.parametrize("noise", [0.0, 1e-16, 3e-16])
def test_strengths_count_a_win_that_rounding_keeps_from_1(noise: float) -> None:
    policies = np.repeat([0, 1, 2], 20)
    outcomes = np.concatenate([np.ones(20) - noise, np.zeros(20) + noise, np.resize([1, 0.5], 20)])
    result = strengths(policies, outcomes, 3)
    assert result[0] == np.inf and result[1] == -np.inf
    assert result[2] == pytest.approx(logit(0.75))
    assert np.isfinite(strengths(policies, np.clip(outcomes, 1e-3, 1 - 1e-3), 3)).all()
