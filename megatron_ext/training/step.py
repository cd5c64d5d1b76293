"""End of an optimizer step: resolution of the cutoffs and update of the thresholds.

Megatron's trainer calls `finalize_model_grads` after the last backward pass and before the
optimizer. There the cutoffs of all layers are resolved together. The thresholds are updated only
after the optimizer has stepped: a skipped or repeated step leaves them unchanged.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_ext.moe.router import ETRouter, routers_of
from megatron_ext.moe.step_cutoffs import resolve_buffered_logits


class RoutingStep:
    """Updates of the routers between two optimizer steps.

    Attributes:
        metrics: Routing metrics of the last finished step by layer number, the same on all ranks
            of a pipeline stage.
    """

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, Any]] = {}
        self._routers: list[ETRouter] = []  # resolved, but neither committed nor discarded

    def finalize_model_grads(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Run Megatron's function of that name, then resolve the cutoffs of this step."""
        finalize_model_grads(model, *args, **kwargs)
        self.resolve(routers_of(model))

    @torch.no_grad()
    def resolve(self, routers: Sequence[ETRouter]) -> None:
        """Compute cutoffs and metrics from the routers' counts and logits, and start a new step."""
        self._routers, self.metrics = list(routers), {}
        if not routers:
            return
        counts = torch.stack([router.counts.packed() for router in routers])
        cutoffs = [router.cutoffs for router in routers if router.cutoffs is not None]
        resolve_buffered_logits(cutoffs, routers[0].pool_group, counts)
        for router, packed in zip(routers, counts, strict=True):
            self.metrics[router.layer_number - 1] = router.resolve(packed)

    def commit(self) -> None:
        """Update the routers after the optimizer has stepped."""
        for router in self._routers:
            router.commit()
        self._routers = []

    def discard(self) -> None:
        """Leave the routers unchanged after a skipped step."""
        for router in self._routers:
            router.discard()
        self._routers = []


def commit_after(train_step: Callable[..., Any], step: RoutingStep) -> Callable[..., Any]:
    """Wrap Megatron's `train_step` so that the routers are updated if the optimizer stepped."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        skipped = result[1]
        if skipped:
            step.discard()
        else:
            step.commit()
        return result

    return wrapped
