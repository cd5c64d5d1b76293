"""Cutting a rank's batch into pieces that go through the model one after the other."""

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
    """Pieces of one shape, as many as any rank of a group has: they run in step.

    Rows of padding make up for what a rank has less.

    Args:
        batch: this rank's, perhaps without rows.
        rows: of a piece.
        group: the ranks.
        device: where the pieces go.
        multiple: what the length of a row must be a multiple of.

    Raises:
        ValueError: batches with rows have different extras.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (batch.rows, sorted(batch.extras)), group=group)
    kinds = {tuple(names) for count, names in told if count}
    if len(kinds) > 1:
        raise ValueError(f"batches of one step have different extras: {sorted(kinds)}")
    if not batch.rows:
        names = next(iter(kinds), ())
        batch = replace(batch, extras={name: torch.zeros(batch.tokens.shape) for name in names})
    count = max(1, *(-(-count // rows) for count, _ in told))
    length = max(1, -(-batch.length // multiple)) * multiple
    whole = batch.padded(count * rows, length).to(device)
    return [whole.slice(slice(i * rows, (i + 1) * rows)) for i in range(count)]
