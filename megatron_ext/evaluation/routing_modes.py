"""Routing modes: rules by which a trained model can be routed, to compare their losses.

- `et`: by thresholds, as the model evaluates.
- `et-capacity`: by thresholds within the capacity of training.
- `ec`: an expert takes its k largest logits of a pool of tokens, later ones included.
- `tc`: a token goes to its k largest logits, k being its mean number of experts.

A pool is a number of whole sequences of the data, whatever ranks they are on. Ties go to the token
that comes first in the data.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config import ETConfig
from megatron_ext.errors import UserError
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.moe.order_statistics import Group, kth_largest, top_k_mask
from megatron_ext.moe.router import ETRouter, routers_of
from megatron_ext.moe.routing_metrics import RoutingCounts, layer_metrics
from megatron_ext.moe.threshold_router import ThresholdRouter, threshold_routers
from megatron_ext.moe.thresholds import select_by_threshold

POOLED = ("ec", "et-capacity")
NAMES = ("et", "tc", *POOLED)


class RoutingMode:
    """Routing rule of a model, and counts of its decisions.

    Args:
        trained: Model to route.
        name: One of `NAMES`, or the result of :func:`default_routing` for the model.

    Raises:
        UserError: The model cannot be routed by this rule.
    """

    def __init__(self, trained: TrainedModel, name: str) -> None:
        self.name, self.trained = name, trained
        self.pooled = name in POOLED
        self._routers = routers_of([trained.module])
        self._counts = [RoutingCounts(trained.args.num_experts) for _ in self._routers]
        # The ranks of a replica have the same tokens.
        self._group: Group = trained.groups.dp if trained.groups.dp.size() > 1 else None
        self._real = self._positions = torch.zeros(0)
        _check(trained.model.config, name)
        routers = threshold_routers(self._routers)
        if name in ("et", "et-capacity") and not all(r.thresholds.update_count for r in routers):
            raise UserError(
                f"--routing {name} needs thresholds, which have no value yet. Train the model for "
                "at least one step, or calibrate it with tools.calibrate_thresholds."
            )

    def set_batch(self, padding: Tensor, first: int, stride: int) -> None:
        """Describe the batch of the next forward pass.

        Args:
            padding: bool `[rows, length]`, True where there is no token.
            first: Number of rows of the pool before these, on other ranks.
            stride: Length of a row in the data, at least that of the tensor.
        """
        rows, length = padding.shape
        row = first + torch.arange(rows, device=padding.device)
        positions = row * stride + torch.arange(length, device=padding.device).unsqueeze(1)
        self._real = ~padding.t().reshape(-1)  # a router receives the sequence first
        self._positions = positions.reshape(-1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Route the model by this rule, and count, until the end of the block."""
        hooks = []
        for threshold_router in threshold_routers(self._routers):
            threshold_router.routing = partial(  # type: ignore[method-assign]
                self._route, threshold_router
            )
        for router, counts in zip(self._routers, self._counts):
            hooks.append(router.register_forward_hook(partial(self._count, counts)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for router in self._routers:
                router.__dict__.pop("routing", None)

    def metrics(self) -> dict[int, dict[str, Any]]:
        """Return the routing metrics of each MoE layer over all ranks. Every rank must call it."""
        layers = {}
        for router, counts in zip(self._routers, self._counts):
            packed = counts.packed()
            if self._group is not None:
                dist.all_reduce(packed, group=self._group)
            layers[router.layer_number - 1] = layer_metrics(packed, None, None, 0.0)
        stages: list[Any] = [None] * self.trained.groups.pp.size()
        dist.all_gather_object(stages, layers, group=self.trained.groups.pp)
        return {layer: stage[layer] for stage in stages for layer in sorted(stage)}

    def _route(
        self, router: ThresholdRouter, logits: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Route in place of `ThresholdRouter.routing`."""
        logits = logits.reshape(-1, router.num_experts).float()
        routing_map = torch.zeros_like(logits, dtype=torch.bool)
        select = _SELECT[self.name]
        routing_map[self._real] = select(
            router, logits[self._real], self._positions[self._real], self._group
        )
        return router.gates(logits) * routing_map, routing_map

    def _count(self, counts: RoutingCounts, _: ETRouter, __: Any, output: tuple[Any, Any]) -> None:
        counts.add(output[1][self._real].bool())


def default_routing(config: ETConfig) -> str:
    """Return the rule by which a model evaluates, "none" for one without experts."""
    if config.num_moe_experts is None:
        return "none"
    return config.router.evaluation


def _check(config: ETConfig, name: str) -> None:
    default = default_routing(config)
    if name == default:
        return
    if default == "none":
        raise UserError(f"--routing {name}: the model has no experts. Leave the flag out.")
    if default != "et":
        raise UserError(
            f"--routing {name} needs thresholds, which a model of --router-type "
            f"{config.router_type} does not have. Leave the flag out, or calibrate the model with "
            "tools.calibrate_thresholds."
        )
    if name == "tc" and config.mean_experts.denominator != 1:
        raise UserError(
            f"--routing tc takes a whole number of experts per token, but the model has "
            f"{float(config.mean_experts):g} on average. Use ec."
        )
    if name == "et-capacity" and config.et_capacity is None:
        raise UserError(
            "--routing et-capacity needs a capacity, but the model was trained with --et-capacity "
            "none. Use et."
        )


Select = Callable[[ThresholdRouter, Tensor, Tensor, Group], Tensor]


def _by_threshold(router: ThresholdRouter, logits: Tensor, _: Tensor, __: Group) -> Tensor:
    return logits > router.thresholds.value()


def _within_capacity(
    router: ThresholdRouter, logits: Tensor, positions: Tensor, group: Group
) -> Tensor:
    thresholds = router.thresholds.value()
    return select_by_threshold(logits, thresholds, router.rate, positions, group)


def _by_expert(router: ThresholdRouter, logits: Tensor, positions: Tensor, group: Group) -> Tensor:
    # In the last pool an expert's share may be less than one token.
    cutoffs = kth_largest([logits], [lambda tokens: max(1, router.rate.k(tokens))], group)
    return top_k_mask(logits, cutoffs, positions, group)


def _by_token(router: ThresholdRouter, logits: Tensor, _: Tensor, __: Group) -> Tensor:
    config = router.config
    assert isinstance(config, ETConfig)
    chosen = logits.topk(int(config.mean_experts), dim=1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)


_SELECT: dict[str, Select] = {
    "et": _by_threshold,
    "et-capacity": _within_capacity,
    "ec": _by_expert,
    "tc": _by_token,
}
