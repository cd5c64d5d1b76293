"""Which experts a text is routed to, by how much, and how well the text is predicted."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_ext.config import ETConfig, moe_layer_pattern
from megatron_ext.errors import UserError
from megatron_ext.inference.forward import full_logits
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.moe.record_routing import record_routing
from megatron_ext.moe.router import routers_of


@dataclass(frozen=True)
class TextRouting:
    """Where the tokens of one text went.

    Attributes:
        layers: numbers of the MoE layers, counted from 0 over all layers.
        maps: bool `[layers, tokens, experts]`.
        margins: fp32 `[layers, tokens, experts]`, see :meth:`ETRouter.margins`.
        losses: fp32 `[tokens]`, nats: how surprising each token was after those before it; NaN for
            the first, which nothing predicts.
    """

    layers: list[int]
    maps: Tensor
    margins: Tensor
    losses: Tensor

    @property
    def fan_out(self) -> Tensor:
        """Number of routed experts each token has, int64 `[layers, tokens]`."""
        return self.maps.sum(dim=-1)


def route_text(trained: TrainedModel, tokens: list[int]) -> TextRouting:
    """Route a text as evaluation and generation do; the result is the same on every rank.

    Raises:
        ValueError: no token, more than the model's length, or a model without experts.
    """
    if not 0 < len(tokens) <= trained.max_length:
        raise ValueError(f"{len(tokens)} tokens: routing takes 1 to {trained.max_length}")
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(router: Any, logits: Tensor, routing_map: Tensor) -> None:
        found[router.layer_number - 1] = routing_map.cpu(), router.margins(logits).cpu()

    text = torch.tensor([tokens], device=torch.cuda.current_device())
    with record_routing(routers_of([trained.module]), keep):
        logits = full_logits(trained, text)
    losses = None if logits is None else _losses(logits[0], text[0])
    pipeline = trained.groups.pp
    stages: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(stages, (found, losses), group=pipeline)
    layers = sorted(layer for stage, _ in stages for layer in stage)
    if not layers:
        raise ValueError("the model has no experts")
    everywhere = {layer: pair for stage, _ in stages for layer, pair in stage.items()}
    maps, margins = (torch.stack([everywhere[layer][i] for layer in layers]) for i in (0, 1))
    return TextRouting(layers, maps, margins, stages[-1][1])


def check_margins(config: TransformerConfig) -> None:
    """Refuse models without experts, and those whose router compares more than scores.

    Raises:
        UserError: The model is one of these.
    """
    assert isinstance(config, ETConfig)
    if not any(moe_layer_pattern(config)):
        raise UserError("the model is dense: it has no experts whose routing could be inspected")
    for name in config.router.without_margins:
        if getattr(config, name, None):
            raise UserError(
                f"the model was trained with --{name.replace('_', '-')}: its routing depends on "
                "more than a token's scores, so there is no margin to show"
            )


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Losses of `tokens [n]` by `logits [n, vocabulary]`, which follow each token."""
    nats = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
    return torch.cat([nats.new_full((1,), torch.nan), nats]).cpu()
