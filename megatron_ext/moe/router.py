"""Routers of MoE layers: expert threshold, expert choice, and token choice for comparison.

Naming follows Megatron's TopKRouter:
    logits: what the router's linear map gives, fp32 `[tokens, experts]`.
    probs: the weights of the experts' outputs, zero where not selected.
    routing_map: which expert takes which token, bool.
and the paper's (arXiv 2603.11535):
    cutoff: an expert's k-th largest logit over the routing pool, of one micro-batch or step.
    threshold: the moving average of an expert's cutoffs.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import Router, TopKRouter
from torch import Tensor

from megatron_ext.config import ETConfig
from megatron_ext.moe.forecast import Forecast
from megatron_ext.moe.order_statistics import Group, Pool, kth_largest, top_k_mask
from megatron_ext.moe.routing_metrics import RoutingCounts
from megatron_ext.moe.thresholds import Thresholds, select_by_threshold
from megatron_ext.sequence import sequence_positions

GATES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "relu": F.relu,
}


class ThresholdRouter(Router):
    """Expert threshold and expert choice.

    In training with expert choice, and during warm-up, an expert takes its k largest logits of
    the micro-batch over all ranks. Otherwise it takes the logits above its threshold. Forward
    only reads thresholds. What the end of the step needs to move them is kept in `kept_logits`
    and `cutoffs`, once per micro-batch however often recomputation repeats the forward pass.

    Attributes:
        frozen: training routes as evaluation does, by thresholds alone, and keeps nothing: of a
            token's experts nothing depends on the other tokens.
    """

    frozen = False

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        assert isinstance(config, ETConfig) and pg_collection is not None
        assert config.num_moe_experts is not None
        self.rate = config.routing_rate
        self.gate = GATES[config.et_gate]
        # The tokens of a micro-batch are spread over these ranks, each token on one of them:
        # tensor parallelism needs sequence parallelism here, see MoELayer.forward.
        self.pool_group = pg_collection.tp_dp_cp
        self.ranks = tuple(g.rank() for g in (pg_collection.dp, pg_collection.cp, pg_collection.tp))
        self.cp_size, self.tp_size = pg_collection.cp.size(), pg_collection.tp.size()
        self.thresholds = Thresholds(
            config.num_moe_experts, config.et_ema_decay, device=torch.cuda.current_device()
        )
        self.counts = RoutingCounts(config.num_moe_experts)
        self.forecast = Forecast()
        self.kept_logits: list[Tensor] = []
        self.cutoffs: list[Tensor] = []

    @property
    def pools_whole_step(self) -> bool:
        """Whether a cutoff is taken over all tokens of the step, not of each micro-batch."""
        return cast(ETConfig, self.config).et_cutoff_pool == "step"

    @property
    def kept_pools(self) -> list[Pool]:
        """The kept logits by the pools that cutoffs are taken over."""
        if self.kept_logits and self.pools_whole_step:
            return [self.kept_logits]
        return list(self.kept_logits)

    @property
    def expert_choice_phase(self) -> bool:
        """Whether training routes by expert choice at present."""
        config = cast(ETConfig, self.config)
        # A model without thresholds has none to go by, warm-up or not.
        warming_up = self.thresholds.update_count < max(config.et_warmup_iters, 1)
        return config.router_type == "expert-choice" or warming_up

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route hidden states `[sequence, batch, hidden]`; see :meth:`routing`."""
        return self.routing(self.gating(input), padding_mask)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens by their logits.

        Args:
            logits: `[sequence, batch, experts]`, this rank's part.
            padding_mask: bool `[sequence, batch]`, True where a token is padding.

        Returns:
            probs, fp32 `[tokens, experts]`, and routing map, bool `[tokens, experts]`.
        """
        counting = self.training and torch.is_grad_enabled() and not self.frozen
        sequence, batch = logits.shape[:2]
        logits = logits.reshape(-1, self.num_experts).float()
        with torch.no_grad():
            if counting:
                self._make_room(logits.numel() * logits.element_size())
            positions = self._positions(sequence, batch, logits.device)
            if padding_mask is None:
                routing_map = self._select(logits.detach(), positions, counting)
            else:
                real = ~padding_mask.reshape(-1)
                routing_map = torch.zeros_like(logits, dtype=torch.bool)
                routing_map[real] = self._select(logits.detach()[real], positions[real], counting)
        return self.gate(logits) * routing_map, routing_map

    def _select(self, logits: Tensor, positions: Tensor, counting: bool) -> Tensor:
        """The routing map of `logits [tokens, experts]`, keeping what the step's end needs."""
        config = cast(ETConfig, self.config)
        if self.frozen or not self.training:
            return logits > self.thresholds.value()
        above = logits > self.thresholds.value() if self.thresholds.update_count else None
        if self.expert_choice_phase:
            bracket = self.forecast.bracket()
            cutoffs = kth_largest([logits], [self.rate.k], self.pool_group, [bracket])
            routing_map = top_k_mask(logits, cutoffs, positions, self.pool_group)
            if counting:
                self.forecast.observe(cutoffs.value)
                self.counts.add(routing_map, above)
            if counting and not self.pools_whole_step:
                self.cutoffs.append(cutoffs.value)
        else:
            group = self.pool_group if config.et_capacity_pool == "global" else None
            routing_map = select_by_threshold(
                logits, self.thresholds.value(), self.rate, positions, group
            )
            if counting:
                self.counts.add(routing_map, above, by_threshold=True)
        if counting and (self.pools_whole_step or not self.expert_choice_phase):
            self.kept_logits.append(logits)
        return routing_map

    def _make_room(self, nbytes: int) -> None:
        """Resolve what is kept when the next micro-batch's logits would exceed the bound.

        All ranks come here together: Megatron gives them micro-batches of one shape.
        """
        bound = cast(ETConfig, self.config).kept_logits_bytes
        if not self.pools_whole_step and (len(self.kept_logits) + 1) * nbytes > bound:
            resolve_kept_logits([self], self.pool_group)

    def _positions(self, sequence: int, batch: int, device: torch.device) -> Tensor:
        """Where this rank's tokens stand in the micro-batch of all ranks, int64 `[tokens]`.

        The same token has the same position for every layout: sample by sample, as Megatron's
        samplers deal samples out to data-parallel ranks, then along the sequence.
        """
        dp_rank, cp_rank, tp_rank = self.ranks
        length = sequence * self.tp_size  # of the part of a sequence that a CP rank holds
        index = sequence_positions(length, cp_rank, self.cp_size, device)
        index = index[tp_rank * sequence : (tp_rank + 1) * sequence]
        sample = torch.arange(batch, device=device) + dp_rank * batch
        return (sample * (length * self.cp_size) + index.unsqueeze(1)).view(-1)


def resolve_kept_logits(
    routers: Sequence[ThresholdRouter], group: Group, counts: Tensor | None = None
) -> None:
    """Turn what the routers of a pipeline stage keep into cutoffs, all in one search.

    Args:
        routers: the routers, in the same order on all ranks.
        group: the ranks that share the pools.
        counts: int64 of any shape, summed over the ranks in place by a reduction of the search.
    """
    pools = [pool for router in routers for pool in router.kept_pools]
    if not pools:
        if counts is not None:
            dist.all_reduce(counts, group=group)
        return
    brackets = [router.forecast.bracket() for router in routers for _ in router.kept_pools]
    found = kth_largest(pools, [routers[0].rate.k] * len(pools), group, brackets, counts)
    values = iter(found.value.view(len(pools), -1))  # [pools, experts]
    for router in routers:
        for _ in router.kept_pools:
            router.cutoffs.append(next(values))
            router.forecast.observe(router.cutoffs[-1])
        router.kept_logits = []


class TokenChoiceRouter(TopKRouter):
    """Megatron's top-k router, counted like the others.

    Two slips of megatron-core 0.19.2 in loss-free balancing are mended, so that it is a fair
    baseline: padding was refused for a missing dimension, and in bf16 the counts were rounded, so
    that the bias could move the wrong way.
    """

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

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route by the top k logits of each token; see TopKRouter.routing."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                real = slice(None) if padding_mask is None else ~padding_mask.reshape(-1)
                self.counts.add(routing_map[real])
        return probs, routing_map

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        super()._apply_expert_bias(routing_map)

    def _maintain_float32_expert_bias(self) -> None:
        super()._maintain_float32_expert_bias()
        counts = self.local_tokens_per_expert
        if counts is not None and counts.dtype != torch.float32:
            counts.data = counts.data.float()
