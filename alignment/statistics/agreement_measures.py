"""Which figures of agreement there are for scores and for preferences, over any choice of items."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from alignment.rounding import Floats, nearest_whole
from alignment.statistics import coefficients as figures
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
# Of probabilities that the first response of a pair is better.
_PAIRWISE_BIN = 0.1


@dataclass(frozen=True)
class AgreementData:
    """Two judges over the same items.

    Attributes:
        a: held to be right.
        use_mean: an item's label is the mean of all answers, not the first answer.
    """

    a: AlignedVerdicts
    b: AlignedVerdicts
    use_mean: bool = False

    def labels(self) -> tuple[Floats, Floats]:
        """A label of each judge for each item, NaN where there is none, `[items]`."""
        a, b = [judge.mean if self.use_mean else judge.single for judge in (self.a, self.b)]
        return a, b

    def agreement(self) -> dict[str, Figure]:
        """Figures of both, over items that both judged."""
        a, b = self.labels()
        if self.a.pairwise:
            return self._of_preferences(a, b)
        whole = rounded(a), rounded(b)
        return {
            "alpha_interval": _both(_alpha("interval"), a, b),
            "alpha_nominal": _both(_alpha("nominal"), *whole),
            "quadratic_kappa": _both(figures.quadratic_kappa, *whole),
            "spearman": _both(figures.spearman, a, b),
            "kendall": _both(figures.kendall, a, b),
            "exact": _both(figures.exact, *whole),
            "absolute_error": _both(figures.absolute_error, a, b),
            "bias": _both(figures.bias, a, b),
            "calibration_error": _both(figures.calibration_error, a, b),
        }

    def _of_preferences(self, a: Floats, b: Floats) -> dict[str, Figure]:
        sides = as_sides(a), as_sides(b)
        probability = partial(figures.calibration_error, width=_PAIRWISE_BIN)
        return {
            "accuracy": partial(_accuracy, sides[0], self.b),
            "alpha_nominal": _both(_alpha("nominal"), *sides),
            "kappa": _both(figures.kappa, *sides),
            "exact": _both(figures.exact, *sides),
            "calibration_error": _both(probability, self.a.mean, self.b.mean),
        }

    def calibration(self) -> list[tuple[float, float, int]]:
        """The curve behind the calibration error; see `figures.calibration`."""
        a, b = (self.a.mean, self.b.mean) if self.a.pairwise else self.labels()
        there = ~np.isnan(a) & ~np.isnan(b)
        width = _PAIRWISE_BIN if self.a.pairwise else 1.0
        return figures.calibration(a[there], b[there], width)

    def confusion(self) -> tuple[list[float], np.ndarray]:
        """Labels, and how often the first judge gave the row's and the second the column's."""
        a, b = self.labels()
        a, b = (as_sides(a), as_sides(b)) if self.a.pairwise else (rounded(a), rounded(b))
        there = ~np.isnan(a) & ~np.isnan(b)
        a, b = a[there], b[there]
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


def alone(judge: AlignedVerdicts) -> dict[str, Figure]:
    """Figures of one judge by itself."""
    whole = (lambda labels: labels) if judge.pairwise else rounded
    found: dict[str, Figure] = {
        "malformed_rate": partial(_rate, judge.malformed, judge.verdicts),
        "failed_rate": partial(_rate, judge.failed, judge.verdicts),
        "self_consistency": lambda items: figures.repeats_agree(whole(_repeats(judge, items))),
        "alpha_between_samples": lambda items: figures.krippendorff_alpha(
            _repeats(judge, items), "nominal" if judge.pairwise else "interval"
        ),
    }
    if judge.pairwise:
        found |= {
            "tie_rate": partial(_ties, judge),
            "flip_rate": partial(_flips, judge),
            "shown_first_rate": partial(_shown_first, judge),
        }
    return found


def rounded(scores: Floats) -> Floats:
    """To whole labels, halves up."""
    return nearest_whole(scores)


def as_sides(labels: Floats) -> Floats:
    """Which side a mean of labels is on."""
    return np.where(np.isnan(labels), np.nan, 0.5 + 0.5 * np.sign(labels - TIED))


def _alpha(metric: str) -> Callable[[Floats, Floats], float]:
    return lambda a, b: figures.krippendorff_alpha(np.stack([a, b]), metric)


def _both(figure: Callable[[Floats, Floats], float], a: Floats, b: Floats) -> Figure:
    """Of the items among those asked for that both judged."""

    def over(items: Indices) -> float:
        there = ~np.isnan(a[items]) & ~np.isnan(b[items])
        if not there.any():
            raise Undefined("no item that both judged")
        return figure(a[items][there], b[items][there])

    return over


def _rate(part: Floats, of: Floats, items: Indices) -> float:
    return float(part[items].sum() / of[items].sum())


def _repeats(judge: AlignedVerdicts, items: Indices) -> Floats:
    """Answers to the same question, `[samples, orders x items]`."""
    return judge.labels[:, :, items].reshape(len(judge.labels), -1)


def _accuracy(side: Floats, judge: AlignedVerdicts, items: Indices) -> float:
    """Share of all answers of the judge that are for the side that is right; ties are not."""
    items = items[side[items] != TIED]
    answers = judge.labels[:, :, items]
    there = ~np.isnan(answers) & ~np.isnan(side[items])
    if not there.any():
        raise Undefined("the first prefers no side of any pair that the second judged")
    return float(((answers == side[items]) & there).sum() / there.sum())


def _ties(judge: AlignedVerdicts, items: Indices) -> float:
    answers = judge.labels[:, :, items]
    there = ~np.isnan(answers)
    if not there.any():
        raise Undefined("no judgement")
    return float((answers == TIED).sum() / there.sum())


def _flips(judge: AlignedVerdicts, items: Indices) -> float:
    """Share of pairs, judged in both orders, in which the orders prefer different responses."""
    given, swapped = judge.labels[:, 0, items], judge.labels[:, 1, items]
    there = ~np.isnan(given) & ~np.isnan(swapped)
    if not there.any():
        raise Undefined("no pair was judged in both orders: ask with --orders both")
    return float((np.abs(given - swapped) == 1).sum() / there.sum())


def _shown_first(judge: AlignedVerdicts, items: Indices) -> float:
    given, swapped = judge.labels[:, 0, items], judge.labels[:, 1, items]
    preferences = (np.isin(given, (FIRST, SECOND))).sum() + np.isin(swapped, (FIRST, SECOND)).sum()
    if not preferences:
        raise Undefined("no side was preferred")
    return float(((given == FIRST).sum() + (swapped == SECOND).sum()) / preferences)
