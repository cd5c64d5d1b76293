"""Cutoffs of one optimizer step, computed in the forward pass or at its end."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.moe.forecast import Forecast
from megatron_ext.moe.order_statistics import Bracket, Group, Pool, RankOf, kth_largest


class StepCutoffs:
    """Cutoffs of one layer's experts in the current optimizer step.

    A router adds the cutoffs that its forward pass needed, or keeps a micro-batch's logits for
    :func:`resolve_buffered_logits`, once per micro-batch however often recomputation repeats the
    forward pass.

    Args:
        rank_of: Number of tokens that an expert takes from a pool of a size.
        whole_step: Whether a pool is the whole step rather than a micro-batch.
        max_bytes: Bound on the bytes of stored logits of several micro-batches.
    """

    def __init__(self, rank_of: RankOf, whole_step: bool, max_bytes: int) -> None:
        self.rank_of, self.whole_step, self.max_bytes = rank_of, whole_step, max_bytes
        self.buffered_logits: list[Tensor] = []  # fp32 [tokens, experts] each
        self.values: list[Tensor] = []  # fp32 [experts] each, one per pool
        self._forecast = Forecast()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was collected since the last step."""
        return not self.buffered_logits and not self.values

    @property
    def pools(self) -> list[Pool]:
        """Pools of buffered logits whose cutoffs are not yet known."""
        if self.buffered_logits and self.whole_step:
            return [self.buffered_logits]
        return list(self.buffered_logits)

    def bracket(self) -> Bracket | None:
        """Return where the next pool's cutoffs are likely to lie."""
        return self._forecast.bracket()

    def observe(self, cutoffs: Tensor) -> None:
        """Update the next bracket by cutoffs, fp32 `[experts]`, that are not part of the step."""
        self._forecast.observe(cutoffs)

    def add(self, cutoffs: Tensor) -> None:
        """Add the cutoffs of one pool, fp32 `[experts]`."""
        self._forecast.observe(cutoffs)
        self.values.append(cutoffs)

    def keep(self, logits: Tensor) -> None:
        """Keep the logits of one micro-batch, fp32 `[tokens, experts]`, until they are resolved."""
        self.buffered_logits.append(logits)

    def has_room(self, nbytes: int) -> bool:
        """Return whether another micro-batch's logits fit within the bound.

        Pools of whole steps cannot be resolved early; their size is checked before training.
        """
        return self.whole_step or (len(self.buffered_logits) + 1) * nbytes <= self.max_bytes

    def take(self) -> Tensor:
        """Return the mean cutoffs of the step, fp32 `[experts]`, and start a new step."""
        assert self.values and not self.buffered_logits, "a training step without a micro-batch"
        mean = torch.stack(self.values).mean(dim=0)
        self.values = []
        return mean


def resolve_buffered_logits(
    layers: Sequence[StepCutoffs], group: Group, counts: Tensor | None = None
) -> None:
    """Turn the buffered logits of a pipeline stage into cutoffs, all layers in one search.

    Args:
        layers: Collections of the layers, in the same order on all ranks.
        group: Ranks that share the pools.
        counts: int64 of any shape, summed over the ranks in place by a reduction of the search.
    """
    owners = [layer for layer in layers for _ in layer.pools]
    if not owners:
        if counts is not None:
            dist.all_reduce(counts, group=group)
        return
    pools = [pool for layer in layers for pool in layer.pools]
    cutoffs = kth_largest(
        pools,
        [layer.rank_of for layer in owners],
        group,
        [layer.bracket() for layer in owners],
        counts,
    )
    values = cutoffs.value.view(len(pools), -1)  # [pools, experts]
    for layer, value in zip(owners, values, strict=True):
        layer.add(value)
    for layer in layers:
        layer.buffered_logits = []
