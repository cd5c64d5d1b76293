"""One rank's part of a search for order statistics: its values above and inside brackets.

Brackets are ranges of integers, int64, both ends included. The integers are an image of the fp32
values in the same order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Integer images of -inf and +inf, the ends of every bracket.
LOWEST, HIGHEST = -0x7F800001, 0x7F800000
# Number of logits in one step of a pass, which bounds its memory.
_CHUNK = 1 << 22


def order_preserving_image(values: Tensor) -> Tensor:
    """Map fp32 values to int32 so that `<` on the images is `<` on the values.

    Zeros of either sign share one image; NaN is outside the images of [-inf, inf].
    """
    bits = (values + 0.0).view(torch.int32)  # adding zero turns -0.0 into +0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value_of_image(images: Tensor) -> Tensor:
    """Invert :func:`order_preserving_image`, from any integer dtype to fp32."""
    images = images.to(torch.int32)
    return (images ^ ((images >> 31) & 0x7FFFFFFF)).view(torch.float32)


def column_counts(mask: Tensor) -> Tensor:
    """Return `mask.sum(dim=0)` of a bool `[rows, n]`, int64 `[n]`, several times as fast.

    A sum of 64-bit words adds eight counters of a byte, in which 128 rows cannot overflow.
    """
    rows, n = mask.shape
    whole = rows // 1024 * 1024
    words = mask[:whole].reshape(-1).view(torch.int64).view(-1, 128, n)  # eight rows in n words
    counters = words.sum(dim=1).view(torch.uint8).view(-1, n)
    return counters.sum(dim=0) + mask[whole:].sum(dim=0)


def few_indices(mask: Tensor) -> Tensor:
    """Return the flat indices where a contiguous mask is true, fast for very few."""
    flat = mask.view(-1)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    occupied = words.nonzero().squeeze(1)
    inside = words.take(occupied).view(torch.bool).nonzero().squeeze(1)
    index = occupied.take(inside // 8) * 8 + inside % 8
    if whole < flat.numel():
        index = torch.cat([index, whole + flat[whole:].nonzero().squeeze(1)])
    return index


class Candidates(NamedTuple):
    """One rank's values in relation to brackets.

    Attributes:
        above: int64 `[columns]`, number of values above each bracket.
        column: int64 `[candidates]`, column of each value inside a bracket.
        image: int64 `[candidates]`, the value as an integer.
    """

    above: Tensor
    column: Tensor
    image: Tensor


def extract(pools: Sequence[Sequence[Tensor]], low: Tensor, high: Tensor) -> Candidates:
    """Count above and collect inside the brackets `low..high` (int64 images, `[columns]`).

    A column whose `low` is above its `high` is skipped.
    """
    above, columns, images = torch.zeros_like(low), [low[:0]], [low[:0]]
    searched = (low <= high).tolist()  # waits for the device once, not for each pool
    high = high - (high == -1).long()  # the image of -0.0, which is equal to the next value
    start = 0
    for parts in pools:
        stop = start + parts[0].shape[1]
        chosen = [column for column in range(start, stop) if searched[column]]
        count = len(chosen)
        here = torch.tensor(chosen, dtype=torch.int64, device=low.device)  # [n']
        floor, ceiling = value_of_image(low[here]), value_of_image(high[here])  # [n']
        rows = max(1, _CHUNK // max(1, count))
        for logits in (chunk for part in parts if count for chunk in part.split(rows)):
            if count < stop - start:
                logits = logits[:, here - start]
            higher = logits > ceiling
            above[here] += column_counts(higher)
            index = few_indices((logits >= floor) ^ higher)
            columns.append(here.take(index % count))
            images.append(order_preserving_image(logits.reshape(-1).take(index)).long())
        start = stop
    return Candidates(above, torch.cat(columns), torch.cat(images))
