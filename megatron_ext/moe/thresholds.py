"""Rates, thresholds and selection: the routing rule of Expert Threshold (arXiv 2603.11535).

An expert takes the tokens whose router logit exceeds its threshold, an estimate of its next cutoff
from those so far; a cutoff is the k-th largest logit of the expert over the routing pool. This
module does not depend on Megatron.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.moe import threshold_estimators
from megatron_ext.moe.candidates import column_counts
from megatron_ext.moe.order_statistics import Group, kth_largest, top_k_mask
from megatron_ext.moe.threshold_estimators import StepCounts


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


FILTER = ".thresholds.filter"
"""End of the name of the state of filters in a checkpoint, which inference does not need."""


class Thresholds(torch.nn.Module):
    """One threshold per expert, estimated from the cutoffs so far.

    The estimate is their bias-corrected moving average, `average / (1 - decay ** updates)`, or that
    of :mod:`threshold_estimators`, which `average` then contains. The state is fp32 whatever the
    dtype of the model, is saved in its checkpoint, and changes only in :meth:`update`,
    :meth:`start_at` and :meth:`restart_filter`.

    Args:
        experts: Number of routed experts.
        decay: Decay of the moving average, in [0, 1).
        device: Device of the state.
        adaptive: Whether filters estimate the cutoffs, without a decay.
    """

    average: Tensor  # fp32 [experts]
    updates: Tensor  # int64 []
    filter: Tensor | None  # fp32 [threshold_estimators.ROWS, experts]

    def __init__(
        self,
        experts: int,
        decay: float,
        device: torch.device | int | str | None = None,
        adaptive: bool = False,
    ):
        super().__init__()
        self.decay = 0.0 if adaptive else decay
        self.register_buffer("average", torch.zeros(experts, dtype=torch.float32, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        shape = (threshold_estimators.ROWS, experts)
        zeros = torch.zeros(shape, dtype=torch.float32, device=device) if adaptive else None
        self.register_buffer("filter", zeros)
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
            UserError: No step has updated them yet.
        """
        if self.update_count == 0:
            raise UserError(
                "The thresholds have no value yet. Train for at least one step, or calibrate them "
                "on text, before evaluating or generating. (With --fp16 the first steps are "
                "skipped until the loss scale fits. Lower --initial-loss-scale, or use --bf16.)"
            )
        return (self.average.double() / (1.0 - self.decay**self.update_count)).float()

    @torch.no_grad()
    def update(self, cutoffs: Tensor, counts: StepCounts | None = None) -> None:
        """Update the estimate by the cutoffs of one step.

        An expert without a finite cutoff (every logit -inf or NaN) keeps its threshold.

        Args:
            cutoffs: fp32 `[experts]`.
            counts: Counts of the step, for the filters; None if thresholds had no value.
        """
        if self.filter is None:
            previous = self.value() if self.update_count else torch.zeros_like(self.average)
            cutoffs = torch.where(cutoffs.isfinite(), cutoffs, previous)
            self.average.mul_(self.decay).add_(cutoffs, alpha=1.0 - self.decay)
        else:
            counts = counts if self.update_count else None
            self.filter.copy_(threshold_estimators.update(self.filter, cutoffs, counts))
            self.average.copy_(threshold_estimators.predict(self.filter))
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
        self.restart_filter()

    @torch.no_grad()
    def restart_filter(self) -> None:
        """Begin new filters at the thresholds, if there are any.

        The filters count the thresholds as a single cutoff, so that they soon depend on new ones.
        """
        if self.filter is None:
            return
        self.filter.zero_()
        if self.update_count:
            self.filter.copy_(threshold_estimators.start(self.value()))

    def forget_count(self) -> None:
        """Read the number of updates from the device again, after the buffers were written to."""
        self._updates_on_host = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Thresholds":
        """Follow the model to its device but not to its dtype: rounding would move thresholds."""
        before = {"average": self.average, "filter": self.filter}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now is None or now.dtype == torch.float32:
                continue
            assert tensor is not None
            moved = tensor.float() if tensor.is_meta else tensor.to(now.device)
            if tensor.is_meta and not now.is_meta:
                moved = torch.zeros_like(tensor, device=now.device, dtype=torch.float32)
            setattr(self, name, moved)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Load the state; one without filters begins them at its thresholds."""
        missing: list[str] = []
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            state_dict, prefix, local_metadata, strict, missing, *rest
        )
        self.forget_count()
        if f"{prefix}filter" in missing:
            missing.remove(f"{prefix}filter")
            self.restart_filter()
        missing_keys += missing


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
