"""Division of a rank's batch into micro-batches of one shape."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from alignment.engines.batch import TokenBatch


def micro_batches(
    batch: TokenBatch,
    rows: int,
    group: dist.ProcessGroup | None,
    device: torch.device | int,
    multiple: int = 1,
) -> list[TokenBatch]:
    """Return micro-batches of one shape, the same number on all ranks of a group.

    Ranks with fewer rows get rows of padding.

    Args:
        batch: Batch of this rank, which may have no rows.
        rows: Rows of a micro-batch.
        group: Process group of the ranks.
        device: Device of the micro-batches.
        multiple: Number of which the length of a row must be a multiple.

    Raises:
        ValueError: Batches with rows have different extras.
    """
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, (batch.rows, sorted(batch.extras)), group=group)
    kinds = {tuple(names) for count, names in ranks if count}
    if len(kinds) > 1:
        raise ValueError(f"Batches of one step have different extras: {sorted(kinds)}.")
    if not batch.rows:
        names = next(iter(kinds), ())
        batch = replace(batch, extras={name: torch.zeros(batch.tokens.shape) for name in names})
    count = max(1, *(-(-count // rows) for count, _ in ranks))
    length = max(1, -(-batch.length // multiple)) * multiple
    padded_batch = batch.padded(count * rows, length).to(device)
    return [padded_batch.slice(slice(i * rows, (i + 1) * rows)) for i in range(count)]
