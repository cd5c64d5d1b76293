"""Which experts a text is routed to."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.inference.forward import full_logits
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.training.step import routers_of


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one text went.

    Attributes:
        layers: numbers of the MoE layers, counted from 0 over all layers.
        maps: bool `[layers, tokens, experts]`.
    """

    layers: list[int]
    maps: Tensor

    @property
    def fan_out(self) -> Tensor:
        """Number of routed experts each token has, int64 `[layers, tokens]`."""
        return self.maps.sum(dim=-1)


def routing_of(trained: TrainedModel, tokens: list[int]) -> Routing:
    """Route a text as evaluation and generation do; the result is the same on every rank.

    Raises:
        ValueError: no token, more than the model's length, or a model without experts.
    """
    if not 0 < len(tokens) <= trained.max_length:
        raise ValueError(f"{len(tokens)} tokens: routing takes 1 to {trained.max_length}")
    maps: dict[int, Tensor] = {}

    def keep(router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        maps[router.layer_number - 1] = output[1].bool().cpu()

    hooks = [router.register_forward_hook(keep) for router in routers_of([trained.module])]
    try:
        full_logits(trained, torch.tensor([tokens], device=torch.cuda.current_device()))
    finally:
        for hook in hooks:
            hook.remove()
    pipeline = trained.groups.pp
    stages: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(stages, maps, group=pipeline)
    found: dict[int, Tensor] = {layer: m for stage in stages for layer, m in stage.items()}
    if not found:
        raise ValueError("the model has no experts")
    layers = sorted(found)
    return Routing(layers, torch.stack([found[layer] for layer in layers]))
