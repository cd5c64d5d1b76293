"""Base class of the routers of MoE layers.

Naming follows Megatron's TopKRouter:
    logits: output of the router's linear map, fp32 `[tokens, experts]`.
    probs: weights of the experts' outputs, zero where an expert is not selected.
    routing_map: which expert takes which token, bool.
and the paper's (arXiv 2603.11535):
    cutoff: an expert's k-th largest logit over the routing pool, of one micro-batch or step.
    threshold: the moving average of an expert's cutoffs.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_ext.moe.routing_metrics import RoutingCounts, layer_metrics
from megatron_ext.moe.step_cutoffs import StepCutoffs


class ETRouter(Router):
    """Megatron's router with counts, margins and an end of the optimizer step.

    A router that decides by a token's own logits implements :meth:`margins` and, unless the weight
    of an expert is its softmax, :meth:`gates`. One that compares tokens overrides :meth:`routing`,
    and calls :meth:`count` there. One that learns from whole steps also sets `cutoffs` or overrides
    :meth:`resolve`, :meth:`commit` and :meth:`discard`. Forward only reads what these methods
    change, so that recomputation and evaluation have no effect.

    Attributes:
        pool_group: Ranks over which the tokens of a micro-batch are spread, each token on one of
            them: tensor parallelism needs sequence parallelism here, see Megatron's MoELayer.
        counts: Routing decisions of this rank since the last step.
        cutoffs: Cutoffs of this step, for a router that needs them.
        frozen: Whether training routes as evaluation does and nothing is counted.
    """

    cutoffs: StepCutoffs | None = None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        assert config.num_moe_experts is not None and pg_collection is not None
        self.pool_group = pg_collection.tp_dp_cp
        self.counts = RoutingCounts(config.num_moe_experts)
        self.frozen = False

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route hidden states `[sequence, batch, hidden]`; see :meth:`routing`."""
        return self.routing(self.gating(input), padding_mask)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens by their logits: to the experts with a positive margin.

        Args:
            logits: `[sequence, batch, experts]`, this rank's part.
            padding_mask: bool `[sequence, batch]`, True where a token is padding.

        Returns:
            probs, fp32 `[tokens, experts]`, and routing map, bool `[tokens, experts]`.
        """
        logits = logits.reshape(-1, logits.shape[-1]).float()
        routing_map = self.margins(logits.detach()) > 0
        if padding_mask is not None:
            routing_map &= ~padding_mask.reshape(-1, 1)
        self.count(routing_map, padding_mask)
        return self.gates(logits) * routing_map, routing_map

    @abstractmethod
    def margins(self, logits: Tensor) -> Tensor:
        """Return how far each pair of token and expert is from being routed otherwise.

        Args:
            logits: fp32 `[tokens, experts]`.

        Returns:
            fp32 `[tokens, experts]`, positive where the expert is selected.
        """

    def gates(self, logits: Tensor) -> Tensor:
        """Return the weights that experts have where they are selected.

        Args:
            logits: fp32 `[tokens, experts]`.

        Returns:
            fp32 `[tokens, experts]`; gradients reach the router's weights through them.
        """
        return torch.softmax(logits, dim=-1)

    @property
    def counting(self) -> bool:
        """Whether a forward pass counts: not in evaluation, recomputation or alignment."""
        return self.training and torch.is_grad_enabled() and not self.frozen

    def count(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the decisions of one micro-batch, if this forward pass counts."""
        if self.counting:
            with torch.no_grad():
                real = slice(None) if padding_mask is None else ~padding_mask.reshape(-1)
                self.counts.add(routing_map[real])

    def freeze(self, frozen: bool = True) -> None:
        """Route as evaluation does from now on, also in training, and count nothing.

        The experts of a token then depend on that token alone.
        """
        self.frozen = frozen

    def resolve(self, counts: Tensor) -> dict[str, Any]:
        """End the collection of a step's statistics, before the optimizer steps.

        Args:
            counts: `self.counts.packed()`, summed over ranks.

        Returns:
            The layer's routing metrics of this step, by name.
        """
        self.counts.reset()
        return layer_metrics(counts, None, None, 0.0)

    def commit(self) -> None:
        """Update the router's state: the optimizer has stepped."""

    def discard(self) -> None:
        """Leave the router's state as it is: the optimizer skipped the step."""


def routers_of(model: Sequence[torch.nn.Module]) -> list[ETRouter]:
    """Return the MoE routers of this pipeline stage in the order of their layers."""
    routers = [
        module
        for chunk in unwrap_model(list(model))
        for module in chunk.modules()
        if isinstance(module, ETRouter)
    ]
    return sorted(routers, key=lambda router: router.layer_number)
