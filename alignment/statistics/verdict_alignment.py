"""Two judges' verdicts brought together, item by item, as arrays."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignment.judges.results import commonest
from alignment.records import Outcome, Side, Verdict
from alignment.rounding import Floats
from megatron_ext.errors import TooFewResults, UserError

FIRST, TIED, SECOND = 1.0, 0.5, 0.0  # labels of pairs: how far the first response is preferred
_GIVEN, _SWAPPED = 0, 1


@dataclass(frozen=True)
class AlignedVerdicts:
    """One judge's verdicts over a list of items.

    Attributes:
        labels: of each answer, `[samples, orders, items]`, NaN where there is none; responses have
            one order, pairs two: as given, and swapped.
        verdicts, malformed, failed: how many of each an item has, `[items]`.
        identities: what the judge says it is, usually one hash.
    """

    pairwise: bool
    labels: Floats
    verdicts: Floats
    malformed: Floats
    failed: Floats
    identities: tuple[str, ...]

    @property
    def single(self) -> Floats:
        """One label an item, from the first sample, `[items]`.

        A pair that was judged in both orders has the side that both prefer, else it is tied.
        """
        return self._over_orders(self.labels[0])

    @property
    def mean(self) -> Floats:
        """The mean of an item's labels, `[items]`."""
        answers = self.labels.reshape(-1, self.labels.shape[2])
        there = ~np.isnan(answers)
        total = np.where(there, answers, 0.0).sum(axis=0)
        return np.divide(total, there.sum(axis=0), out=np.full(total.shape, np.nan),
                         where=there.any(axis=0))  # fmt: skip

    def _over_orders(self, labels: Floats) -> Floats:
        if not self.pairwise:
            return labels[_GIVEN]
        given, swapped = labels
        one = np.where(np.isnan(given), swapped, given)
        both = ~np.isnan(given) & ~np.isnan(swapped)
        return np.where(both & (given != swapped), TIED, one)


def align_verdicts(
    verdicts: Mapping[str, Sequence[Verdict]], items: Sequence[str], name: str
) -> AlignedVerdicts:
    """The verdicts on `items`, in that order.

    Raises:
        UserError: scores and preferences are mixed.
        TooFewResults: there is no judgement at all.
    """
    rows = [verdict for item in items for verdict in verdicts[item]]
    kinds = {v.outcome is Outcome.SCORE for v in rows if v.judged}
    if len(kinds) > 1:
        raise UserError(f"{name} has both scores and preferences: give verdicts of one kind")
    if not kinds:
        raise TooFewResults(
            f"{name} has no judgement on these items: all {len(rows):,} verdicts failed, most "
            f"often with: {commonest(v.reason for v in rows)}"
        )
    pairwise = not kinds.pop()
    samples = 1 + max(v.sample for v in rows)
    labels = np.full((samples, 2 if pairwise else 1, len(items)), np.nan)
    counts = np.zeros((3, len(items)))
    for at, item in enumerate(items):
        for verdict in verdicts[item]:
            order = _SWAPPED if pairwise and verdict.swapped else _GIVEN
            labels[verdict.sample, order, at] = _label(verdict)
            counts[0, at] += 1
            counts[1, at] += verdict.outcome is Outcome.UNPARSEABLE
            counts[2, at] += verdict.outcome is Outcome.FAILED
    identities = tuple(sorted({v.judge for v in rows if v.judge}))
    return AlignedVerdicts(pairwise, labels, counts[0], counts[1], counts[2], identities)


def _label(verdict: Verdict) -> float:
    if verdict.outcome is Outcome.TIE:
        return TIED
    if verdict.preferred is not None:
        return FIRST if verdict.preferred is Side.FIRST else SECOND
    return np.nan if verdict.score is None else verdict.score


def verdicts_by_item(verdicts: Iterable[Verdict], name: str) -> dict[str, list[Verdict]]:
    """The verdicts of each item.

    Raises:
        UserError: there is none, or two answer the same question.
    """
    found: dict[str, list[Verdict]] = {}
    asked: set[tuple[str, bool, int]] = set()
    for verdict in verdicts:
        question = (verdict.item, verdict.swapped, verdict.sample)
        if question in asked:
            raise UserError(f"{name} has two verdicts on item {verdict.item!r}: take one out")
        asked.add(question)
        found.setdefault(verdict.item, []).append(verdict)
    if not found:
        raise UserError(f"{name} holds no verdict: annotate some items first")
    return found


def shared_items(
    first: Mapping[str, object], second: Mapping[str, object], common: bool, names: Sequence[str]
) -> list[str]:
    """Items of both, in the first's order.

    Args:
        common: whether items of one alone may be left out.

    Raises:
        UserError: they have no item in common, or different items without `common`.
    """
    shared = [item for item in first if item in second]
    alone = [len(first) - len(shared), len(second) - len(shared)]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no item in common: they judge other data")
    if any(alone) and not common:
        raise UserError(
            f"{names[0]} has {alone[0]} items that {names[1]} has not, and lacks {alone[1]} of its "
            f"items: annotate the same items, or give --common to compare the {len(shared)} of both"
        )
    return shared


def groups_of(keys: Sequence[str]) -> list[np.ndarray]:
    """Places of equal keys."""
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [np.array(group) for group in places.values()]


def largest(keys: Sequence[str], most: int) -> list[str]:
    """The most frequent keys, those of equal frequency in order."""
    return [key for key, _ in sorted(Counter(keys).items(), key=lambda kv: (-kv[1], kv[0]))[:most]]
