"""Exact order statistics of columns that are spread over the ranks of a process group.

Expert choice and expert threshold need, for each expert, the k-th largest router logit over every
token of the routing pool, wherever those tokens live (arXiv 2603.11535, section 3). Gathering the
logits costs 4 bytes a token and expert on every rank. Here only integer counts travel:

1. each column gets a bracket that very likely holds the answer: the caller's forecast, the same on
   every rank, or one from a small sample of every rank's rows and one max-reduction;
2. one pass over the logits counts what lies above the bracket and keeps what lies inside;
3. each round divides the brackets, on the order-preserving integer image of fp32, into many bins
   and sums the ranks' histograms; the bin with the answer is the next bracket. A bracket that the
   counts show to be wrong is replaced by the part next to it that they point to.

The number of values in a bracket is known to all ranks from the round before, and no bin's count
needs more bits than that. So many bins share a 64-bit word: the fewer values are left, the more
bins a round has. A value that is alone in its bracket is sent itself.

Sums of integers do not depend on their order, so the result is exact and the same bits on every
rank and for every way of laying the tokens out over ranks.

Nothing here knows of Megatron. `group=None` means that all tokens are local.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
RankOf = Callable[[int], int]
"""Maps the number of tokens in the pool to the 1-based rank of the wanted statistic."""
Pool = Tensor | Sequence[Tensor]
"""This rank's part of a pool, fp32 `[tokens, n]`, in one piece or several."""
Bracket = tuple[Tensor, Tensor]
"""Least and greatest likely value of a pool's columns, fp32 `[n]` each."""

# Integer images of -inf and +inf, the ends of every bracket.
_LOWEST, _HIGHEST = -0x7F800001, 0x7F800000
# Rows a rank contributes to a sampled bracket: its width falls with the root of this.
_SAMPLE_ROWS = 2048
# 64-bit words reduced in a round: at least so many in all (32 KiB), and on average per column.
_LEAST_WORDS, _WORDS_PER_COLUMN = 4096, 11
_WORD_BITS = 63  # the sign is left alone
_ANY_COUNT = (1 << 31) - 1  # bound on the number of values where none is known
# A bracket so wide that usual rounds would not exhaust it, or one that had to be replaced, gets so
# many times the words of another. There are few of either.
_WIDE, _WIDE_SHARE = 1 << 26, 64
# How far beyond a wrong bracket the next one reaches, in widths of it, and the least such width.
_REACH, _LEAST_WIDTH = 32, 1 << 12
# Logits looked at in one go: bounds the memory that a pass takes.
_CHUNK = 1 << 22


class Cutoffs(NamedTuple):
    """The k-th largest value of each column and where it stands in its pool.

    Attributes:
        value: fp32 `[columns]`, the k-th largest value; -inf when k exceeds the number of values.
        k: int64 `[columns]`, the rank that was asked for.
        greater: int64 `[columns]`, how many values of the pool are strictly greater.
        at_least: int64 `[columns]`, how many are greater or equal: more than k only in a tie.
        tokens: int64 `[columns]`, the size of the pool.
    """

    value: Tensor
    k: Tensor
    greater: Tensor
    at_least: Tensor
    tokens: Tensor


def order_preserving_image(values: Tensor) -> Tensor:
    """Map fp32 values to int32 so that `<` on the images is `<` on the values.

    Zeros of either sign share one image; NaN is outside the images of [-inf, inf].
    """
    bits = (values + 0.0).view(torch.int32)  # adding zero turns -0.0 into +0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value_of_image(images: Tensor) -> Tensor:
    """Inverse of :func:`order_preserving_image`, from any integer dtype to fp32."""
    images = images.to(torch.int32)
    return (images ^ ((images >> 31) & 0x7FFFFFFF)).view(torch.float32)


def column_counts(mask: Tensor) -> Tensor:
    """`mask.sum(dim=0)` of a bool `[rows, n]`, int64 `[n]`, several times as fast.

    A sum of 64-bit words adds eight counters of a byte, in which 128 rows cannot overflow.
    """
    rows, n = mask.shape
    whole = rows // 1024 * 1024
    words = mask[:whole].reshape(-1).view(torch.int64).view(-1, 128, n)  # eight rows in n words
    counters = words.sum(dim=1).view(torch.uint8).view(-1, n)
    return counters.sum(dim=0) + mask[whole:].sum(dim=0)


def _few(mask: Tensor) -> Tensor:
    """Where a contiguous mask is true, as flat indices; fast where it is nearly nowhere."""
    flat = mask.view(-1)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    occupied = words.nonzero().squeeze(1)
    inside = words.take(occupied).view(torch.bool).nonzero().squeeze(1)
    index = occupied.take(inside // 8) * 8 + inside % 8
    return torch.cat([index, whole + flat[whole:].nonzero().squeeze(1)])


class _Candidates(NamedTuple):
    """What one rank holds of some brackets."""

    above: Tensor  # int64 [columns], values above the bracket
    column: Tensor  # int64 [candidates], of each value inside a bracket
    image: Tensor  # int64 [candidates]


def _extract(pools: Sequence[Sequence[Tensor]], low: Tensor, high: Tensor) -> _Candidates:
    """Count above and collect inside the brackets `low..high` (int64 images, `[columns]`).

    A column whose `low` is above its `high` is passed over.
    """
    above, columns, images = torch.zeros_like(low), [low[:0]], [low[:0]]
    wanted = low <= high
    high = high - (high == -1).long()  # the image of -0.0, which is equal to the next value
    start = 0
    for parts in pools:
        stop = start + parts[0].shape[1]
        chosen = wanted[start:stop].nonzero().squeeze(1)  # [n']
        here, count = chosen + start, chosen.numel()
        floor, ceiling = value_of_image(low[here]), value_of_image(high[here])  # [n']
        rows = max(1, _CHUNK // max(1, count))
        for logits in (chunk for part in parts if count for chunk in part.split(rows)):
            if count < stop - start:
                logits = logits[:, chosen]
            higher = logits > ceiling
            above[here] += column_counts(higher)
            index = _few((logits >= floor) ^ higher)
            columns.append(here.take(index % count))
            images.append(order_preserving_image(logits.reshape(-1).take(index)).long())
        start = stop
    return _Candidates(above, torch.cat(columns), torch.cat(images))


def _sampled_brackets(
    pools: Sequence[Sequence[Tensor]], rank_of: Sequence[RankOf], group: Group
) -> list[Bracket]:
    """Brackets from a sample of every rank's own rows, the same on all ranks.

    A rank looks a few standard deviations of the sampling error to either side of its own
    quantile; the global quantile lies between the least and the greatest of the ranks' own.
    """
    ranks = 1 if group is None else group.size()
    ends = []
    for parts, rank in zip(pools, rank_of, strict=True):
        tokens = sum(part.shape[0] for part in parts)
        if tokens == 0:  # nothing to say: the neutral element of the reduction below
            ends.append(parts[0].new_full((2, parts[0].shape[1]), -torch.inf))
            continue
        stride = -(-tokens // _SAMPLE_ROWS)
        sample = torch.cat([part[::stride] for part in parts])
        rows = sample.shape[0]
        # Other ranks may hold more or less; the counts will tell if that misled.
        share = min(1.0, max(0.0, rank(tokens * ranks) / (tokens * ranks)))
        spread = 4.0 * (rows * share * (1.0 - share)) ** 0.5 + 2.0 if stride > 1 else 1.0
        first = min(max(int(share * rows - spread), 0), rows - 1)
        last = min(max(int(share * rows + spread), 0), rows - 1)
        sample = sample.nan_to_num(-torch.inf, torch.inf, -torch.inf).t().contiguous()
        top = sample.topk(last + 1).values  # [n, last + 1]
        ends.append(torch.stack([-top[:, last], top[:, first]]))
    bracket = torch.cat(ends, dim=1)  # [2, columns]
    if group is not None:
        dist.all_reduce(bracket, op=dist.ReduceOp.MAX, group=group)
    widths = [parts[0].shape[1] for parts in pools]
    return list(zip((-bracket[0]).split(widths), bracket[1].split(widths), strict=True))


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


class _Found(NamedTuple):
    """The answer of a search, int64 `[columns]` each."""

    image: Tensor
    k: Tensor
    greater: Tensor
    at_least: Tensor


def _search(
    extract: Callable[[Tensor, Tensor], _Candidates],
    low: Tensor,
    high: Tensor,
    inside: Tensor,
    header: Tensor,
    rank_of: Callable[[Tensor], Tensor],
    group: Group,
) -> _Found:
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
            return _Found(low, k, above, above + inside)
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
        absent = too_high & (low == _LOWEST)  # fewer than k values: -inf stands for the answer
        counted = absent & (width == 1)
        above = torch.where(hit, above + below[last_bin + 1] - below[at + 1], above)
        inside = torch.where(hit | counted, counts[at], inside)
        bins = plan.bins.clamp(min=1)
        edges = [low + ((answer + i) * width + bins - 1) // bins for i in (0, 1)]
        reach = _REACH * width.clamp(min=_LEAST_WIDTH)
        lowest = torch.full_like(low, _LOWEST)
        for chosen, new_low, new_high in (
            (hit, edges[0], edges[1] - 1),
            (hit & plan.alone, low + lone, low + lone),
            (too_low, high + 1, (high + reach).clamp(max=_HIGHEST)),
            (too_high, (low - reach).clamp(min=_LOWEST), low - 1),
            (absent, lowest, lowest),
        ):
            low, high = new_low.where(chosen, low), new_high.where(chosen, high)
        done = done | counted | (hit & (low == high))
        fresh = (too_low | too_high) & ~done
        inside = inside.masked_fill(fresh, _ANY_COUNT)
        answer = answer.where(hit & ~done, -1)
        kept = (bin == answer.take(column)).nonzero().squeeze(1)
        column, image = column.take(kept), image.take(kept)


def kth_largest(
    pools: Sequence[Pool],
    rank_of: Sequence[RankOf],
    group: Group,
    brackets: Sequence[Bracket | None] | None = None,
    counts: Tensor | None = None,
) -> Cutoffs:
    """Exact k-th largest value of every column of every pool, over all ranks of `group`.

    Args:
        pools: this rank's part of each pool; `tokens` may differ between pools and between ranks
            and may be 0. NaN counts as absent.
        rank_of: for each pool, the wanted rank given the pool's total number of tokens. Must
            return at least 1.
        group: the ranks that share the pools, or None when all tokens are local.
        brackets: for each pool, where its answers are likely to be, the same on every rank, or
            None to find out from a sample. A wrong one costs time and changes nothing.
        counts: int64 of any shape, summed over the ranks in place, in the same reduction as the
            first counts.

    Returns:
        Cutoffs of all pools' columns, concatenated in order. Identical on every rank.
    """
    parts = [[pool] if isinstance(pool, Tensor) else list(pool) for pool in pools]
    given = [None] * len(parts) if brackets is None else brackets
    unknown = [i for i, bracket in enumerate(given) if bracket is None]
    known = {i: bracket for i, bracket in enumerate(given) if bracket is not None}
    if unknown:
        sampled = _sampled_brackets(
            [parts[i] for i in unknown], [rank_of[i] for i in unknown], group
        )
        known |= zip(unknown, sampled, strict=True)
    ends = [torch.cat([known[i][end] for i in range(len(parts))]) for end in (0, 1)]
    low = order_preserving_image(ends[0].nan_to_num(-torch.inf, torch.inf, -torch.inf)).long()
    high = order_preserving_image(ends[1].nan_to_num(torch.inf, torch.inf, -torch.inf)).long()
    upside_down = low > high  # no rank had a token: any bracket will do, the counts decide
    low, high = low.masked_fill(upside_down, _LOWEST), high.masked_fill(upside_down, _HIGHEST)

    device = low.device
    own = torch.tensor([sum(p.shape[0] for p in pool) for pool in parts], device=device)
    header = own if counts is None else torch.cat([own, counts.flatten()])
    widths = torch.tensor([pool[0].shape[1] for pool in parts], device=device)

    def ranks(header: Tensor) -> Tensor:
        totals = header[: len(parts)].tolist()
        wanted = [k_of(total) for k_of, total in zip(rank_of, totals, strict=True)]
        for rank, total in zip(wanted, totals, strict=True):
            if rank < 1:
                raise ValueError(f"there is no {rank}-th largest of {total} tokens: k must be >= 1")
        return torch.tensor(wanted, device=device).repeat_interleave(widths, output_size=len(low))

    found = _search(
        lambda low, high: _extract(parts, low, high),
        low, high, torch.full_like(low, _ANY_COUNT), header, ranks, group,
    )  # fmt: skip
    if counts is not None:
        counts.copy_(header[len(parts) :].view_as(counts))
    tokens = header[: len(parts)].repeat_interleave(widths, output_size=len(low))
    return Cutoffs(value_of_image(found.image), found.k, found.greater, found.at_least, tokens)


def top_k_mask(logits: Tensor, cutoffs: Cutoffs, positions: Tensor, group: Group) -> Tensor:
    """Select exactly the k largest values of each column; ties go to the lowest position.

    Args:
        logits: fp32 `[tokens, n]`, this rank's part of the pool.
        cutoffs: what :func:`kth_largest` returned for these columns, `[n]`.
        positions: int64 `[tokens]`, the tokens' positions in the pool, distinct over all ranks
            and below 2**30. They define the order of ties, so let them not depend on the layout.
        group: as in :func:`kth_largest`.

    Returns:
        bool `[tokens, n]`.
    """
    mask = logits >= cutoffs.value
    # Columns where only some of those equal to the cutoff may enter.
    split = (cutoffs.at_least > cutoffs.k).nonzero().squeeze(1)
    if split.numel():
        tied = logits[:, split] == cutoffs.value[split]
        row, column = tied.nonzero(as_tuple=True)
        # The first positions are the largest of the negated ones: the same search serves.
        high = torch.zeros_like(split)
        candidates = _Candidates(high, column, -positions[row])
        missing, count = cutoffs.k - cutoffs.greater, cutoffs.at_least - cutoffs.greater
        last = -_search(
            lambda low, high: candidates,
            high - (1 << 30), high, count[split], split[:0], lambda _: missing[split], group,
        ).image  # fmt: skip
        mask[:, split] &= ~(tied & (positions.unsqueeze(1) > last))
    return mask
