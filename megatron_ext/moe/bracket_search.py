"""Shrinks brackets to the k-th largest value of each column by histograms summed over ranks.

Each round divides the brackets, on the order-preserving integer image of fp32, into many bins and
sums the ranks' histograms; the bin with the answer is the next bracket. A bracket that the counts
show to be wrong is replaced by the part next to it that they point to.

The number of values in a bracket is known to all ranks from the round before, and no bin's count
needs more bits than that. So many bins share a 64-bit word: the fewer values are left, the more
bins a round has. A value that is alone in its bracket is sent itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.moe.candidates import HIGHEST, LOWEST, Candidates

ANY_COUNT = (1 << 31) - 1
"""Bound on the number of values in a bracket where none is known."""

# 64-bit words reduced in a round: at least so many in all (32 KiB), and on average per column.
_LEAST_WORDS, _WORDS_PER_COLUMN = 4096, 11
_WORD_BITS = 63  # the sign is left alone
# A bracket so wide that usual rounds would not exhaust it, or one that had to be replaced, gets so
# many times the words of another. There are few of either.
_WIDE, _WIDE_SHARE = 1 << 26, 64
# How far beyond a wrong bracket the next one reaches, in widths of it, and the least such width.
_REACH, _LEAST_WIDTH = 32, 1 << 12


class _Bins(NamedTuple):
    """How a round divides the brackets into bins, and packs the bins' counts into words."""

    bins: Tensor  # int64 [columns]; a column that is done has none
    words: Tensor  # int64 [columns]; all of a column's own
    alone: Tensor  # bool [columns]: the bracket holds one value, and its word is that value
    bits: Tensor  # int64 [], of a bin's count
    per_word: Tensor  # int64 [], bins in a word

    @staticmethod
    def divide(width: Tensor, inside: Tensor, done: Tensor, replaced: Tensor) -> "_Bins":
        """As many bins for each bracket as its share of the round's words holds."""
        alone = ~done & (inside == 1)
        searching = ~(done | alone)
        most = inside.where(searching, 1).max()
        bits = torch.frexp(most.double()).exponent.long()  # of the number in binary
        per_word = _WORD_BITS // bits
        share = torch.where(replaced | (width > _WIDE), _WIDE_SHARE, 1).where(searching, 0)
        total = max(_LEAST_WORDS, _WORDS_PER_COLUMN * width.numel())
        words = share * total // share.sum().clamp(min=1)
        words = torch.minimum(words, (width + per_word - 1) // per_word).clamp(min=1)
        words = words.masked_fill(alone, 1).masked_fill(done, 0)
        return _Bins(torch.minimum(words * per_word, width), words, alone, bits, per_word)


class Found(NamedTuple):
    """The answer of a search, int64 `[columns]` each."""

    image: Tensor
    k: Tensor
    greater: Tensor
    at_least: Tensor


def search(
    extract: Callable[[Tensor, Tensor], Candidates],
    low: Tensor,
    high: Tensor,
    inside: Tensor,
    header: Tensor,
    rank_of: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup | None,
) -> Found:
    """Shrink brackets to the image of the k-th largest value of each column.

    Args:
        extract: counts above and collects inside given brackets, skipping empty ones.
        low, high: int64 images `[columns]`, the first brackets.
        inside: int64 `[columns]`, bounds on the number of values in them over all ranks.
        header: int64, summed over the ranks along with the first counts, in place.
        rank_of: gives k, int64 `[columns]`, from the summed header.
        group: the ranks.
    """
    above, k = torch.zeros_like(low), torch.zeros_like(low)
    done = torch.zeros_like(low, dtype=torch.bool)
    fresh = ~done  # brackets whose values have yet to be looked for
    column, image = low[:0], low[:0]
    first_round = True
    while True:
        width = high - low + 1
        plan = _Bins.divide(width, inside, done, fresh & (not first_round))
        sizes = torch.stack([plan.bits, plan.per_word, plan.words.sum(), fresh.sum()])
        bits, per_word, word_count, looking = sizes.tolist()
        if word_count == 0:
            return Found(low, k, above, above + inside)
        parts = [header] if first_round else []
        if looking:
            found = extract(low.where(fresh, high + 1), high)
            column, image = torch.cat([column, found.column]), torch.cat([image, found.image])
            parts.append(found.above)
        # Where each column's words lie; those of a column without any are beyond the others.
        first_word = (plan.words.cumsum(0) - plan.words).masked_fill(done, word_count)
        offset = image - low.take(column)
        bin = offset * plan.bins.take(column) // width.take(column)
        value = torch.where(plan.alone.take(column), offset, 1 << (bin % per_word * bits))
        words = torch.zeros(word_count + 1, dtype=torch.int64, device=low.device)
        words.index_add_(0, first_word.take(column) + bin // per_word, value)
        parts.append(words)
        message = torch.cat(parts)
        if group is not None:
            dist.all_reduce(message, group=group)
        sums = list(message.split([part.numel() for part in parts]))
        words = sums.pop()
        if looking:
            above = sums.pop().where(fresh, above)
        if first_round:
            k, first_round = rank_of(header.copy_(sums.pop())), False

        lone = words[first_word]
        words[first_word] = lone.masked_fill(plan.alone, 1)  # a count like the others
        shifts = bits * torch.arange(per_word, device=low.device)
        counts = ((words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)).view(-1)
        below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # bins of all columns in a row
        first_bin = first_word * per_word
        last_bin = first_bin + plan.bins.clamp(min=1) - 1
        # The answer is in the last bin that has k or more values at or above its lower edge.
        most_below = above + below[last_bin + 1] - k
        at = torch.searchsorted(below, most_below, right=True) - 1
        answer = torch.minimum(at, last_bin) - first_bin
        at = at.clamp(first_bin, last_bin)

        too_low = ~done & (above >= k)  # the bracket is, for the answer
        too_high = ~done & (most_below < below[first_bin])
        hit = ~(done | too_low | too_high)
        absent = too_high & (low == LOWEST)  # fewer than k values: -inf stands for the answer
        counted = absent & (width == 1)
        above = torch.where(hit, above + below[last_bin + 1] - below[at + 1], above)
        inside = torch.where(hit | counted, counts[at], inside)
        bins = plan.bins.clamp(min=1)
        edges = [low + ((answer + i) * width + bins - 1) // bins for i in (0, 1)]
        reach = _REACH * width.clamp(min=_LEAST_WIDTH)
        lowest = torch.full_like(low, LOWEST)
        for chosen, new_low, new_high in (
            (hit, edges[0], edges[1] - 1),
            (hit & plan.alone, low + lone, low + lone),
            (too_low, high + 1, (high + reach).clamp(max=HIGHEST)),
            (too_high, (low - reach).clamp(min=LOWEST), low - 1),
            (absent, lowest, lowest),
        ):
            low, high = new_low.where(chosen, low), new_high.where(chosen, high)
        done = done | counted | (hit & (low == high))
        fresh = (too_low | too_high) & ~done
        inside = inside.masked_fill(fresh, ANY_COUNT)
        answer = answer.where(hit & ~done, -1)
        kept = (bin == answer.take(column)).nonzero().squeeze(1)
        column, image = column.take(kept), image.take(kept)
