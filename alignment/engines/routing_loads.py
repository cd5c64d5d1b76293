"""Mean fan-out and largest load of the experts in a training step of a judge or policy.

Routers are frozen while a model is aligned: they route as in evaluation and count nothing. Their
decisions are counted here, on tokens that are not padding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from alignment.engines.batch import PADDING, TokenBatch
from alignment.engines.log_probs import TokenScorer
from megatron_ext.moe.candidates import column_counts
from megatron_ext.moe.router import ETRouter


class RoutingLoads:
    """Counts of the tokens that each expert of this rank's layers takes in a step."""

    def __init__(self, parts: Sequence[TokenBatch], groups: ProcessGroupCollection) -> None:
        """Create empty counts.

        Args:
            parts: Micro-batches in the order in which they will run.
            groups: Process groups whose ranks share rows (cp), a row's tokens (tp) and layers (pp).
        """
        self._groups = groups
        self._real = [_real_tokens(part, groups) for part in parts]
        self._runs: dict[int, int] = {}
        self._counts: dict[int, Tensor] = {}

    @contextmanager
    def recorded(self, routers: Sequence[ETRouter]) -> Iterator[None]:
        """Count the decisions of some routers in this block."""
        hooks = [router.register_forward_hook(self._record) for router in routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _record(self, router: Any, _: object, output: tuple[Tensor, Tensor]) -> None:
        """Count one layer's decisions on the next micro-batch."""
        layer, routed = router.layer_number, output[1].bool()
        run = self._runs.get(layer, 0)
        if run == len(self._real):  # recomputation
            return
        self._runs[layer] = run + 1
        counts = column_counts(routed[self._real[run].to(routed.device)].contiguous())
        self._counts[layer] = self._counts.get(layer, 0) + counts

    def metrics(self) -> dict[str, float]:
        """Return the mean over all layers and the largest load, on every rank; a collective.

        Returns:
            `moe/fan_out`, the mean number of experts per token, and `moe/largest_load`, the
            tokens of the busiest expert of any layer divided by the mean. Empty without experts.
        """
        tokens = sum(int(real.sum()) for real in self._real)
        local_counts = (tokens, {layer: counts.tolist() for layer, counts in self._counts.items()})
        ranks: list[tuple[int, dict[int, list[int]]]] = [local_counts] * dist.get_world_size()
        dist.all_gather_object(ranks, local_counts)
        layers: dict[int, list[int]] = {}
        counts_of_layer: dict[int, int] = {}
        for count, loads in ranks:
            for layer, load in loads.items():
                before = layers.get(layer, [0] * len(load))
                layers[layer] = [a + b for a, b in zip(before, load)]
                counts_of_layer[layer] = counts_of_layer.get(layer, 0) + count
        sums = {layer: sum(load) for layer, load in layers.items()}
        if not layers or not all(sums.values()):
            return {}
        fan_outs = [sums[layer] / counts_of_layer[layer] for layer in layers]
        return {
            "moe/fan_out": sum(fan_outs) / len(fan_outs),
            "moe/largest_load": max(
                max(load) * len(load) / sums[layer] for layer, load in layers.items()
            ),
        }


def _real_tokens(part: TokenBatch, groups: ProcessGroupCollection) -> Tensor:
    """Return which of the tokens that this rank's routers receive, in order, are not padding."""
    samples = part.samples[:, TokenScorer(part, groups).places].T  # [length, rows]
    return samples.chunk(groups.tp.size())[groups.tp.rank()].flatten() != PADDING
