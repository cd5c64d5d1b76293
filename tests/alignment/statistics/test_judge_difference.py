"""Tests of paired differences between two judges, against scipy and against all permutations."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alignment.statistics.coefficients import krippendorff_alpha
from alignment.statistics.judge_difference import agreement_differences, judged_by_both
from alignment.statistics.verdict_alignment import AlignedVerdicts


def aligned(labels: Any, pairwise: bool = False) -> AlignedVerdicts:
    """Return one answer to each item in each order, with NaN where the judge failed."""
    labels = np.array(labels, dtype=np.float64)
    labels = labels[None] if labels.ndim == 2 else labels[None, None]
    failed = np.isnan(labels[0]).sum(axis=0).astype(float)
    calls = np.full(labels.shape[-1], float(labels.shape[1]))
    return AlignedVerdicts(pairwise, labels, calls, np.zeros_like(calls), failed, ())


def make_scores(items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    gold = draw.integers(0, 10, items).astype(float)
    return gold, gold + draw.normal(0, 2, items), gold + draw.normal(0, 1, items)


def compare(gold: Any, a: Any, b: Any, names: list[str], **settings: Any) -> Any:
    keys = settings.pop("keys", [str(i) for i in range(len(gold))])
    judges = (aligned(a), aligned(b))
    return agreement_differences(aligned(gold), judges, names, keys, **settings)


def test_exact_permutation_test_matches_scipy() -> None:
    gold, a, b = make_scores(9)
    names = ["absolute_error", "alpha_interval"]
    result = compare(gold, a, b, names, resamples=50, permutations=1000)

    def error(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.abs(y - gold).mean() - np.abs(x - gold).mean())

    p = stats.permutation_test(
        (a, b), lambda x, y: error(x, y), permutation_type="samples", n_resamples=np.inf,
        vectorized=False,
    ).pvalue  # fmt: skip
    assert result["absolute_error"].p == pytest.approx(p)
    assert result["absolute_error"].difference.value == pytest.approx(error(a, b))

    def alpha(x: np.ndarray) -> float:
        return krippendorff_alpha(np.stack([gold, x]), "interval")

    observed = abs(alpha(b) - alpha(a))
    differences = []
    for swap in itertools.product((False, True), repeat=9):
        x, y = np.where(swap, b, a), np.where(swap, a, b)
        differences.append(abs(alpha(y) - alpha(x)))
    share = np.mean([difference >= observed - 1e-12 for difference in differences])
    assert result["alpha_interval"].p == pytest.approx(share)


def test_sampled_permutation_test_is_near_the_exact_one() -> None:
    gold, a, b = make_scores(12, seed=3)
    exact = compare(gold, a, b, ["absolute_error"], resamples=1, permutations=2**12)
    sampled = compare(gold, a, b, ["absolute_error"], resamples=1, permutations=2000)
    p = exact["absolute_error"].p
    error = (p * (1 - p) / 2000) ** 0.5
    assert 0.01 < p < 0.99
    assert sampled["absolute_error"].p == pytest.approx(p, abs=5 * error)


def test_paired_interval_matches_scipys_bootstrap() -> None:
    gold, a, b = make_scores(60, seed=1)
    difference = compare(gold, a, b, ["absolute_error"], resamples=4000)[
        "absolute_error"
    ].difference
    changes = np.abs(b - gold) - np.abs(a - gold)
    reference = stats.bootstrap(
        (changes,), np.mean, n_resamples=4000, method="percentile", random_state=1
    )
    # The ends of both vary by Monte Carlo error only, a small part of the standard error.
    near = 0.15 * reference.standard_error
    assert difference.low == pytest.approx(reference.confidence_interval.low, abs=near)
    assert difference.high == pytest.approx(reference.confidence_interval.high, abs=near)
    unpaired = np.sqrt(np.var(np.abs(a - gold)) / 60 + np.var(np.abs(b - gold)) / 60)
    assert difference.high - difference.low != pytest.approx(4 * unpaired, rel=0.01)


def test_items_that_one_judge_failed_on_count_for_neither() -> None:
    gold, a, b = make_scores(20, seed=2)
    a[:3], b[5] = np.nan, np.nan
    judges = aligned(a), aligned(b)
    assert judged_by_both(*judges).tolist() == [3, 4, *range(6, 20)]
    result = compare(gold, a, b, ["absolute_error"], resamples=10)["absolute_error"]
    common = judged_by_both(*judges)
    assert result.first.value == pytest.approx(np.abs(a - gold)[common].mean())
    assert result.second.value == pytest.approx(np.abs(b - gold)[common].mean())


def test_equal_judges_have_no_difference() -> None:
    gold, a, _ = make_scores(30)
    result = compare(gold, a, a, ["alpha_interval", "exact"], resamples=50, permutations=100)
    for each in result.values():
        assert (each.difference.value, each.difference.low, each.difference.high) == (0, 0, 0)
        assert each.p == 1.0


def test_items_of_a_prompt_are_exchanged_together() -> None:
    """Copies of an item are no further evidence."""
    gold, a, b = make_scores(8, seed=5)
    alone = compare(gold, a, b, ["absolute_error"], resamples=1, permutations=1000)
    one, two, three = (np.tile(each, 3) for each in (gold, a, b))
    keys = [str(i) for i in range(8)] * 3
    copied = compare(one, two, three, ["absolute_error"], resamples=1, permutations=1000, keys=keys)
    assert copied["absolute_error"].p == alone["absolute_error"].p


def test_preferences_are_compared_by_accuracy() -> None:
    gold = aligned(np.tile([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], (2, 1)), pairwise=True)
    worse = aligned(np.tile([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], (2, 1)), pairwise=True)
    keys = [str(i) for i in range(6)]
    result = agreement_differences(gold, (worse, gold), ["accuracy"], keys, 50, permutations=100)[
        "accuracy"
    ]
    assert (result.first.value, result.second.value) == (0.5, 1.0)
    # Three items differ, all in one direction: two of eight exchanges are as extreme (McNemar).
    assert result.p == pytest.approx(stats.binomtest(3, 3).pvalue) == 0.25
