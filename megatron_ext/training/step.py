"""The end of an optimizer step: cutoffs of all layers resolved together, then thresholds moved.

Megatron's trainer calls `finalize_model_grads` after the last backward pass and before the
optimizer. There the cutoffs become known. The thresholds move only once the optimizer has in
fact stepped: a skipped or repeated step leaves them alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_ext.config import ETConfig
from megatron_ext.moe.router import ThresholdRouter, TokenChoiceRouter, resolve_kept_logits
from megatron_ext.moe.routing_metrics import routing_figures

AnyRouter = ThresholdRouter | TokenChoiceRouter


class RoutingStep:
    """Owner of what happens to the routers between two optimizer steps.

    Attributes:
        figures: of the last finished step, by layer number, the same on all ranks of a pipeline
            stage.
    """

    def __init__(self, config: ETConfig) -> None:
        self.config = config
        self.figures: dict[int, dict[str, Any]] = {}
        self._pending: list[tuple[ThresholdRouter, Tensor]] = []

    def finalize_model_grads(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Megatron's own work on the gradients, then resolve the cutoffs of this step."""
        finalize_model_grads(model, *args, **kwargs)
        self.resolve(routers_of(model))

    @torch.no_grad()
    def resolve(self, routers: Sequence[AnyRouter]) -> None:
        """Turn what the routers kept into cutoffs and figures, and start a new step in them."""
        self._pending, self.figures = [], {}
        if not routers:
            return
        group = routers[0].pool_group
        counts = torch.stack([router.counts.packed() for router in routers])
        choosing = [router for router in routers if isinstance(router, ThresholdRouter)]
        resolve_kept_logits(choosing, group, counts)
        for router, packed in zip(routers, counts, strict=True):
            cutoff = threshold = None
            if isinstance(router, ThresholdRouter):
                assert router.cutoffs, "a training step without a micro-batch"
                cutoff = torch.stack(router.cutoffs).mean(dim=0)
                router.cutoffs = []
                self._pending.append((router, cutoff))
                if router.thresholds.update_count:
                    threshold = router.thresholds.value()
            self.figures[router.layer_number - 1] = routing_figures(
                packed, threshold, cutoff, self._k_min_rate(router)
            )
            router.counts.reset()

    def commit(self) -> None:
        """The optimizer has stepped: move the thresholds."""
        for router, cutoff in self._pending:
            router.thresholds.update(cutoff)
        self._pending = []

    def discard(self) -> None:
        """The step did not count: leave the thresholds where they are."""
        self._pending = []

    def _k_min_rate(self, router: AnyRouter) -> float:
        if not isinstance(router, ThresholdRouter) or router.rate.capacity is None:
            return 0.0
        return float(router.rate.rate * (1 - router.rate.capacity))


def routers_of(model: Sequence[torch.nn.Module]) -> list[AnyRouter]:
    """The MoE routers of this pipeline stage in the order of their layers."""
    routers = [
        module
        for chunk in unwrap_model(list(model))
        for module in chunk.modules()
        if isinstance(module, ThresholdRouter | TokenChoiceRouter)
    ]
    return sorted(routers, key=lambda router: router.layer_number)


def commit_after(train_step: Callable[..., Any], step: RoutingStep) -> Callable[..., Any]:
    """Megatron's `train_step`, followed by the thresholds' move if the optimizer stepped."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        skipped = result[1]
        if skipped:
            step.discard()
        else:
            step.commit()
        return result

    return wrapped
