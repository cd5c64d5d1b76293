"""Rates, thresholds and selection: the routing rule of Expert Threshold (arXiv 2603.11535).

An expert takes the tokens whose router logit exceeds its threshold, the bias-corrected moving
average of its cutoffs; a cutoff is the k-th largest logit of the expert over the routing pool.
This module does not depend on Megatron.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.moe.candidates import column_counts
from megatron_ext.moe.order_statistics import Group, kth_largest, top_k_mask


@dataclass(frozen=True)
class RoutingRate:
    """Share of a pool's tokens that an expert takes, as exact fractions.

    Attributes:
        rate: Mean number of routed experts per token, divided by the number of experts.
        capacity: C of the paper, or None for no limit.
    """

    rate: Fraction
    capacity: Fraction | None = None

    def k(self, tokens: int) -> int:
        """Return the number of tokens that an expert takes on average."""
        return floor(self.rate * tokens)

    def k_min(self, tokens: int) -> int:
        """Return the least number of tokens that an expert takes in training."""
        return 0 if self.capacity is None else floor(self.k(tokens) * (1 - self.capacity))

    def k_max(self, tokens: int) -> int:
        """Return the greatest number of tokens that an expert takes in training."""
        if self.capacity is None:
            return tokens
        return min(tokens, floor(self.k(tokens) * (1 + self.capacity)))


class Thresholds(torch.nn.Module):
    """One threshold per expert: `average / (1 - decay ** updates)` of the cutoffs so far.

    The state is fp32 whatever the dtype of the model, is saved in its checkpoint, and changes only
    in :meth:`update` and :meth:`start_at`.

    Args:
        experts: Number of routed experts.
        decay: Decay of the moving average, in [0, 1).
        device: Device of the state.
    """

    average: Tensor  # fp32 [experts]
    updates: Tensor  # int64 []

    def __init__(self, experts: int, decay: float, device: torch.device | int | str | None = None):
        super().__init__()
        self.decay = decay
        self.register_buffer("average", torch.zeros(experts, dtype=torch.float32, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self._updates_on_host: int | None = 0

    @property
    def update_count(self) -> int:
        """Number of updates so far, without waiting for the device where it is known."""
        if self._updates_on_host is None:
            self._updates_on_host = int(self.updates)
        return self._updates_on_host

    def value(self) -> Tensor:
        """Return the thresholds, fp32 `[experts]`.

        Raises:
            RuntimeError: No step has updated them yet.
        """
        if self.update_count == 0:
            raise RuntimeError(
                "The thresholds have no value yet. Train for at least one step, or calibrate them "
                "on text, before evaluating or generating."
            )
        return (self.average.double() / (1.0 - self.decay**self.update_count)).float()

    @torch.no_grad()
    def update(self, cutoffs: Tensor) -> None:
        """Fold one step's cutoffs, fp32 `[experts]`, into the average.

        An expert without a finite cutoff (every logit -inf or NaN) keeps its threshold.
        """
        previous = self.value() if self.update_count else torch.zeros_like(self.average)
        cutoffs = torch.where(cutoffs.isfinite(), cutoffs, previous)
        self.average.mul_(self.decay).add_(cutoffs, alpha=1.0 - self.decay)
        self.updates.add_(1)
        self._updates_on_host = self.update_count + 1

    @torch.no_grad()
    def start_at(self, values: Tensor) -> None:
        """Restart the average with one update, so that thresholds are just below these logits.

        So an expert takes the logit itself and all above it. A threshold is at most two or three
        units in the last place below, since the average behind it is rounded as well.

        Args:
            values: fp32 `[experts]`.
        """
        self.updates.fill_(1)
        self._updates_on_host = 1
        self.average.copy_(values.double() * (1.0 - self.decay))
        for _ in range(3):
            lower = torch.nextafter(self.average, torch.full_like(self.average, -torch.inf))
            self.average.copy_(torch.where(self.value() < values, self.average, lower))

    def forget_count(self) -> None:
        """Read the number of updates from the device again, after the buffers were written to."""
        self._updates_on_host = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Thresholds":
        """Follow the model to its device but not to its dtype: rounding would move thresholds."""
        average = self.average
        super()._apply(fn, recurse)
        if self.average.dtype != torch.float32:
            device = self.average.device
            self.average = average.float() if average.is_meta else average.to(device)
            if average.is_meta and device.type != "meta":
                self.average = torch.zeros_like(average, device=device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_count()


@torch.no_grad()
def select_by_threshold(
    logits: Tensor, thresholds: Tensor, rate: RoutingRate, positions: Tensor, group: Group
) -> Tensor:
    """Give each expert the tokens above its threshold, within its capacity, for training.

    With too many, the largest k_max stay; with too few, the largest k_min are taken. Ties at
    either limit go to the lowest position. Evaluation has no limit: `logits > thresholds`.

    Args:
        logits: fp32 `[tokens, experts]`.
        thresholds: fp32 `[experts]`.
        rate: Share of the pool's tokens that an expert takes, and its capacity.
        positions: int64 `[tokens]`, see :func:`order_statistics.top_k_mask`.
        group: Ranks whose tokens the capacity counts together; None for this rank alone.

    Returns:
        Routing map, bool `[tokens, experts]`.
    """
    routing_map = logits > thresholds
    if rate.capacity is None:
        return routing_map
    above = column_counts(routing_map)
    if group is None and not logits.is_cpu:
        allowed = above.clamp(rate.k_min(len(logits)), rate.k_max(len(logits)))
        return _largest_by_sorting(logits, allowed, positions)
    counts = torch.cat([above, above.new_tensor([logits.shape[0]])])
    if group is not None:
        dist.all_reduce(counts, group=group)
    above, tokens = counts[:-1], int(counts[-1])
    allowed = above.clamp(rate.k_min(tokens), rate.k_max(tokens))
    # Few experts are beyond a limit; all ranks of the group agree on which.
    beyond = allowed != above
    routing_map[:, beyond] = False
    chosen = (beyond & (allowed > 0)).nonzero().squeeze(1)
    if chosen.numel():
        ranks = [lambda _, k=k: k for k in allowed[chosen].tolist()]
        columns = logits[:, chosen]
        cutoffs = kth_largest(columns.split(1, dim=1), ranks, group)
        routing_map[:, chosen] = top_k_mask(columns, cutoffs, positions, group)
    return routing_map


def _largest_by_sorting(logits: Tensor, counts: Tensor, positions: Tensor) -> Tensor:
    """Return a mask of the `counts` largest logits of each expert, ties to the lowest position.

    It sorts all logits, which a GPU does faster than the host learns which experts need it.

    Args:
        logits: fp32 `[tokens, experts]`.
        counts: int64 `[experts]`.
        positions: int64 `[tokens]`, distinct.

    Returns:
        bool `[tokens, experts]`.
    """
    absent = logits.isnan()
    order = positions.argsort()
    ranking = logits.masked_fill(absent, -torch.inf)[order].argsort(
        dim=0, descending=True, stable=True
    )
    chosen = torch.arange(len(logits), device=logits.device).unsqueeze(1) < counts
    return torch.zeros_like(absent).scatter_(0, order[ranking], chosen) & ~absent
