"""Alignment of verdicts by item, as arrays of labels."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.judges.results import commonest
from alignment.records import Outcome, Side, Verdict
from alignment.rounding import Floats
from megatron_ext.errors import TooFewResults, UserError

FIRST, TIED, SECOND = 1.0, 0.5, 0.0  # labels of pairs: preference for the first response
_ORIGINAL, _SWAPPED = 0, 1  # indices of the orders of a pair


@dataclass(frozen=True)
class AlignedVerdicts:
    """Verdicts of one judge on a list of items.

    Attributes:
        pairwise: Whether the verdicts are preferences between the responses of a pair.
        labels: Label of each answer, `[samples, orders, items]`; NaN where there is none.
            Responses have one order, pairs have two: original and swapped.
        verdicts: Number of verdicts on each item, `[items]`.
        malformed: Number of unparseable verdicts on each item, `[items]`.
        failed: Number of failed verdicts on each item, `[items]`.
        identities: Identities of the judge in its verdicts, usually one hash.
    """

    pairwise: bool
    labels: Floats
    verdicts: Floats
    malformed: Floats
    failed: Floats
    identities: tuple[str, ...]

    @property
    def single(self) -> Floats:
        """One label per item, from the first sample, `[items]`.

        A pair that was judged in both orders has the side that both prefer, or else is tied.
        """
        return self._over_orders(self.labels[0])

    @property
    def mean(self) -> Floats:
        """Mean of the labels of each item, `[items]`; NaN where it has none."""
        answers = self.labels.reshape(-1, self.labels.shape[2])
        valid = ~np.isnan(answers)
        total = np.where(valid, answers, 0.0).sum(axis=0)
        return np.divide(total, valid.sum(axis=0), out=np.full(total.shape, np.nan),
                         where=valid.any(axis=0))  # fmt: skip

    def _over_orders(self, labels: Floats) -> Floats:
        if not self.pairwise:
            return labels[_ORIGINAL]
        original, swapped = labels
        either = np.where(np.isnan(original), swapped, original)
        both = ~np.isnan(original) & ~np.isnan(swapped)
        return np.where(both & (original != swapped), TIED, either)


def align_verdicts(
    verdicts: Mapping[str, Sequence[Verdict]], items: Sequence[str], name: str
) -> AlignedVerdicts:
    """Align a judge's verdicts with a list of items.

    Args:
        verdicts: Verdicts by item.
        items: Ids of the items, in the order of the result.
        name: Name of the judge or of its file, for error messages.

    Raises:
        UserError: Scores and preferences are mixed.
        TooFewResults: No verdict is a score, a preference or a tie.
    """
    rows = [verdict for item in items for verdict in verdicts[item]]
    kinds = {v.outcome is Outcome.SCORE for v in rows if v.judged}
    if len(kinds) > 1:
        raise UserError(f"{name} has both scores and preferences. Give verdicts of one kind.")
    if not kinds:
        raise TooFewResults(
            f"{name} has no judgement on these items: all {len(rows):,} verdicts failed, most "
            f"often with: {commonest(v.reason for v in rows)}"
        )
    pairwise = not kinds.pop()
    samples = 1 + max(v.sample for v in rows)
    labels = np.full((samples, 2 if pairwise else 1, len(items)), np.nan)
    counts = np.zeros((3, len(items)))
    for column, item in enumerate(items):
        for verdict in verdicts[item]:
            order = _SWAPPED if pairwise and verdict.swapped else _ORIGINAL
            labels[verdict.sample, order, column] = _label(verdict)
            counts[0, column] += 1
            counts[1, column] += verdict.outcome is Outcome.UNPARSEABLE
            counts[2, column] += verdict.outcome is Outcome.FAILED
    identities = tuple(sorted({v.judge for v in rows if v.judge}))
    return AlignedVerdicts(pairwise, labels, counts[0], counts[1], counts[2], identities)


def _label(verdict: Verdict) -> float:
    if verdict.outcome is Outcome.TIE:
        return TIED
    if verdict.preferred is not None:
        return FIRST if verdict.preferred is Side.FIRST else SECOND
    return np.nan if verdict.score is None else verdict.score


def verdicts_by_item(verdicts: Iterable[Verdict], name: str) -> dict[str, list[Verdict]]:
    """Group verdicts by item.

    Args:
        verdicts: Verdicts of one judge.
        name: Name of the judge or of its file, for error messages.

    Raises:
        UserError: There is no verdict, or two verdicts have the same item, order and sample.
    """
    by_item: dict[str, list[Verdict]] = {}
    answered: set[tuple[str, bool, int]] = set()
    for verdict in verdicts:
        question = (verdict.item, verdict.swapped, verdict.sample)
        if question in answered:
            raise UserError(f"{name} has two verdicts on item {verdict.item!r}. Remove one.")
        answered.add(question)
        by_item.setdefault(verdict.item, []).append(verdict)
    if not by_item:
        raise UserError(f"{name} contains no verdict. Annotate some items first.")
    return by_item


def shared_items(
    first: Mapping[str, object], second: Mapping[str, object], common: bool, names: Sequence[str]
) -> list[str]:
    """Return the items that both judges have, in the order of the first.

    Args:
        first: Verdicts of the first judge by item.
        second: Verdicts of the second judge by item.
        common: Whether items of only one judge may be omitted.
        names: Names of the judges or of their files, for error messages.

    Raises:
        UserError: The judges have no item in common, or different items without `common`.
    """
    shared = [item for item in first if item in second]
    unshared = [len(first) - len(shared), len(second) - len(shared)]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no item in common: they judge other data.")
    if any(unshared) and not common:
        raise UserError(
            f"{names[0]} has {unshared[0]} items that {names[1]} lacks, and lacks {unshared[1]} of "
            f"its items. Annotate the same items, or give --common to compare the {len(shared)} of "
            "both."
        )
    return shared


def groups_of(keys: Sequence[str]) -> list[np.ndarray]:
    """Return the indices of each distinct key, in the order of first occurrence."""
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [np.array(group) for group in places.values()]


def largest(keys: Sequence[str], count: int) -> list[str]:
    """Return the most frequent keys; keys of equal frequency are sorted."""
    return [key for key, _ in sorted(Counter(keys).items(), key=lambda kv: (-kv[1], kv[0]))[:count]]
