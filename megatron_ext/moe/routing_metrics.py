"""Counts of routing decisions in a step, and the metrics computed from them.

Counts are integers and add up over micro-batches and ranks, so every layout reports the same.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ext.moe.candidates import column_counts


class RoutingCounts(torch.nn.Module):
    """Routing decisions of one MoE layer on this rank since the last :meth:`reset`."""

    experts: Tensor  # int64 [4, experts]: selected, above threshold, dropped, forced
    fan_out: Tensor  # int64 [experts + 1]: tokens by the number of experts that took them

    def __init__(self, experts: int) -> None:
        super().__init__()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        for name, shape in (("experts", (4, experts)), ("fan_out", (experts + 1,))):
            zeros = torch.zeros(shape, dtype=torch.int64, device=device)
            self.register_buffer(name, zeros, persistent=False)

    def add(
        self, routing_map: Tensor, above: Tensor | None = None, by_threshold: bool = False
    ) -> None:
        """Count one micro-batch.

        Args:
            routing_map: bool `[tokens, experts]`, which expert takes which token.
            above: bool `[tokens, experts]`, which logits exceed the thresholds, if there are any.
            by_threshold: Whether thresholds decided, so that differences from `above` were dropped
                or forced by the capacity.
        """
        selected = column_counts(routing_map)
        self.experts[0] += selected
        if above is not None:
            raw = column_counts(above)
            self.experts[1] += raw
            if by_threshold:
                both = column_counts(routing_map & above)
                self.experts[2] += raw - both
                self.experts[3] += selected - both
        fan_out = routing_map.sum(dim=1)  # no bincount, for which a GPU's host would wait
        self.fan_out.scatter_add_(0, fan_out, torch.ones_like(fan_out))

    def packed(self) -> Tensor:
        """Return all counts in one int64 vector, to be summed over ranks."""
        return torch.cat([self.experts.flatten(), self.fan_out])

    def reset(self) -> None:
        """Start a new step."""
        self.experts.zero_()
        self.fan_out.zero_()


def _expert_count(packed: Tensor) -> int:
    return (packed.numel() - 1) // 5


def above_threshold(packed: Tensor) -> Tensor:
    """Return the number of logits above each threshold, int64 `[experts]`, from packed counts."""
    experts = _expert_count(packed)
    return packed[experts : 2 * experts]


def token_count(packed: Tensor) -> int:
    """Return the number of tokens from packed counts."""
    return int(packed[4 * _expert_count(packed) :].sum())


def layer_metrics(
    packed: Tensor, threshold: Tensor | None, cutoff: Tensor | None, k_min_rate: float
) -> dict[str, Any]:
    """Return the metrics of one layer and step from its summed counts.

    Args:
        packed: int64, :meth:`RoutingCounts.packed` summed over ranks and micro-batches.
        threshold: fp32 `[experts]`, thresholds that routed this step; None before the first update.
        cutoff: fp32 `[experts]`, cutoffs of this step, if the router has any.
        k_min_rate: Share of tokens that the capacity guarantees an expert; 0 for none.

    Returns:
        Scalars by name, and lists by expert under `experts/`. Shares are in [0, 1].
    """
    packed = packed.cpu()
    experts = _expert_count(packed)
    selected, above, dropped, forced = packed[: 4 * experts].view(4, experts).double()
    fan_out = packed[4 * experts :].double()
    tokens = max(1.0, float(fan_out.sum()))
    load = selected / tokens
    mean_load = float(load.mean())
    metrics: dict[str, Any] = {
        "fan_out": float(selected.sum()) / tokens,
        "no_expert_share": float(fan_out[0]) / tokens,
        "load_max_over_mean": float(load.max()) / mean_load if mean_load else 0.0,
        "dead_experts": int((selected == 0).sum()),
        "saturation": float(dropped.sum() / above.sum().clamp(min=1)),
        "starvation": float(forced.sum()) / (k_min_rate * tokens * experts) if k_min_rate else 0.0,
        "experts/load": load.tolist(),
        "fan_out_histogram": [int(count) for count in fan_out],
    }
    if threshold is not None:
        metrics["raw_usage"] = float(above.sum()) / (tokens * experts)
        metrics["threshold"] = float(threshold.mean())
        metrics["experts/threshold"] = threshold.tolist()
    if cutoff is not None:
        metrics["cutoff"] = float(cutoff.mean())
        metrics["experts/cutoff"] = cutoff.tolist()
    return metrics
