"""Exact order statistics of columns that are spread over the ranks of a process group.

Expert choice and expert threshold need, for each expert, the k-th largest router logit over every
token of the routing pool, wherever those tokens live (arXiv 2603.11535, section 3). Gathering the
logits costs 4 bytes a token and expert on every rank. Here only integer counts travel:

1. each rank draws a small sample of its own rows, and one max-reduction turns the samples into a
   bracket per column that very likely holds the answer;
2. one pass counts what lies above the bracket and keeps, sorted, what lies inside;
3. rounds of summed counts at many pivots narrow the bracket, on the order-preserving integer image
   of fp32, until it holds a single value. A bracket that the counts show to be wrong is widened.

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

# Integer images of -inf and +inf, the ends of every bracket.
_LOWEST, _HIGHEST = -0x7F800001, 0x7F800000
# Rows a rank contributes to the first bracket: its width falls with the root of this.
_SAMPLE_ROWS = 2048
# Counts reduced in a round, all columns together (int32: 64 KiB), and the least pivots a column.
_COUNTS_PER_ROUND, _MIN_PIVOTS = 16384, 15


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


class _Candidates:
    """What one rank keeps of its columns: sorted values inside the bracket, and counts above it.

    The sorted keys hold (column, image) in one int64, so one search serves all columns.
    """

    def __init__(self, columns: Tensor, images: Tensor, above: Tensor):
        self.above = above  # int64 [columns]
        self.keys = ((columns << 32) + (images.long() - _LOWEST)).sort().values
        column_starts = torch.arange(above.numel() + 1, device=above.device) << 32
        self.ends = torch.searchsorted(self.keys, column_starts[1:])

    def count_at_least(self, pivots: Tensor) -> Tensor:
        """Local values that are >= each image of `pivots [columns, p]`; int64, same shape."""
        column = torch.arange(pivots.shape[0], device=pivots.device).unsqueeze(1)
        queries = (column << 32) + (pivots - _LOWEST)
        inside = self.ends.unsqueeze(1) - torch.searchsorted(self.keys, queries)
        return inside + self.above.unsqueeze(1)


def _extract(pools: Sequence[Tensor], low: Tensor, high: Tensor) -> _Candidates:
    """Count above and collect inside the brackets `low..high` (int64 images, `[columns]`)."""
    columns, images, above = [], [], []
    start = 0
    for logits in pools:  # [tokens, n]
        stop = start + logits.shape[1]
        floor, ceiling = value_of_image(low[start:stop]), value_of_image(high[start:stop])
        above.append((logits > ceiling).sum(dim=0))
        row, column = ((logits >= floor) & (logits <= ceiling)).nonzero(as_tuple=True)
        images.append(order_preserving_image(logits[row, column]))
        columns.append(column + start)
        start = stop
    return _Candidates(torch.cat(columns), torch.cat(images), torch.cat(above))


def _sampled_bracket(
    pools: Sequence[Tensor], shares: Sequence[float], group: Group
) -> tuple[Tensor, Tensor]:
    """Brackets (int64 images, `[columns]` each) from a sample of every rank's own rows.

    `shares` say what part of each pool lies above its answer. A rank looks a few standard
    deviations of the sampling error to either side of its own quantile; the global quantile lies
    between the least and the greatest of the ranks' own.
    """
    lows, highs = [], []
    for logits, share in zip(pools, shares, strict=True):
        tokens, n = logits.shape
        if tokens == 0:  # nothing to say: the neutral element of the reduction below
            lows.append(torch.full((n,), _HIGHEST, dtype=torch.int64, device=logits.device))
            highs.append(torch.full((n,), _LOWEST, dtype=torch.int64, device=logits.device))
            continue
        stride = -(-tokens // _SAMPLE_ROWS)
        sample = logits[::stride].nan_to_num(-torch.inf, torch.inf, -torch.inf)
        sample = sample.sort(dim=0, descending=True).values  # [rows, n]
        rows = sample.shape[0]
        spread = 4.0 * (rows * share * (1.0 - share)) ** 0.5 + 2.0 if stride > 1 else 1.0
        centre = share * rows
        first = min(max(int(centre - spread), 0), rows - 1)
        last = min(max(int(centre + spread), 0), rows - 1)
        highs.append(order_preserving_image(sample[first]).long())
        lows.append(order_preserving_image(sample[last]).long())
    bracket = torch.stack([-torch.cat(lows), torch.cat(highs)])
    if group is not None:
        dist.all_reduce(bracket, op=dist.ReduceOp.MAX, group=group)
    low, high = -bracket[0], bracket[1]
    empty = low > high  # no rank had a token: any bracket will do, the count decides
    return low.masked_fill(empty, _LOWEST), high.masked_fill(empty, _HIGHEST)


def _narrow(
    extract: Callable[[Tensor, Tensor], _Candidates],
    low: Tensor,
    high: Tensor,
    k: Tensor,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink the brackets to the image of the k-th largest value of each column.

    Returns:
        images, counts greater, counts at least: int64 `[columns]` each.
    """
    low, high = low.clone(), high.clone()
    greater, at_least = torch.zeros_like(k), torch.zeros_like(k)
    done = torch.zeros_like(k, dtype=torch.bool)
    candidates = extract(low, high)
    while not bool(done.all()):
        pivot_count = max(_MIN_PIVOTS, _COUNTS_PER_ROUND // k.numel() - 1)
        pivot_count = min(pivot_count, max(1, int((high - low).max())))
        parts = torch.arange(pivot_count + 2, device=k.device)  # both ends are pivots too
        width = high - low + 1
        pivots = low.unsqueeze(1) + (width.unsqueeze(1) * parts) // (pivot_count + 1)
        counts = candidates.count_at_least(pivots).to(torch.int32)
        if group is not None:
            dist.all_reduce(counts, group=group)
        counts = counts.long()
        # Counts fall from left to right; the answer lies right of the last one that reaches k.
        index = (counts >= k.unsqueeze(1)).sum(dim=1) - 1
        too_high, too_low = index < 0, index > pivot_count
        missed = (too_high & (low > _LOWEST)) | (too_low & (high < _HIGHEST))
        # Fewer than k values in all (NaN, or k > tokens): the answer is -inf.
        exhausted = too_high & ~missed
        index = torch.where(exhausted, pivot_count, index.clamp(0, pivot_count))
        new_low = pivots.gather(1, index.unsqueeze(1)).squeeze(1)
        new_high = pivots.gather(1, index.unsqueeze(1) + 1).squeeze(1) - 1
        new_low = torch.where(exhausted, _LOWEST, new_low)
        new_high = torch.where(exhausted, _LOWEST, new_high)
        if bool(missed.any()):
            step = 16 * width
            new_low = torch.where(missed & too_high, (low - step).clamp(min=_LOWEST), new_low)
            new_high = torch.where(missed & too_high, low - 1, new_high)
            new_high = torch.where(missed & too_low, (high + step).clamp(max=_HIGHEST), new_high)
            new_low = torch.where(missed & too_low, high + 1, new_low)
            candidates = extract(new_low, new_high)
        settled = (new_low == new_high) & ~missed & ~done & (~exhausted | (width == 1))
        greater = torch.where(settled, counts.gather(1, index.unsqueeze(1) + 1).squeeze(1), greater)
        at_least = torch.where(settled, counts.gather(1, index.unsqueeze(1)).squeeze(1), at_least)
        low, high = new_low, new_high
        done = done | settled
    return low, greater, at_least


def kth_largest(pools: Sequence[Tensor], rank_of: Sequence[RankOf], group: Group) -> Cutoffs:
    """Exact k-th largest value of every column of every pool, over all ranks of `group`.

    Args:
        pools: this rank's part of each pool, fp32 `[tokens, n]`; `tokens` may differ between
            pools and between ranks and may be 0. NaN counts as absent.
        rank_of: for each pool, the wanted rank given the pool's total number of tokens. Must
            return at least 1.
        group: the ranks that share the pools, or None when all tokens are local.

    Returns:
        Cutoffs of all pools' columns, concatenated in order. Identical on every rank.
    """
    device = pools[0].device
    sizes = torch.tensor([p.shape[0] for p in pools], dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(sizes, group=group)
    totals = sizes.tolist()
    wanted = [k_of(total) for k_of, total in zip(rank_of, totals, strict=True)]
    for rank, total in zip(wanted, totals, strict=True):
        if rank < 1:
            raise ValueError(f"there is no {rank}-th largest of {total} tokens: k must be >= 1")
    widths = torch.tensor([p.shape[1] for p in pools], device=device)
    k = torch.tensor(wanted, device=device).repeat_interleave(widths)
    shares = [min(1.0, rank / max(total, 1)) for rank, total in zip(wanted, totals, strict=True)]
    low, high = _sampled_bracket(pools, shares, group)
    image, greater, at_least = _narrow(lambda lo, hi: _extract(pools, lo, hi), low, high, k, group)
    tokens = sizes.repeat_interleave(widths)
    return Cutoffs(value_of_image(image), k, greater, at_least, tokens)


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
    mask = logits > cutoffs.value
    tied = logits == cutoffs.value
    missing = cutoffs.k - cutoffs.greater
    split = cutoffs.at_least > cutoffs.k  # [n] columns where only some of the tied may enter
    if bool(split.any()):
        columns = split.nonzero().squeeze(1)
        row, column = tied[:, columns].nonzero(as_tuple=True)
        k = missing[columns]
        # The first positions are the largest of the negated ones: the same search serves.
        candidates = _Candidates(column, -positions[row], torch.zeros_like(k))
        low = torch.full_like(k, -(1 << 30))
        last, _, _ = _narrow(lambda lo, hi: candidates, low, torch.zeros_like(k), k, group)
        tied[:, columns] &= positions.unsqueeze(1) <= -last
    return mask | tied
