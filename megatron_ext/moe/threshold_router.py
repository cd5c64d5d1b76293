"""Expert threshold and expert choice."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_ext.config import ETConfig
from megatron_ext.moe.order_statistics import kth_largest, top_k_mask
from megatron_ext.moe.router import ETRouter
from megatron_ext.moe.routing_metrics import above_threshold, layer_metrics, token_count
from megatron_ext.moe.step_cutoffs import StepCutoffs, resolve_buffered_logits
from megatron_ext.moe.threshold_estimators import StepCounts
from megatron_ext.moe.thresholds import Thresholds, select_by_threshold
from megatron_ext.sequence import sequence_positions

GATES = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "relu": F.relu,
}


class ThresholdRouter(ETRouter):
    """Expert threshold and expert choice.

    In training with expert choice, and during warm-up, an expert takes its k largest logits of
    the micro-batch over all ranks. Otherwise it takes the logits above its threshold. Forward
    only reads thresholds; :meth:`commit` moves them by the cutoffs of the step.

    Attributes:
        rate: Share of a pool's tokens that an expert takes.
        thresholds: One threshold per expert.
    """

    cutoffs: StepCutoffs

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
        self.ranks = tuple(g.rank() for g in (pg_collection.dp, pg_collection.cp, pg_collection.tp))
        self.cp_size, self.tp_size = pg_collection.cp.size(), pg_collection.tp.size()
        self.thresholds = Thresholds(
            config.num_moe_experts,
            config.et_ema_decay,
            device=torch.cuda.current_device(),
            adaptive=config.et_threshold_estimator == "adaptive",
        )
        whole_step = config.et_cutoff_pool == "step"
        self.cutoffs = StepCutoffs(self.rate.k, whole_step, config.logit_buffer_bytes)
        # Cutoffs, fp32 [experts], and counts of the step, until commit or discard.
        self._step: tuple[Tensor, StepCounts] | None = None

    @property
    def expert_choice_phase(self) -> bool:
        """Whether training routes by expert choice at present."""
        config = cast(ETConfig, self.config)
        # Without thresholds, expert choice is the only rule, also after the warm-up.
        warming_up = self.thresholds.update_count < max(config.et_warmup_iters, 1)
        return not config.router.trains_by_threshold or warming_up

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens by their logits; see :meth:`ETRouter.routing`."""
        sequence, batch = logits.shape[:2]
        logits = logits.reshape(-1, self.num_experts).float()
        counting = self.counting
        with torch.no_grad():
            # All ranks resolve together: Megatron gives them micro-batches of one shape.
            if counting and not self.cutoffs.has_room(logits.numel() * logits.element_size()):
                resolve_buffered_logits([self.cutoffs], self.pool_group)
            positions = self._positions(sequence, batch, logits.device)
            if padding_mask is None:
                routing_map = self.select(logits.detach(), positions, counting)
            else:
                real = ~padding_mask.reshape(-1)
                routing_map = torch.zeros_like(logits, dtype=torch.bool)
                routing_map[real] = self.select(logits.detach()[real], positions[real], counting)
        return self.gates(logits) * routing_map, routing_map

    def select(self, logits: Tensor, positions: Tensor, counting: bool) -> Tensor:
        """Return the routing map of a micro-batch.

        Args:
            logits: fp32 `[tokens, experts]`, without padding.
            positions: int64 `[tokens]`, see :meth:`_positions`.
            counting: Whether to count the decisions and collect what the end of the step needs.

        Returns:
            bool `[tokens, experts]`.
        """
        config = cast(ETConfig, self.config)
        if self.frozen or not self.training:
            return logits > self.thresholds.value()
        above = logits > self.thresholds.value() if self.thresholds.update_count else None
        whole_step = self.cutoffs.whole_step
        if self.expert_choice_phase:
            bracket = self.cutoffs.bracket()
            cutoffs = kth_largest([logits], [self.rate.k], self.pool_group, [bracket])
            routing_map = top_k_mask(logits, cutoffs, positions, self.pool_group)
            if counting:
                self.counts.add(routing_map, above)
                if whole_step:
                    self.cutoffs.observe(cutoffs.value)
                    self.cutoffs.keep(logits)
                else:
                    self.cutoffs.add(cutoffs.value)
        else:
            group = self.pool_group if config.et_capacity_pool == "global" else None
            routing_map = select_by_threshold(
                logits, self.thresholds.value(), self.rate, positions, group
            )
            if counting:
                self.counts.add(routing_map, above, by_threshold=True)
                self.cutoffs.keep(logits)
        return routing_map

    def margins(self, logits: Tensor) -> Tensor:
        """Return the logits minus the thresholds of their experts; see :meth:`ETRouter.margins`."""
        return logits - self.thresholds.value()

    def gates(self, logits: Tensor) -> Tensor:
        """Return the function `--et-gate` of the logits; see :meth:`ETRouter.gates`."""
        return GATES[cast(ETConfig, self.config).et_gate](logits)

    def resolve(self, counts: Tensor) -> dict[str, Any]:
        """End the collection of a step's cutoffs and counts; see :meth:`ETRouter.resolve`."""
        pools = len(self.cutoffs.values)
        cutoff = self.cutoffs.take()
        above, packed = above_threshold(counts), counts.cpu()
        tokens = token_count(packed)
        self._step = cutoff, StepCounts(above, pools * self.rate.k(tokens // pools), tokens)
        threshold = self.thresholds.value() if self.thresholds.update_count else None
        rate = self.rate
        k_min_rate = 0.0 if rate.capacity is None else float(rate.rate * (1 - rate.capacity))
        self.counts.reset()
        return layer_metrics(packed, threshold, cutoff, k_min_rate)

    def commit(self) -> None:
        """Move the thresholds by the cutoffs of the step."""
        if self._step is not None:
            self.thresholds.update(*self._step)
        self._step = None

    def discard(self) -> None:
        """Drop the cutoffs of the step: the thresholds stay where they are."""
        self._step = None

    def _positions(self, sequence: int, batch: int, device: torch.device) -> Tensor:
        """Return the positions of this rank's tokens in the micro-batch, int64 `[tokens]`.

        The same token has the same position for every layout: sample by sample, as Megatron's
        samplers deal samples out to data-parallel ranks, then along the sequence.
        """
        dp_rank, cp_rank, tp_rank = self.ranks
        length = sequence * self.tp_size  # of the part of a sequence that a CP rank holds
        index = sequence_positions(length, cp_rank, self.cp_size, device)
        index = index[tp_rank * sequence : (tp_rank + 1) * sequence]
        sample = torch.arange(batch, device=device) + dp_rank * batch
        return (sample * (length * self.cp_size) + index.unsqueeze(1)).view(-1)


def threshold_routers(routers: Iterable[ETRouter]) -> list[ThresholdRouter]:
    """Return those routers that have thresholds."""
    return [router for router in routers if isinstance(router, ThresholdRouter)]
