"""Experts to which a text is routed, with margins and the losses of its tokens."""

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
    """Routing of the tokens of one text.

    Attributes:
        layers: Numbers of the MoE layers, counted from 0 over all layers.
        maps: bool `[layers, tokens, experts]`, which expert takes which token.
        margins: fp32 `[layers, tokens, experts]`, see :meth:`ETRouter.margins`.
        losses: fp32 `[tokens]`, cross-entropy of each token after those before it, in nats; NaN
            for the first, which nothing predicts.
    """

    layers: list[int]
    maps: Tensor
    margins: Tensor
    losses: Tensor

    @property
    def fan_out(self) -> Tensor:
        """Number of routed experts of each token, int64 `[layers, tokens]`."""
        return self.maps.sum(dim=-1)


def route_text(trained: TrainedModel, tokens: list[int]) -> TextRouting:
    """Route a text as evaluation and generation do. Every rank must call it.

    Returns:
        The routing, the same on every rank.

    Raises:
        ValueError: The text has no token or more than the model's length, or the model has no
            experts.
    """
    if not 0 < len(tokens) <= trained.max_length:
        raise ValueError(
            f"The text has {len(tokens)} tokens, but the model takes 1 to {trained.max_length}."
        )
    routed: dict[int, tuple[Tensor, Tensor]] = {}

    def add(router: Any, logits: Tensor, routing_map: Tensor) -> None:
        routed[router.layer_number - 1] = routing_map.cpu(), router.margins(logits).cpu()

    text = torch.tensor([tokens], device=torch.cuda.current_device())
    with record_routing(routers_of([trained.module]), add):
        logits = full_logits(trained, text)
    losses = None if logits is None else _losses(logits[0], text[0])
    pipeline = trained.groups.pp
    stages: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(stages, (routed, losses), group=pipeline)
    layers = sorted(layer for stage, _ in stages for layer in stage)
    if not layers:
        raise ValueError("The model has no experts.")
    by_layer = {layer: pair for stage, _ in stages for layer, pair in stage.items()}
    maps, margins = (torch.stack([by_layer[layer][i] for layer in layers]) for i in (0, 1))
    return TextRouting(layers, maps, margins, stages[-1][1])


def check_margins(config: TransformerConfig) -> None:
    """Refuse models without experts, and those whose router compares more than scores.

    Raises:
        UserError: The model is one of these.
    """
    assert isinstance(config, ETConfig)
    if not any(moe_layer_pattern(config)):
        raise UserError(
            "The model is dense. Choose one with experts, whose routing can be inspected."
        )
    for name in config.router.without_margins:
        if getattr(config, name, None):
            raise UserError(
                f"The model was trained with --{name.replace('_', '-')}, so its routing depends on "
                "more than a token's scores and has no margins. Choose one trained without it."
            )


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the losses `[n]` of `tokens [n]` by the `logits [n, vocabulary]` after each token."""
    nats = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
    return torch.cat([nats.new_full((1,), torch.nan), nats]).cpu()
