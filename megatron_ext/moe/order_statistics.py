"""Exact order statistics of columns that are spread over the ranks of a process group.

Expert choice and expert threshold need, for each expert, the k-th largest router logit over every
token of the routing pool, whichever ranks have those tokens (arXiv 2603.11535, section 3).
Gathering the logits costs 4 bytes per token and expert on every rank. Here only integer counts are
sent:

1. each column has a bracket that very likely contains the answer: the caller's forecast, the same
   on every rank, or one from a small sample of every rank's rows and one max-reduction;
2. one pass over the logits counts those above the bracket and collects those inside
   (`candidates`);
3. a few summed histograms narrow the bracket to a single value (`bracket_search`).

Sums of integers do not depend on their order, so the result is exact, and the same in every bit on
every rank and for every distribution of the tokens over ranks. `docs/reference/order-statistics.md`
explains the search with a picture.

This module does not depend on Megatron. `group=None` means that all tokens are local.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.moe.bracket_search import ANY_COUNT, search
from megatron_ext.moe.candidates import (
    HIGHEST,
    LOWEST,
    Candidates,
    extract,
    order_preserving_image,
    value_of_image,
)

Group = dist.ProcessGroup | None
RankOf = Callable[[int], int]
"""Function from the number of tokens in the pool to k, counted from 1."""
Pool = Tensor | Sequence[Tensor]
"""This rank's part of a pool, fp32 `[tokens, n]`, in one piece or several."""
Bracket = tuple[Tensor, Tensor]
"""Least and greatest likely value of a pool's columns, fp32 `[n]` each."""

# Number of rows that a rank samples for a bracket, whose width falls with the root of this.
_SAMPLE_ROWS = 2048


class Cutoffs(NamedTuple):
    """The k-th largest value of each column and its place in the pool.

    Attributes:
        value: fp32 `[columns]`, the k-th largest value; -inf when k exceeds the number of values.
        k: int64 `[columns]`, the rank of the value.
        greater: int64 `[columns]`, number of values of the pool that are strictly greater.
        at_least: int64 `[columns]`, number of those greater or equal: more than k only in a tie.
        tokens: int64 `[columns]`, size of the pool.
    """

    value: Tensor
    k: Tensor
    greater: Tensor
    at_least: Tensor
    tokens: Tensor


def _sampled_brackets(
    pools: Sequence[Sequence[Tensor]], rank_of: Sequence[RankOf], group: Group
) -> list[Bracket]:
    """Return brackets from a sample of every rank's rows, the same on all ranks.

    A rank's bracket extends a few standard deviations of the sampling error to either side of its
    quantile; the global quantile lies between the least and the greatest of the ranks' quantiles.
    """
    ranks = 1 if group is None else group.size()
    ends = []
    for parts, rank in zip(pools, rank_of, strict=True):
        tokens = sum(part.shape[0] for part in parts)
        if tokens == 0:  # the neutral element of the reduction below
            ends.append(parts[0].new_full((2, parts[0].shape[1]), -torch.inf))
            continue
        stride = -(-tokens // _SAMPLE_ROWS)
        sample = torch.cat([part[::stride] for part in parts])
        rows = sample.shape[0]
        # Other ranks may have more or fewer tokens; the counts show whether that misled.
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


def kth_largest(
    pools: Sequence[Pool],
    rank_of: Sequence[RankOf],
    group: Group,
    brackets: Sequence[Bracket | None] | None = None,
    counts: Tensor | None = None,
) -> Cutoffs:
    """Return the exact k-th largest value of every column of every pool, over all ranks.

    Args:
        pools: This rank's part of each pool; `tokens` may differ between pools and between ranks
            and may be 0. NaN counts as absent.
        rank_of: Function to k from the total number of tokens, for each pool. Must return at
            least 1.
        group: Ranks that share the pools, or None when all tokens are local.
        brackets: Where each pool's answers are likely to be, the same on every rank, or None to
            take a sample. A wrong bracket costs time and changes nothing.
        counts: int64 of any shape, summed over the ranks in place, in the same reduction as the
            first counts.

    Returns:
        Cutoffs of all pools' columns, concatenated in order. Identical on every rank.
    """
    parts = [[pool] if isinstance(pool, Tensor) else list(pool) for pool in pools]
    forecasts = [None] * len(parts) if brackets is None else brackets
    unknown = [i for i, bracket in enumerate(forecasts) if bracket is None]
    brackets_by_column = {i: bracket for i, bracket in enumerate(forecasts) if bracket is not None}
    if unknown:
        sampled = _sampled_brackets(
            [parts[i] for i in unknown], [rank_of[i] for i in unknown], group
        )
        brackets_by_column |= zip(unknown, sampled, strict=True)
    ends = [torch.cat([brackets_by_column[i][end] for i in range(len(parts))]) for end in (0, 1)]
    low = order_preserving_image(ends[0].nan_to_num(-torch.inf, torch.inf, -torch.inf)).long()
    high = order_preserving_image(ends[1].nan_to_num(torch.inf, torch.inf, -torch.inf)).long()
    # Without a token on any rank every bracket is valid, because the counts correct it.
    upside_down = low > high
    low, high = low.masked_fill(upside_down, LOWEST), high.masked_fill(upside_down, HIGHEST)

    device = low.device
    own = torch.tensor([sum(p.shape[0] for p in pool) for pool in parts], device=device)
    header = own if counts is None else torch.cat([own, counts.flatten()])
    widths = torch.tensor([pool[0].shape[1] for pool in parts], device=device)

    def ranks(header: Tensor) -> Tensor:
        totals = header[: len(parts)].tolist()
        ks = [k_of(total) for k_of, total in zip(rank_of, totals, strict=True)]
        for k, total in zip(ks, totals, strict=True):
            if k < 1:
                raise ValueError(f"There is no {k}-th largest of {total} tokens: k must be >= 1.")
        return torch.tensor(ks, device=device).repeat_interleave(widths, output_size=len(low))

    answers = search(
        lambda low, high: extract(parts, low, high),
        low, high, torch.full_like(low, ANY_COUNT), header, ranks, group,
    )  # fmt: skip
    if counts is not None:
        counts.copy_(header[len(parts) :].view_as(counts))
    tokens = header[: len(parts)].repeat_interleave(widths, output_size=len(low))
    return Cutoffs(
        value_of_image(answers.image), answers.k, answers.greater, answers.at_least, tokens
    )


def top_k_mask(logits: Tensor, cutoffs: Cutoffs, positions: Tensor, group: Group) -> Tensor:
    """Select exactly the k largest values of each column; ties go to the lowest position.

    Args:
        logits: fp32 `[tokens, n]`, this rank's part of the pool.
        cutoffs: Result of :func:`kth_largest` for these columns, `[n]`.
        positions: int64 `[tokens]`, the tokens' positions in the pool, distinct over all ranks
            and below 2**30. They define the order of ties, so they must not depend on the layout.
        group: Ranks that share the pool, or None when all tokens are local.

    Returns:
        bool `[tokens, n]`.
    """
    mask = logits >= cutoffs.value
    # Columns where only some of those equal to the cutoff are selected.
    split = (cutoffs.at_least > cutoffs.k).nonzero().squeeze(1)
    if split.numel():
        tied = logits[:, split] == cutoffs.value[split]
        row, column = tied.nonzero(as_tuple=True)
        # The first positions are the largest of the negated ones, so the same search finds them.
        high = torch.zeros_like(split)
        candidates = Candidates(high, column, -positions[row])
        missing, count = cutoffs.k - cutoffs.greater, cutoffs.at_least - cutoffs.greater
        last = -search(
            lambda low, high: candidates,
            high - (1 << 30), high, count[split], split[:0], lambda _: missing[split], group,
        ).image  # fmt: skip
        mask[:, split] &= ~(tied & (positions.unsqueeze(1) > last))
    return mask
