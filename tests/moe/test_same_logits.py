"""Tests that the same logits give the same bits on every layout."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import megatron
from tests.distributed import run_ranks

BATCH, SEQUENCE, EXPERTS = 4, 32, 4  # of a micro-batch of all ranks
WARMUP, STEPS, MICRO_BATCHES = 2, 5, 2
KINDS = ["normal", "tied", "skewed", "constant"]


def make_logits(kind: str) -> torch.Tensor:
    """Return logits of every step, fp32 `[steps, micro_batches, batch, sequence, experts]`."""
    shape = (STEPS, MICRO_BATCHES, BATCH, SEQUENCE, EXPERTS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    match kind:
        case "tied":
            x = x.round()
        case "skewed":  # samples and ends of sequences, hence ranks, have different distributions
            x += 10 * torch.arange(BATCH).view(-1, 1, 1) + 3 * torch.arange(SEQUENCE).view(-1, 1)
        case "constant":
            x[:] = 0.25
    return x


def my_tokens(router: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples and positions of this rank's tokens, by Megatron's documentation.

    Samples are dealt out to data-parallel ranks in order; context-parallel rank r of n has the
    chunks r and 2n - 1 - r of 2n; sequence parallelism cuts what is left in order.
    """
    (dp, cp, tp), cp_size, tp_size = router.ranks, router.cp_size, router.tp_size
    dp_size = dist.get_world_size() // (cp_size * tp_size)
    samples = torch.arange(BATCH).chunk(dp_size)[dp]
    if cp_size == 1:
        positions = torch.arange(SEQUENCE)
    else:
        chunks = torch.arange(SEQUENCE).chunk(2 * cp_size)
        positions = torch.cat([chunks[cp], chunks[2 * cp_size - 1 - cp]])
    return samples, positions.chunk(tp_size)[tp]


def route(kinds: list[str], flags: list[str]) -> list[dict[str, Any]]:
    """Route and step with each kind of logits; return every rank's results, with maps joined."""
    _, _, model = megatron.start("--et-warmup-iters", str(WARMUP), *flags)
    from megatron_ext.moe.router import routers_of
    from megatron_ext.training.step import RoutingStep

    router = model[0].decoder.layers[-1].mlp.router
    samples, positions = my_tokens(router)
    here = (samples.view(-1, 1), positions)
    step = RoutingStep()
    results = []
    for kind in kinds:
        router.thresholds.average.zero_()
        router.thresholds.updates.zero_()
        router.thresholds.forget_count()
        router.thresholds.restart_filter()
        maps = torch.zeros((STEPS, MICRO_BATCHES, BATCH, SEQUENCE, EXPERTS), dtype=torch.int32)
        figures, thresholds = [], []
        for number, micro_batches in enumerate(make_logits(kind)):
            for index, whole in enumerate(micro_batches):
                part = whole[here].transpose(0, 1).contiguous()  # [sequence, batch, experts]
                _, routing_map = router.routing(part)
                routing_map = routing_map.view(part.shape).transpose(0, 1)
                maps[number, index][here] = routing_map.int()
            step.resolve(routers_of(model))
            step.commit()
            figures.append(step.metrics[1])
            thresholds.append(router.thresholds.value())
        dist.all_reduce(maps)  # every token is on one rank: ones where it is taken
        results.append({"maps": maps, "figures": figures, "thresholds": torch.stack(thresholds)})
    return results


TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
CP2 = ["--context-parallel-size", "2"]
LAYOUTS = {
    "DP 2": (2, []),
    "TP 2": (2, TP2),
    "CP 2": (2, CP2),
    "DP 4": (4, []),
    "DP 2, CP 2": (4, CP2),
    "CP 2, TP 2": (4, [*CP2, *TP2]),
}
POOLS = {
    "cutoffs of micro-batches": ["--et-cutoff-pool", "microbatch"],
    "cutoffs of steps": ["--et-cutoff-pool", "step"],
    "filters": ["--et-threshold-estimator", "adaptive", "--et-cutoff-pool", "microbatch"],
}


def flags_of(ranks: int, layout: list[str], pool: list[str]) -> list[str]:
    divided = ranks // (2 ** (("--context-parallel-size" in layout) + (TP2[0] in layout)))
    micro_batch = ["--micro-batch-size", str(BATCH // divided)]
    capacity = ["--et-capacity", "0.25", "--et-capacity-pool", "global"]
    return [*micro_batch, *capacity, *layout, *pool]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS.values(), ids=list(POOLS))
def test_routing_of_the_same_logits_is_equal_on_every_layout(pool: list[str]) -> None:
    [expected] = run_ranks(route, 1, KINDS, flags_of(1, [], pool))
    for kind, one in zip(KINDS, expected):
        check_against_definition(kind, one, pool[-1])
    for name, (ranks, layout) in LAYOUTS.items():
        for rank, maps in enumerate(run_ranks(route, ranks, KINDS, flags_of(ranks, layout, pool))):
            for kind, one, other in zip(KINDS, expected, maps):
                where = (name, rank, kind)
                assert torch.equal(other["maps"], one["maps"]), where
                assert torch.equal(other["thresholds"], one["thresholds"]), where
                assert other["figures"] == one["figures"], where


def check_against_definition(kind: str, result: dict[str, Any], pool: str) -> None:
    """Check cutoffs by sorting, expert choice by a stable sort, and counts within the capacity."""
    logits, maps = make_logits(kind), result["maps"]
    tokens = BATCH * SEQUENCE
    k = tokens // EXPERTS
    for number in range(STEPS):
        batches = logits[number].reshape(MICRO_BATCHES, tokens, EXPERTS)
        pools = batches if pool == "microbatch" else batches.view(1, -1, EXPERTS)
        ordered = pools.sort(dim=1, descending=True).values
        cutoff = ordered[:, pools.shape[1] // EXPERTS - 1].mean(dim=0)
        assert result["figures"][number]["experts/cutoff"] == cutoff.tolist()
        for batch, chosen in zip(batches, maps[number].view(MICRO_BATCHES, tokens, EXPERTS)):
            if number < WARMUP:
                order = batch.sort(dim=0, descending=True, stable=True).indices[:k]
                assert torch.equal(chosen, torch.zeros_like(chosen).scatter_(0, order, 1))
                continue
            above = (batch > result["thresholds"][number - 1]).sum(dim=0)
            allowed = above.clamp(k * 3 // 4, k * 5 // 4)
            assert chosen.sum(dim=0).tolist() == allowed.tolist()
