"""Tests of agreement coefficients against krippendorff, scikit-learn and pandas."""

from collections.abc import Iterator

import krippendorff
import numpy as np
import pytest
from scipy.stats import kendalltau, rankdata, spearmanr
from sklearn.metrics import cohen_kappa_score

from alignment.statistics import coefficients
from alignment.statistics.bootstrap import Estimate, estimates
from alignment.statistics.coefficients import Floats, Undefined


def pairs_of_labels() -> Iterator[tuple[Floats, Floats]]:
    """Draw labels of two judges over 2 to 40 items, with little to perfect agreement."""
    draw = np.random.default_rng(0)
    for number in range(60):
        size, most = int(draw.integers(2, 41)), int(draw.integers(2, 11))
        a = draw.integers(0, most, size)
        b = np.where(draw.random(size) < number / 60, a, draw.integers(0, most, size))
        if np.ptp(a) and np.ptp(b):
            yield a.astype(float), b.astype(float)


def matrices() -> Iterator[Floats]:
    """Draw ratings with gaps, `[raters, units]`."""
    draw = np.random.default_rng(1)
    for number in range(60):
        shape = draw.integers(2, 5), draw.integers(1, 13)
        labels = draw.choice([0.0, 1.0, 2.0, 7.0][: 1 + number % 4], size=shape)
        yield np.where(draw.random(shape) < 0.3, np.nan, labels)


def test_alpha_equals_krippendorff_with_any_raters_and_gaps() -> None:
    compared = 0
    for matrix in matrices():
        paired = matrix[:, (~np.isnan(matrix)).sum(axis=0) > 1]
        several = len(np.unique(paired[~np.isnan(paired)])) > 1
        for metric in ("interval", "nominal"):
            if several:
                theirs = krippendorff.alpha(matrix, level_of_measurement=metric)
                ours = coefficients.krippendorff_alpha(matrix, metric)
                assert ours == pytest.approx(theirs, abs=1e-9)
                compared += 1
            else:
                with pytest.raises(Undefined, match=r"all labels are|no item has two"):
                    coefficients.krippendorff_alpha(matrix, metric)
    assert compared > 60


def test_coefficients_treat_labels_that_differ_by_rounding_as_equal() -> None:
    """Scores with ties, scored again in other batches, have the same coefficients."""
    draw = np.random.default_rng(2)
    for _ in range(20):
        a, b = (np.round(draw.uniform(0.5, 9, 30), 1) for _ in range(2))
        b[:10] = a[:10]
        noisy = [x * (1 + draw.uniform(-1e-6, 1e-6, 30)) for x in (a, b)]
        assert coefficients.spearman(*noisy) == pytest.approx(float(spearmanr(a, b).statistic))
        assert coefficients.kendall(*noisy) == pytest.approx(float(kendalltau(a, b).statistic))
        assert coefficients.exact(*noisy) == float((a == b).mean()) > 0.3
        labels = [[str(x) for x in side] for side in (a, b)]
        assert coefficients.kappa(*noisy) == pytest.approx(cohen_kappa_score(*labels))
        theirs = krippendorff.alpha(np.stack([a, b]), level_of_measurement="nominal")
        assert coefficients.krippendorff_alpha(np.stack(noisy), "nominal") == pytest.approx(theirs)
        pairs = np.stack([noisy[0], noisy[0][::-1] * 0 + a])
        assert coefficients.repeats_agree(pairs) == 1


def test_coefficients_of_labels_constant_up_to_rounding_are_undefined() -> None:
    constant = np.array([3.9309329, 3.9309351, 3.9309307])
    other = np.array([1.0, 2.5, 4.0])
    for figure in (coefficients.spearman, coefficients.kendall):
        for labels in ((constant, other), (other, constant)):
            with pytest.raises(
                Undefined, match=r"gives only the label 3\.93093, so that there is no order"
            ):
                figure(*labels)
    for metric in ("interval", "nominal"):
        with pytest.raises(Undefined, match=r"all labels are 3\.93093"):
            coefficients.krippendorff_alpha(np.stack([constant, constant[::-1]]), metric)
    for agreement in (coefficients.quadratic_kappa, coefficients.kappa):
        with pytest.raises(Undefined, match=r"all labels are 3\.93093"):
            agreement(constant, constant[::-1])
    assert coefficients.spearman(np.array([7.0, 7.01, 7.02]), other) == 1


def test_calibration_bins_do_not_depend_on_rounding() -> None:
    b = np.array([0.05, 0.15, 0.25, 0.35, 0.45])  # each begins a bin of 0.1
    for noise in (0.0, 1e-7, -1e-7):
        curve = coefficients.calibration(b, b + noise, 0.1)
        assert [count for _, _, count in curve] == [1] * 5


def test_kappas_equal_scikit_learn() -> None:
    for a, b in pairs_of_labels():
        whole = a.astype(int), b.astype(int)
        # With all labels named, for scikit-learn weighs by rank among the labels.
        theirs = cohen_kappa_score(*whole, labels=range(10), weights="quadratic")
        assert coefficients.quadratic_kappa(a, b) == pytest.approx(theirs, abs=1e-9)
        assert coefficients.kappa(a, b) == pytest.approx(cohen_kappa_score(*whole), abs=1e-9)


def test_rank_correlations_equal_their_definitions() -> None:
    for a, b in pairs_of_labels():
        ranks = np.corrcoef(rankdata(a), rankdata(b))[0, 1]
        assert coefficients.spearman(a, b) == pytest.approx(ranks, abs=1e-9)
        signs = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
        untied = np.sqrt((a[:, None] != a).sum() * (b[:, None] != b).sum())
        assert coefficients.kendall(a, b) == pytest.approx(signs.sum() / untied, abs=1e-9)


def test_calibration_error_equals_that_of_grouped_items() -> None:
    for a, b in pairs_of_labels():
        b = b + np.linspace(-0.45, 0.45, len(b))
        error = 0.0
        for x in range(10):
            group = [(g, p) for g, p in zip(a, b) if round(p) == x]
            error += abs(sum(g - p for g, p in group))
        assert coefficients.calibration_error(a, b) == pytest.approx(error / len(a), abs=1e-9)


def test_self_consistency_equals_the_count_of_pairs() -> None:
    for matrix in matrices():
        shares = []
        for column in matrix.T:
            there = [x for x in column if not np.isnan(x)]
            pairs = [(x, y) for i, x in enumerate(there) for y in there[:i]]
            if pairs:
                shares.append(np.mean([x == y for x, y in pairs]))
        if shares:
            assert coefficients.repeats_agree(matrix) == pytest.approx(np.mean(shares))
        else:
            with pytest.raises(Undefined, match="--samples 2"):
                coefficients.repeats_agree(matrix)


@pytest.mark.parametrize(
    "figure, a, b, message",
    [
        (coefficients.quadratic_kappa, [7, 7], [7, 7], "all labels are 7"),
        (coefficients.kappa, [7, 7], [7, 7], "all labels are 7"),
        (coefficients.spearman, [1, 2], [5, 5], "the second gives only the label 5"),
        (coefficients.kendall, [5, 5], [1, 2], "the first gives only the label 5"),
        (coefficients.exact, [], [], "no item that both judged"),
        (coefficients.calibration_error, [], [], "no item that both judged"),
    ],
)
def test_coefficients_without_a_value_are_undefined_with_a_reason(figure, a, b, message) -> None:
    with pytest.raises(Undefined, match=message):
        figure(np.array(a, dtype=float), np.array(b, dtype=float))


def test_kappa_of_a_constant_judge_is_0() -> None:
    a, b = np.arange(10.0), np.full(10, 4.0)
    assert coefficients.quadratic_kappa(a, b) == pytest.approx(0, abs=1e-12)
    assert coefficients.krippendorff_alpha(np.stack([a, b]), "interval") == pytest.approx(
        0, abs=0.05
    )


def interval(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


def test_bootstrap_intervals_cover_the_truth_at_their_level() -> None:
    draw = np.random.default_rng(1)
    covered, widths = 0, []
    for seed in range(60):
        values = draw.normal(3.0, 1.0, 60)

        def mean(places: np.ndarray, values: Floats = values) -> float:
            return float(values[places].mean())

        groups = [np.array([i]) for i in range(60)]
        low, high = interval(estimates({"mean": mean}, groups, 150, seed)["mean"])
        covered += low < 3.0 < high
        widths.append(high - low)
    assert covered / 60 >= 0.85
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(60), rel=0.1)


def test_bootstrap_draws_items_of_one_prompt_together() -> None:
    values = np.repeat(np.random.default_rng(2).normal(size=20), 10)
    mean = {"mean": lambda at: float(values[at].mean())}
    together = [np.arange(10 * i, 10 * i + 10) for i in range(20)]
    by_prompt = interval(estimates(mean, together, 400)["mean"])
    by_item = interval(estimates(mean, [np.array([i]) for i in range(200)], 400)["mean"])
    ratio = (by_prompt[1] - by_prompt[0]) / (by_item[1] - by_item[0])
    assert ratio == pytest.approx(np.sqrt(10), rel=0.2)


def test_bootstrap_counts_resamples_without_a_value() -> None:
    def share(positive: int):
        labels = np.array([1.0] * positive + [0.0] * (40 - positive))

        def figure(at):
            if not labels[at].any():
                raise Undefined("one class")
            return float(labels[at].mean())

        groups = [np.array([i]) for i in range(40)]
        return estimates({"share": figure}, groups, 1000)["share"]

    some = share(3)  # a resample misses all three with a probability of 4.6 %
    assert 20 < some.undefined < 80 and some.low < some.value < some.high
    most = share(1)  # 36 %
    assert most.value == 1 / 40 and most.low is None and "undefined in" in most.reason
    none = share(0)
    assert none.value is None and none.reason == "one class"
