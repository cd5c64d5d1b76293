"""Difference in agreement with gold between two judges of the same items, with interval and test.

Both judges are measured on the items where each judged every question: an item on which one of them
fails must not count for the other, as it may be a hard one.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.rounding import Floats, tolerance
from alignment.statistics.agreement_measures import AgreementData
from alignment.statistics.bootstrap import Estimate, Indices, estimates
from alignment.statistics.coefficients import Undefined
from alignment.statistics.verdict_alignment import AlignedVerdicts, groups_of


@dataclass(frozen=True)
class AgreementDifference:
    """Agreement of two judges with gold, and its paired difference.

    Attributes:
        first: Agreement of the first judge.
        second: Agreement of the second judge.
        difference: Agreement of the second judge minus that of the first.
        p: Two-sided p-value of the permutation test that both judges are exchangeable; None where
            it was not tested, or the difference is undefined.
    """

    first: Estimate
    second: Estimate
    difference: Estimate
    p: float | None = None


def judged_by_both(first: AlignedVerdicts, second: AlignedVerdicts) -> Indices:
    """Return the indices of the items where both judges judged every question."""
    unjudged = first.malformed + first.failed + second.malformed + second.failed
    return np.flatnonzero(unjudged == 0)


def compared_items(
    gold: AlignedVerdicts, judges: tuple[AlignedVerdicts, AlignedVerdicts], use_mean: bool = False
) -> Indices:
    """Return the indices of the items that have a label of gold and that both judges judged.

    Args:
        gold: Verdicts of the gold judge.
        judges: Verdicts of the two judges on the same items.
        use_mean: Whether the label of an item is the mean of its answers instead of the first one.
    """
    labeled = ~np.isnan(gold.mean if use_mean else gold.single)
    both = judged_by_both(*judges)
    return both[labeled[both]]


def agreement_differences(
    gold: AlignedVerdicts,
    judges: tuple[AlignedVerdicts, AlignedVerdicts],
    names: Sequence[str],
    keys: Sequence[str],
    resamples: int,
    *,
    seed: int = 0,
    permutations: int = 0,
    use_mean: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, AgreementDifference]:
    """Compare the agreement of two judges with gold, on the items that all three judged.

    The interval of a difference is a paired bootstrap: each resample draws items with the verdicts
    of both judges. The test exchanges the judges' verdicts on randomly chosen groups of items, in
    all ways where these are no more than `permutations`.

    Args:
        gold: Verdicts of the gold judge.
        judges: Verdicts of the two judges on the same items.
        names: Measures to compare, by their names in `AgreementData.agreement`.
        keys: Group of each item; items of a group are resampled and exchanged together.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap and of the test.
        permutations: Number of permutations of the test; 0 for no test.
        use_mean: Whether the label of an item is the mean of its answers instead of the first one.
        advance: Function that is called before each resample.
    """
    shared = compared_items(gold, judges, use_mean)
    groups = [shared[group] for group in groups_of([keys[place] for place in shared])]

    def measures(judge: AlignedVerdicts) -> dict[str, Callable[[Indices], float]]:
        measured = AgreementData(gold, judge, use_mean).agreement()
        return {name: measured[name] for name in names}

    first, second = map(measures, judges)
    all_measures: dict[tuple[str, str], Callable[[Indices], float]] = {}
    for name in names:
        all_measures["first", name], all_measures["second", name] = first[name], second[name]
        all_measures["difference", name] = _difference(first[name], second[name])
    results = estimates(all_measures, groups, resamples, seed, advance)
    items = np.concatenate([np.empty(0, np.int64), *groups])
    p: dict[str, float] = {}
    if permutations and len(groups) > 1:
        observed = {name: results["difference", name].value for name in names}
        p = _permutation_test(judges, measures, groups, items, observed, permutations, seed)
    return {
        name: AgreementDifference(
            results["first", name], results["second", name], results["difference", name],
            p.get(name),
        )
        for name in names
    }  # fmt: skip


def _difference(
    first: Callable[[Indices], float], second: Callable[[Indices], float]
) -> Callable[[Indices], float]:
    return lambda items: second(items) - first(items)


def _permutation_test(
    judges: tuple[AlignedVerdicts, AlignedVerdicts],
    measures: Callable[[AlignedVerdicts], dict[str, Callable[[Indices], float]]],
    groups: Sequence[Indices],
    items: Indices,
    observed: dict[str, float | None],
    permutations: int,
    seed: int,
) -> dict[str, float]:
    """Return the p-value of each measure's difference."""
    sizes = {name: abs(value) for name, value in observed.items() if value is not None}
    extreme, counted = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
    exact = 2 ** len(groups) <= permutations
    for swapped in _swaps(len(groups), permutations, seed):
        chosen = [group for group, swap in zip(groups, swapped) if swap]
        places = np.concatenate([np.empty(0, np.int64), *chosen])
        exchanged = map(measures, _exchange(judges, places))
        first, second = exchanged
        for name, value in sizes.items():
            try:
                difference = abs(second[name](items) - first[name](items))
            except Undefined:
                continue
            counted[name] += 1
            extreme[name] += difference >= value - tolerance([value, difference])
    # A random sample of permutations counts the observed one, so that no p-value is 0.
    added = 0 if exact else 1
    return {
        name: (extreme[name] + added) / (counted[name] + added) for name in sizes if counted[name]
    }


def _swaps(
    groups: int, permutations: int, seed: int
) -> Iterator[Sequence[bool] | NDArray[np.bool]]:
    """Yield for which groups the judges are exchanged: all ways, or a random sample of them."""
    if 2**groups <= permutations:
        yield from itertools.product((False, True), repeat=groups)
        return
    generator = np.random.default_rng([seed, 1])
    for _ in range(permutations):
        yield generator.random(groups) < 0.5


def _exchange(
    judges: tuple[AlignedVerdicts, AlignedVerdicts], places: Indices
) -> tuple[AlignedVerdicts, AlignedVerdicts]:
    """Return the judges with their labels exchanged on some items."""
    samples = max(judge.labels.shape[0] for judge in judges)
    orders = max(judge.labels.shape[1] for judge in judges)
    labels = [_padded(judge.labels, samples, orders) for judge in judges]
    mixed = [labels[0].copy(), labels[1].copy()]
    mixed[0][:, :, places], mixed[1][:, :, places] = (
        labels[1][:, :, places],
        labels[0][:, :, places],
    )
    return _with_labels(judges[0], mixed[0]), _with_labels(judges[1], mixed[1])


def _padded(labels: Floats, samples: int, orders: int) -> Floats:
    missing = [(0, samples - labels.shape[0]), (0, orders - labels.shape[1]), (0, 0)]
    return np.pad(labels, missing, constant_values=np.nan)


def _with_labels(judge: AlignedVerdicts, labels: Floats) -> AlignedVerdicts:
    return AlignedVerdicts(
        judge.pairwise, labels, judge.verdicts, judge.malformed, judge.failed, judge.identities
    )
