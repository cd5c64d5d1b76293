"""Agreement measures of scores and of preferences, as functions of a choice of items."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from alignment.rounding import Floats, nearest_whole
from alignment.statistics import coefficients
from alignment.statistics.bootstrap import Indices
from alignment.statistics.coefficients import Undefined
from alignment.statistics.verdict_alignment import FIRST, SECOND, TIED, AlignedVerdicts

Figure = Callable[[Indices], float]
TITLES: Mapping[str, str] = {
    "alpha_interval": "Krippendorff's α, interval",
    "alpha_nominal": "Krippendorff's α, nominal",
    "quadratic_kappa": "quadratic-weighted κ",
    "kappa": "Cohen's κ",
    "spearman": "Spearman's ρ",
    "kendall": "Kendall's τ-b",
    "accuracy": "answers for gold's side",
    "exact": "equal labels",
    "absolute_error": "mean absolute error",
    "bias": "bias (second - first)",
    "calibration_error": "calibration error",
    "malformed_rate": "malformed answers",
    "failed_rate": "failed calls",
    "self_consistency": "self-consistency",
    "alpha_between_samples": "α between samples",
    "tie_rate": "ties",
    "flip_rate": "position flips",
    "shown_first_rate": "preferences for the one shown first",
}
# Width of the bins for probabilities that the first response of a pair is better.
_PAIRWISE_BIN = 0.1


@dataclass(frozen=True)
class AgreementData:
    """Verdicts of two judges on the same items.

    Attributes:
        a: Verdicts of the first judge, which serves as the reference (gold).
        b: Verdicts of the second judge, which is measured.
        use_mean: Whether the label of an item is the mean of all answers instead of the first one.
    """

    a: AlignedVerdicts
    b: AlignedVerdicts
    use_mean: bool = False

    def labels(self) -> tuple[Floats, Floats]:
        """Return the labels of each judge, `[items]`; NaN where an item has none."""
        a, b = [judge.mean if self.use_mean else judge.single for judge in (self.a, self.b)]
        return a, b

    def agreement(self) -> dict[str, Figure]:
        """Return the measures that compare the judges, over the items that both judged."""
        a, b = self.labels()
        if self.a.pairwise:
            return self._of_preferences(a, b)
        labels_rounded = rounded(a), rounded(b)
        return {
            "alpha_interval": _both(_alpha("interval"), a, b),
            "alpha_nominal": _both(_alpha("nominal"), *labels_rounded),
            "quadratic_kappa": _both(
                _if_gold_varies(coefficients.quadratic_kappa), *labels_rounded
            ),
            "spearman": _both(coefficients.spearman, a, b),
            "kendall": _both(coefficients.kendall, a, b),
            "exact": _both(coefficients.exact, *labels_rounded),
            "absolute_error": _both(coefficients.absolute_error, a, b),
            "bias": _both(coefficients.bias, a, b),
            "calibration_error": _both(coefficients.calibration_error, a, b),
        }

    def _of_preferences(self, a: Floats, b: Floats) -> dict[str, Figure]:
        sides = as_sides(a), as_sides(b)
        probability = partial(coefficients.calibration_error, width=_PAIRWISE_BIN)
        return {
            "accuracy": partial(_accuracy, sides[0], self.b),
            "alpha_nominal": _both(_alpha("nominal"), *sides),
            "kappa": _both(_if_gold_varies(coefficients.kappa), *sides),
            "exact": _both(coefficients.exact, *sides),
            "calibration_error": _both(probability, self.a.mean, self.b.mean),
        }

    def calibration(self) -> list[tuple[float, float, int]]:
        """Return the calibration curve; see `coefficients.calibration` for its points."""
        a, b = (self.a.mean, self.b.mean) if self.a.pairwise else self.labels()
        labeled_by_both = ~np.isnan(a) & ~np.isnan(b)
        width = _PAIRWISE_BIN if self.a.pairwise else 1.0
        return coefficients.calibration(a[labeled_by_both], b[labeled_by_both], width)

    def confusion(self) -> tuple[list[float], np.ndarray]:
        """Return the confusion matrix of the two judges.

        Returns:
            The labels, and the number of items for each combination of the first judge's label
            (row) with the second judge's label (column), `[labels, labels]`.
        """
        a, b = self.labels()
        a, b = (as_sides(a), as_sides(b)) if self.a.pairwise else (rounded(a), rounded(b))
        labeled_by_both = ~np.isnan(a) & ~np.isnan(b)
        a, b = a[labeled_by_both], b[labeled_by_both]
        labels = np.union1d(a, b)
        if self.a.pairwise:
            labels = np.array([FIRST, TIED, SECOND])
        elif set(labels) <= set(range(10)):
            labels = np.arange(10.0)
        counts = np.zeros((len(labels), len(labels)), np.int64)
        places = {label: place for place, label in enumerate(labels)}
        for row, column in zip(a, b):
            counts[places[row], places[column]] += 1
        return [float(label) for label in labels], counts


def judge_measures(judge: AlignedVerdicts) -> dict[str, Figure]:
    """Return the measures of a single judge."""
    to_label = (lambda labels: labels) if judge.pairwise else rounded
    measures: dict[str, Figure] = {
        "malformed_rate": partial(_rate, judge.malformed, judge.verdicts),
        "failed_rate": partial(_rate, judge.failed, judge.verdicts),
        "self_consistency": lambda items: coefficients.repeats_agree(
            to_label(_repeats(judge, items))
        ),
        "alpha_between_samples": lambda items: coefficients.krippendorff_alpha(
            _repeats(judge, items), "nominal" if judge.pairwise else "interval"
        ),
    }
    if judge.pairwise:
        measures |= {
            "tie_rate": partial(_ties, judge),
            "flip_rate": partial(_flips, judge),
            "shown_first_rate": partial(_shown_first, judge),
        }
    return measures


def _if_gold_varies(kappa: Callable[[Floats, Floats], float]) -> Callable[[Floats, Floats], float]:
    """Return κ that is undefined if gold gives one label, for which it is 0 by construction."""

    def checked(a: Floats, b: Floats) -> float:
        if len(a) and coefficients.is_constant(a) and not coefficients.is_constant(b):
            raise Undefined(f"the first gives only the label {a[0]:g}, so that κ is always 0")
        return kappa(a, b)

    return checked


def rounded(scores: Floats) -> Floats:
    """Round scores to whole labels, halves up."""
    return nearest_whole(scores)


def as_sides(labels: Floats) -> Floats:
    """Map means of labels to the preferred side: `FIRST`, `TIED` or `SECOND`; NaN stays NaN."""
    return np.where(np.isnan(labels), np.nan, 0.5 + 0.5 * np.sign(labels - TIED))


def _alpha(metric: str) -> Callable[[Floats, Floats], float]:
    return lambda a, b: coefficients.krippendorff_alpha(np.stack([a, b]), metric)


def _both(measure: Callable[[Floats, Floats], float], a: Floats, b: Floats) -> Figure:
    """Return a measure of two arrays as a measure of items, over those that both judges judged."""

    def over_items(items: Indices) -> float:
        both = ~np.isnan(a[items]) & ~np.isnan(b[items])
        if not both.any():
            raise Undefined("no item that both judged")
        return measure(a[items][both], b[items][both])

    return over_items


def _rate(numerator: Floats, denominator: Floats, items: Indices) -> float:
    return float(numerator[items].sum() / denominator[items].sum())


def _repeats(judge: AlignedVerdicts, items: Indices) -> Floats:
    """Return the answers to each question, `[samples, orders x items]`."""
    return judge.labels[:, :, items].reshape(len(judge.labels), -1)


def _accuracy(side: Floats, judge: AlignedVerdicts, items: Indices) -> float:
    """Return the share of a judge's answers that prefer the right side; a tie is a wrong answer."""
    items = items[side[items] != TIED]
    answers = judge.labels[:, :, items]
    valid = ~np.isnan(answers) & ~np.isnan(side[items])
    if not valid.any():
        raise Undefined("the first prefers no side of any pair that the second judged")
    return float(((answers == side[items]) & valid).sum() / valid.sum())


def _ties(judge: AlignedVerdicts, items: Indices) -> float:
    answers = judge.labels[:, :, items]
    valid = ~np.isnan(answers)
    if not valid.any():
        raise Undefined("no judgement")
    return float((answers == TIED).sum() / valid.sum())


def _flips(judge: AlignedVerdicts, items: Indices) -> float:
    """Return the share of pairs, judged in both orders, whose preference changes with the order."""
    original, swapped = judge.labels[:, 0, items], judge.labels[:, 1, items]
    in_both_orders = ~np.isnan(original) & ~np.isnan(swapped)
    if not in_both_orders.any():
        raise Undefined("no pair was judged in both orders: annotate with --orders both")
    return float((np.abs(original - swapped) == 1).sum() / in_both_orders.sum())


def _shown_first(judge: AlignedVerdicts, items: Indices) -> float:
    """Return the share of preferences, ties apart, for the response that was shown first."""
    original, swapped = judge.labels[:, 0, items], judge.labels[:, 1, items]
    sides = (FIRST, SECOND)
    preferences = np.isin(original, sides).sum() + np.isin(swapped, sides).sum()
    if not preferences:
        raise Undefined("no side was preferred")
    return float(((original == FIRST).sum() + (swapped == SECOND).sum()) / preferences)
