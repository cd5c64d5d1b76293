"""Calibration of thresholds so that every expert takes its share of a text.

The cutoffs of a layer depend on its input, and this on the thresholds of the layers before it. So
the layers are calibrated in order, and the whole text passes through a layer before the next one:
its logits come from layers that route by their final thresholds. On the same text, the resulting
model gives each expert exactly its share. Logits collected under expert choice would come from
layers that route by another rule, batch by batch, and would have to be averaged.

A layer with experts runs twice, first with thresholds that nothing exceeds. This costs only the
shared expert, and no router has to be called separately.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.inference.forward import full_logits
from megatron_ext.inference.loading import TrainedModel
from megatron_ext.model.cached_layer import FeedForwardLayer
from megatron_ext.moe.order_statistics import RankOf, kth_largest
from megatron_ext.moe.router import routers_of
from megatron_ext.moe.threshold_router import ThresholdRouter, threshold_routers


class _RankBatches:
    """This data-parallel rank's sequences in batches, as many as on every other rank.

    The replicas of the model share experts, so all must run each batch together. A rank with fewer
    sequences repeats the first, which is not counted.
    """

    def __init__(self, trained: TrainedModel, sequences: Tensor, batch_size: int) -> None:
        group = trained.groups.dp
        rounds = -(-len(sequences) // group.size())
        numbers = torch.arange(group.rank(), rounds * group.size(), group.size())
        counted = numbers < len(sequences)
        tokens = sequences[numbers.where(counted, 0)].to(torch.cuda.current_device())
        self.batches = list(zip(tokens.split(batch_size), counted.split(batch_size), strict=True))


@torch.no_grad()
def calibrate(
    trained: TrainedModel,
    sequences: Tensor,
    batch_size: int = 8,
    layer_done: Callable[[int], None] = lambda layer: None,
) -> dict[int, Tensor]:
    """Set the thresholds of every layer to the cutoffs of a text at the model's rate.

    All ranks must call it.

    Args:
        trained: Model with thresholds, whatever their values.
        sequences: int64 `[sequences, length]`, the same on all ranks.
        batch_size: Sequences in a forward pass.
        layer_done: Called with the number of each layer, counted from 0, when it is calibrated.

    Returns:
        For each layer with experts, counted from 0, its cutoffs, fp32 `[experts]`: the k-th
        largest logit of each expert. The same on every rank.

    Raises:
        UserError: The text has too few tokens for an expert to take one.
    """
    model, pipeline = trained.model, trained.groups.pp
    share = _RankBatches(trained, sequences, batch_size)
    rotary = model.rotary_pos_emb(sequences.shape[1])
    hidden = [_first_hidden(trained, tokens) for tokens, _ in share.batches]  # [length, batch, h]
    cutoffs: dict[int, Tensor] = {}
    for layer in model.decoder.layers:
        for router in threshold_routers(routers_of([layer])):
            if router.rate.k(sequences.numel()) < 1:
                raise UserError(
                    f"The text has {sequences.numel()} tokens, too few for an expert to take one. "
                    "Use a longer text."
                )
            logits = _logits(layer, router, hidden, share, rotary)
            # Halfway to the next largest: rounding moves no token across it.
            k = router.rate.k
            ranks: list[RankOf] = [k, partial(_next_rank, k)]
            cutoff, following = kth_largest([logits] * 2, ranks, trained.groups.dp).value.chunk(2)
            router.thresholds.start_at((cutoff + following) / 2)
            cutoffs[layer.layer_number - 1] = cutoff.cpu()
        hidden = [layer(h, attention_mask=None, rotary_pos_emb=rotary)[0] for h in hidden]
        if isinstance(layer, FeedForwardLayer):  # the second half of a transformer layer
            layer_done(layer.layer_number - 1)
    if pipeline.rank() + 1 < pipeline.size():
        for h in hidden:
            dist.send(h.contiguous(), group=pipeline, group_dst=pipeline.rank() + 1)
    return _gather_stages(trained, cutoffs)


def _next_rank(k: RankOf, tokens: int) -> int:
    return min(k(tokens) + 1, tokens)


def _first_hidden(trained: TrainedModel, tokens: Tensor) -> Tensor:
    """Return the input of this stage's first layer, `[length, batch, hidden]`."""
    model, pipeline = trained.model, trained.groups.pp
    batch, length = tokens.shape
    if pipeline.rank() == 0:
        positions = torch.arange(length, device=tokens.device).expand(batch, -1)
        return model.embedding(input_ids=tokens, position_ids=positions)
    shape = (length, batch, model.config.hidden_size)
    hidden = torch.empty(shape, dtype=trained.args.params_dtype, device=tokens.device)
    dist.recv(hidden, group=pipeline, group_src=pipeline.rank() - 1)
    return hidden


def _logits(
    layer: Any, router: ThresholdRouter, hidden: list[Tensor], share: _RankBatches, rotary: Tensor
) -> Tensor:
    """Return a layer's logits of this rank's tokens that count, fp32 `[tokens, experts]`."""
    batches: list[Tensor] = []
    hook = router.register_forward_pre_hook(
        lambda _, inputs: batches.append(router.gating(inputs[0]).float())
    )
    router.thresholds.start_at(torch.full_like(router.thresholds.average, torch.inf))
    for h in hidden:
        layer(h, attention_mask=None, rotary_pos_emb=rotary)
    hook.remove()
    counted = [
        logits.view(*h.shape[:2], -1)[:, real].flatten(0, 1)
        for logits, h, (_, real) in zip(batches, hidden, share.batches, strict=True)
    ]
    return torch.cat(counted)


@dataclass(frozen=True)
class RoutingQuality:
    """Balance of a model's routing on a text, and its loss.

    Attributes:
        load: Share of tokens that each expert takes, fp64 `[experts]`, by layer with experts,
            counted from 0.
        no_expert: Share of tokens without a routed expert, by layer.
        loss: Mean loss in nats per token.
        tokens: Number of routed tokens.
    """

    load: dict[int, Tensor]
    no_expert: dict[int, float]
    loss: float
    tokens: int

    def fan_out(self, layer: int) -> float:
        """Return the mean number of routed experts per token."""
        return float(self.load[layer].sum())


@torch.no_grad()
def measure_routing(
    trained: TrainedModel, sequences: Tensor, batch_size: int = 8
) -> RoutingQuality:
    """Route and predict a text as evaluation does. All ranks must call it, with the same text.

    Args:
        trained: Model with any router.
        sequences: int64 `[sequences, length]`.
        batch_size: Sequences in a forward pass.
    """
    groups, share = trained.groups, _RankBatches(trained, sequences, batch_size)
    routers = {router.layer_number - 1: router for router in routers_of([trained.module])}
    maps: dict[int, Tensor] = {}

    def record(router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        maps[router.layer_number - 1] = output[1].bool()

    hooks = [router.register_forward_hook(record) for router in routers.values()]
    counts = {
        layer: torch.zeros(router.num_experts + 1, dtype=torch.float64)
        for layer, router in routers.items()
    }
    loss = torch.zeros((), dtype=torch.float64)
    for tokens, real in share.batches:
        logits = full_logits(trained, tokens)
        for layer, routing_map in maps.items():  # tokens in the order of [length, batch]
            chosen = routing_map.view(tokens.shape[1], len(tokens), -1)[:, real].flatten(0, 1)
            counts[layer][:-1] += chosen.sum(dim=0).cpu()
            counts[layer][-1] += (~chosen.any(dim=1)).sum().cpu()
        if logits is not None and real.any():
            predictions = logits[real, :-1].float().flatten(0, 1)
            loss += F.cross_entropy(predictions, tokens[real, 1:].flatten(), reduction="sum").cpu()
    for hook in hooks:
        hook.remove()
    for total in (*counts.values(), loss):
        _sum(total, groups.dp)
    counts = _gather_stages(trained, counts)
    losses: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(losses, float(loss), group=groups.pp)
    return RoutingQuality(
        load={layer: count[:-1] / sequences.numel() for layer, count in counts.items()},
        no_expert={layer: float(count[-1]) / sequences.numel() for layer, count in counts.items()},
        loss=losses[-1] / (len(sequences) * (sequences.shape[1] - 1)),
        tokens=sequences.numel(),
    )


def _sum(total: Tensor, group: dist.ProcessGroup) -> None:
    """Sum over ranks in place, on the device that the backend needs."""
    device = total.to(torch.cuda.current_device())
    dist.all_reduce(device, group=group)
    total.copy_(device)


def _gather_stages(trained: TrainedModel, layers: dict[int, Tensor]) -> dict[int, Tensor]:
    """Gather values by layer from all pipeline stages, in the order of the layers."""
    stages: list[Any] = [None] * trained.groups.pp.size()
    dist.all_gather_object(stages, layers, group=trained.groups.pp)
    return dict(sorted((layer, value) for stage in stages for layer, value in stage.items()))
