"""Search for the k-th largest value of each column by histograms summed over ranks.

Values are searched as integers in the same order, see :mod:`candidates`. A bracket is a range of
integers that is believed to contain a column's answer. Each round divides every bracket into many
bins, sums the ranks' histograms (:mod:`packed_bins`), and continues with the bin that contains the
answer. A bracket that the counts show to be wrong is replaced by the range next to it, on the side
where the answer must be. `docs/reference/order-statistics.md` has a picture.

For example, two ranks have the values 3, 9, 12 and 5, 9, 14, 15, and the fourth largest of the
seven is searched in the bracket 0..15. With four bins the first round counts

    bin        0..3  4..7  8..11  12..15
    rank 0        1     0      1       1
    rank 1        0     1      1       2
    sum           1     1      2       3

Three values are in the last bin, five in the last two. So the fourth largest is in 8..11, with
three values above. The second round divides 8..11 into four bins of one integer each, counts
0, 2, 0, 0 and ends: the answer is 9, three values are greater, and five are greater or equal. (A
real round has thousands of bins, and needs one round for this.)

>>> values = torch.tensor([3, 9, 12, 5, 9, 14, 15])
>>> candidates = Candidates(torch.tensor([0]), torch.zeros_like(values), values)
>>> result = search(
...     lambda low, high: candidates, low=torch.tensor([0]), high=torch.tensor([15]),
...     inside=torch.tensor([7]), header=values[:0], rank_of=lambda header: torch.tensor([4]),
...     group=None)
>>> result.image.item(), result.greater.item(), result.at_least.item()
(9, 3, 5)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.moe.candidates import HIGHEST, LOWEST, Candidates
from megatron_ext.moe.packed_bins import BinCounts, PackedBins

ANY_COUNT = (1 << 31) - 1
"""Bound on the number of values in a bracket where none is known."""

# How far beyond a wrong bracket the next one reaches, in widths of it, and the least such width.
_REACH, _LEAST_WIDTH = 32, 1 << 12

Extract = Callable[[Tensor, Tensor], Candidates]


class SearchResult(NamedTuple):
    """Answers of a search, one per column.

    Attributes:
        image: int64 `[columns]`, the k-th largest value as an integer.
        k: int64 `[columns]`, the rank that was searched for.
        greater: int64 `[columns]`, number of values above the answer.
        at_least: int64 `[columns]`, number of values above or equal to the answer.
    """

    image: Tensor
    k: Tensor
    greater: Tensor
    at_least: Tensor


def search(
    extract: Extract,
    low: Tensor,
    high: Tensor,
    inside: Tensor,
    header: Tensor,
    rank_of: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup | None,
) -> SearchResult:
    """Find the k-th largest value of each column over all ranks.

    Args:
        extract: Counts the values above brackets and collects those inside. Skips empty brackets.
        low: int64 `[columns]`, lower ends of the first brackets, included.
        high: int64 `[columns]`, upper ends of the first brackets, included.
        inside: int64 `[columns]`, bounds on the number of values in them over all ranks.
        header: int64, summed over the ranks along with the first counts, in place.
        rank_of: Returns k, int64 `[columns]`, from the summed header.
        group: Ranks that share the columns, or None.

    Returns:
        The answers, the same on every rank.
    """
    brackets = _Brackets(low, high, inside)
    first_round = True
    while True:
        plan, new_brackets = brackets.divide(first_round)
        if plan.word_count == 0:
            return brackets.result()
        message = [header] if first_round else []
        if new_brackets:
            message.append(brackets.collect(extract))
        bin, words = plan.pack(brackets.column, brackets.offsets())
        message.append(words)
        sums = _all_reduce(message, group)
        counts = plan.unpack(sums.pop())
        if new_brackets:
            brackets.set_above(sums.pop())
        if first_round:
            brackets.k = rank_of(header.copy_(sums.pop()))
            first_round = False
        answer = brackets.narrow(plan, counts)
        brackets.keep_candidates(bin, answer)


def _all_reduce(parts: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Sum int64 vectors over the ranks, all in one reduction."""
    message = torch.cat(parts)
    if group is not None:
        dist.all_reduce(message, group=group)
    return list(message.split([part.numel() for part in parts]))


class _Brackets:
    """One bracket per column, what is known about it, and this rank's values inside it.

    Attributes:
        low: int64 `[columns]`, lower end, included.
        high: int64 `[columns]`, upper end, included.
        above: int64 `[columns]`, values above the bracket, over all ranks.
        inside: int64 `[columns]`, bound on the values in the bracket, over all ranks; exact once a
            round has counted them.
        k: int64 `[columns]`, rank of the answer.
        done: bool `[columns]`, whether the bracket is the answer.
        is_new: bool `[columns]`, whether this rank's values in the bracket are not yet collected.
        column: int64 `[candidates]`, column of each collected value.
        image: int64 `[candidates]`, the value.
    """

    def __init__(self, low: Tensor, high: Tensor, inside: Tensor) -> None:
        self.low, self.high, self.inside = low, high, inside
        self.above, self.k = torch.zeros_like(low), torch.zeros_like(low)
        self.done = torch.zeros_like(low, dtype=torch.bool)
        self.is_new = ~self.done
        self.column, self.image = low[:0], low[:0]

    def divide(self, first_round: bool) -> tuple[PackedBins, int]:
        """Divide the brackets into bins; also return the number of new brackets."""
        replaced = self.is_new & (not first_round)
        width = self.high - self.low + 1
        return PackedBins.divide(width, self.inside, self.done, replaced, self.is_new.sum())

    def collect(self, extract: Extract) -> Tensor:
        """Collect this rank's values in new brackets and return the counts above them."""
        low = self.low.where(self.is_new, self.high + 1)  # the others are empty
        candidates = extract(low, self.high)
        self.column = torch.cat([self.column, candidates.column])
        self.image = torch.cat([self.image, candidates.image])
        return candidates.above

    def offsets(self) -> Tensor:
        """Return the distance of each collected value from the lower end of its bracket."""
        return self.image - self.low.take(self.column)

    def set_above(self, above: Tensor) -> None:
        """Take over the counts above new brackets, summed over the ranks."""
        self.above = above.where(self.is_new, self.above)

    def narrow(self, plan: PackedBins, counts: BinCounts) -> Tensor:
        """Replace each bracket by the bin that contains the answer, or by the range next to it.

        Returns:
            int64 `[columns]`, the bin within the old bracket that is the new one, or -1 if there is
            none to search on.
        """
        k = self.k
        # At or above the lower edge of bin b are `above + below[last + 1] - below[b]` values. The
        # answer is in the last bin of which these are k or more, so `below[b] <= most_below`.
        most_below = self.above + counts.below[counts.last + 1] - k
        at = torch.searchsorted(counts.below, most_below, right=True) - 1
        bin = torch.minimum(at, counts.last) - counts.first
        at = at.clamp(counts.first, counts.last)

        too_low = ~self.done & (self.above >= k)  # the bracket, for the answer
        too_high = ~self.done & (most_below < counts.below[counts.first])
        hit = ~(self.done | too_low | too_high)
        absent = too_high & (self.low == LOWEST)  # fewer than k values: the answer is -inf
        counted = absent & (plan.width == 1)

        above_bin = self.above + counts.below[counts.last + 1] - counts.below[at + 1]
        self.above = torch.where(hit, above_bin, self.above)
        self.inside = torch.where(hit | counted, counts.counts[at], self.inside)
        self._move(plan, bin, counts.lone, hit, too_low, too_high, absent)
        self.done = self.done | counted | (hit & (self.low == self.high))
        self.is_new = (too_low | too_high) & ~self.done
        self.inside = self.inside.masked_fill(self.is_new, ANY_COUNT)
        return bin.where(hit & ~self.done, -1)

    def _move(
        self,
        plan: PackedBins,
        bin: Tensor,
        lone: Tensor,
        hit: Tensor,
        too_low: Tensor,
        too_high: Tensor,
        absent: Tensor,
    ) -> None:
        """Set the ends of the brackets from the state of each column, bool `[columns]`."""
        low, high, width = self.low, self.high, plan.width
        bins = plan.bins.clamp(min=1)
        edges = [low + ((bin + i) * width + bins - 1) // bins for i in (0, 1)]  # inverse of pack
        reach = _REACH * width.clamp(min=_LEAST_WIDTH)
        lowest = torch.full_like(low, LOWEST)
        for chosen, new_low, new_high in (
            (hit, edges[0], edges[1] - 1),
            (hit & plan.alone, low + lone, low + lone),
            (too_low, high + 1, (high + reach).clamp(max=HIGHEST)),
            (too_high, (low - reach).clamp(min=LOWEST), low - 1),
            (absent, lowest, lowest),
        ):
            self.low = new_low.where(chosen, self.low)
            self.high = new_high.where(chosen, self.high)

    def keep_candidates(self, bin: Tensor, answer: Tensor) -> None:
        """Keep the collected values whose bin is the answer's.

        Args:
            bin: int64 `[candidates]`, bin of each value.
            answer: int64 `[columns]`, bin to keep, -1 for none.
        """
        selected = (bin == answer.take(self.column)).nonzero().squeeze(1)
        self.column, self.image = self.column.take(selected), self.image.take(selected)

    def result(self) -> SearchResult:
        """Return the answers, once all columns are done."""
        return SearchResult(self.low, self.k, self.above, self.above + self.inside)
