"""Coefficients of agreement between numeric labels.

In a pair of arrays, `a` has the labels of the reference (the gold judge) and `b` those of the
measured judge, both `[units]`. Labels that differ by rounding alone are equal (see
`alignment.rounding`). Where a coefficient has no meaning, the functions raise `Undefined` instead
of returning 0 or NaN.
"""

from typing import Any

import numpy as np
from scipy import stats

from alignment.rounding import Floats, is_constant, nearest_whole, tied


class Undefined(Exception):
    """Error with the reason why a measure has no value for these labels."""


def _check(a: Floats) -> None:
    if not a.size:
        raise Undefined("no item that both judged")


def krippendorff_alpha(ratings: Floats, metric: str) -> float:
    """Return Krippendorff's α = 1 - observed / expected disagreement.

    Args:
        ratings: Labels, `[raters, units]`; NaN where a rater gave none. Units with fewer than two
            labels do not count.
        metric: "interval", where disagreement is a squared difference, or "nominal", where it is
            1 for any two labels that differ.

    Raises:
        Undefined: No unit has two labels, or all labels are the same.
    """
    count = np.sum(~np.isnan(ratings), axis=0)
    ratings, count = ratings[:, count > 1], count[count > 1]
    if not ratings.size:
        raise Undefined("no item has two labels")
    pooled = ratings[~np.isnan(ratings)]
    if is_constant(pooled):
        raise Undefined(f"all labels are {pooled[0]:g}")
    n = len(pooled)
    if metric == "interval":
        ratings = ratings - pooled.mean()
        within = 2 * (count * np.nansum(ratings**2, axis=0) - np.nansum(ratings, axis=0) ** 2)
        expected = 2 * n * float(((pooled - pooled.mean()) ** 2).sum())
    else:
        [ratings] = tied(ratings)
        labels, sizes = np.unique(ratings[~np.isnan(ratings)], return_counts=True)
        within = count**2.0 - sum(np.sum(ratings == label, axis=0) ** 2.0 for label in labels)
        expected = n**2.0 - float((sizes.astype(float) ** 2).sum())
    observed = float((within / (count - 1)).sum()) / n
    return 1.0 - observed / (expected / (n * (n - 1)))


def quadratic_kappa(a: Floats, b: Floats) -> float:
    """Return Cohen's κ weighted by squared differences.

    Raises:
        Undefined: There is no label, or all labels are the same.
    """
    _check(a)
    if is_constant(np.concatenate([a, b])):
        raise Undefined(f"all labels are {a[0]:g}")
    expected = float(a.var() + b.var() + (a.mean() - b.mean()) ** 2)
    return 1.0 - float(((a - b) ** 2).mean()) / expected


def kappa(a: Floats, b: Floats) -> float:
    """Return Cohen's κ without weights.

    Raises:
        Undefined: There is no label, or all labels are the same.
    """
    _check(a)
    a, b = tied(a, b)
    labels = np.union1d(a, b)
    chance = sum(float((a == label).mean() * (b == label).mean()) for label in labels)
    if len(labels) == 1:
        raise Undefined(f"all labels are {a[0]:g}")
    return (float((a == b).mean()) - chance) / (1.0 - chance)


def spearman(a: Floats, b: Floats) -> float:
    """Return Spearman's rank correlation.

    Raises:
        Undefined: There is no label, or all labels of a judge are the same.
    """
    _check_varies(a, b)
    return float(stats.spearmanr(*tied(a), *tied(b)).statistic)


def kendall(a: Floats, b: Floats) -> float:
    """Return Kendall's τ-b, which accounts for ties.

    Raises:
        Undefined: There is no label, or all labels of a judge are the same.
    """
    _check_varies(a, b)
    return float(stats.kendalltau(*tied(a), *tied(b)).statistic)


def _check_varies(a: Floats, b: Floats) -> None:
    _check(a)
    for name, labels in (("the first", a), ("the second", b)):
        if is_constant(labels):
            raise Undefined(f"{name} gives only the label {labels[0]:g}, so that there is no order")


def exact(a: Floats, b: Floats) -> float:
    """Return the share of equal labels."""
    _check(a)
    a, b = tied(a, b)
    return float((a == b).mean())


def absolute_error(a: Floats, b: Floats) -> float:
    """Return the mean absolute difference, in units of the labels."""
    _check(a)
    return float(np.abs(a - b).mean())


def bias(a: Floats, b: Floats) -> float:
    """Return the mean of b - a, in units of the labels."""
    _check(a)
    return float((b - a).mean())


def calibration(a: Floats, b: Floats, width: float = 1.0) -> list[tuple[float, float, int]]:
    """Return the calibration curve of b against a.

    Args:
        a: Labels of the reference, `[units]`.
        b: Labels of the measured judge, `[units]`.
        width: Width of a bin of b; bins are centered on multiples of it.

    Returns:
        The mean of b, the mean of a and the number of units of each bin that is not empty.
    """
    bins = nearest_whole(b / width)
    return [
        (float(b[bins == x].mean()), float(a[bins == x].mean()), int((bins == x).sum()))
        for x in np.unique(bins)
    ]


def calibration_error(a: Floats, b: Floats, width: float = 1.0) -> float:
    """Return the expected calibration error, in units of the labels.

    It is the mean over units of the distance between the means of `a` and of `b` in their bin.

    Raises:
        Undefined: There is no label.
    """
    _check(a)
    curve = calibration(a, b, width)
    return sum(abs(mean_a - mean_b) * count for mean_b, mean_a, count in curve) / len(a)


def repeats_agree(ratings: Floats) -> float:
    """Return the share of equal pairs of answers to the same question, as a mean over questions.

    Args:
        ratings: Answers, `[samples, questions]`; NaN where there is none.

    Raises:
        Undefined: No question has two answers.
    """
    count = np.sum(~np.isnan(ratings), axis=0)
    ratings, count = ratings[:, count > 1], count[count > 1]
    if not ratings.size:
        raise Undefined("no question was answered twice: ask with --samples 2 or more")
    [ratings] = tied(ratings)
    labels = np.unique(ratings[~np.isnan(ratings)])
    equal = sum(_pairs(np.sum(ratings == label, axis=0)) for label in labels)
    return float(np.mean(equal / _pairs(count)))


def _pairs(count: Any) -> Any:
    return count * (count - 1) / 2
