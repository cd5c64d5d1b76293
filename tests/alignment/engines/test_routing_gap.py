"""Tests of routing in generation and in training, on several layouts and against plain torch."""

import math
from typing import Any

import pytest
import torch

from tests.alignment.engines.engine_runs import LENGTH, TEMPERATURE, samples
from tests.alignment.engines.test_engines import make_expert_threshold
from tests.distributed import run_ranks

LAST, EXPERT = 2, 1  # layer number, from 1; and an expert of it
QUANTILES = {"0.1%": 0.001, "1%": 0.01, "10%": 0.1, "50%": 0.5}
LAYOUTS = [
    (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    (2, {"expert": 2, "micro_batch": 2}),  # each half of the samples
    (4, {"pipeline": 2, "context": 2}),
]


def responses():
    return [sample for sample in samples(0) if sample.prompt < len(sample.tokens)]


def own_samples(engine):
    return responses()[engine.data_rank :: engine.data_size]


def gap(engine):
    return engine.routing_gap(own_samples(engine), LENGTH, TEMPERATURE)


def on(folder, layout):
    from alignment.engines.megatron import MegatronEngine, MegatronLayout

    return gap(MegatronEngine(folder, None, MegatronLayout(**layout)))


def thresholds(engine):
    from megatron_ext.moe.router import routers_of

    return [
        (router.thresholds.average.clone(), router.thresholds.updates.clone())
        for router in routers_of(engine._model)
    ]


def gaps_with_flags(folder):
    """Return results of an engine with flags for expert choice, capacity and warm-up.

    The results are the changes of its steps, and its routing when decisions are changed or when
    expert choice is active.
    """
    from alignment.engines.batch import TokenBatch
    from alignment.engines.megatron import MegatronEngine
    from megatron_ext.moe.router import routers_of
    from tests.alignment.engines.engine_runs import OPTIMIZATION, by_token

    flags = ["--router-type", "expert-choice", "--et-warmup-iters", "100", "--et-capacity", "0.5"]
    engine: Any = MegatronEngine(folder, OPTIMIZATION, flags=flags)
    before, first = thresholds(engine), gap(engine)

    # Between the two passes an expert of the last layer shuts: all that it had flips.
    [router] = [r for r in routers_of(engine._model) if r.layer_number == LAST]
    sampler, average = engine._sampler, router.thresholds.average
    retained = average.clone()

    def then_shut(inputs, temperature):
        decoded = type(sampler).decode(sampler, inputs, temperature)
        average[EXPERT] = torch.inf
        return decoded

    sampler.decode = then_shut
    shut = gap(engine)
    del sampler.decode
    average.copy_(retained)

    routers = routers_of(engine._model)
    for router in routers:
        router.freeze(False)
    by_choice = gap(engine)
    for router in routers:
        router.freeze()

    batch = TokenBatch.packed(own_samples(engine), LENGTH)
    for _ in range(3):
        engine.train_step(batch, by_token)
    after = thresholds(engine)
    moved = any(not torch.equal(a, b) for x, y in zip(before, after) for a, b in zip(x, y))
    kept_nothing = all(router.cutoffs is None or router.cutoffs.is_empty for router in routers)
    return first, shut, by_choice, moved, kept_nothing, gap(engine)


def by_torch(folder):
    """Return margins `[layers][tokens, experts]` of the tokens that generation runs."""
    from megatron_ext.hf.remote.modeling_et import ExpertThresholdForCausalLM, Router

    model = ExpertThresholdForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result: list[list[torch.Tensor]] = []
    for router in (m for m in model.modules() if isinstance(m, Router)):
        own: list[torch.Tensor] = []
        result.append(own)
        router.register_forward_hook(
            lambda r, args, _, own=own: own.append(args[0] @ r.weight.T - r.thresholds)
        )
    with torch.no_grad():
        for sample in responses():
            model(input_ids=torch.tensor([sample.tokens[:-1]]), use_cache=False)
    return [torch.cat([rows.view(-1, 4) for rows in own]) for own in result]


@pytest.mark.slow
def test_routing_gap_between_generation_and_training_is_0(tmp_path):
    make_expert_threshold(tmp_path, moe_layers=[1, 1])
    margins = by_torch(tmp_path)
    everything = torch.stack(margins)
    [one] = run_ranks(gaps_with_flags, 1, tmp_path)
    first, shut, by_choice, moved, kept_nothing, last = one
    result = [run_ranks(on, ranks, tmp_path, layout) for ranks, layout in LAYOUTS]
    for figures in [first, *(rank for ranks in result for rank in ranks)]:
        assert figures["routing/decisions"] == everything.numel()
        for name in ("flip_rate", "flip_rate_selected", "tokens_flipped"):
            assert figures[f"routing/{name}"] == 0
        for name in ("logit_gap_max", "log_prob_gap", "log_prob_gap_max"):
            assert figures[f"routing/{name}"] < 1e-4
        ordered = everything.abs().flatten().sort().values
        for name, share in QUANTILES.items():
            value = float(ordered[math.ceil(share * len(ordered)) - 1])
            assert figures[f"routing/margin_{name}"] == pytest.approx(value, abs=1e-4)
    assert all(rank == ranks[0] for ranks in result for rank in ranks)

    selected = margins[LAST - 1][:, EXPERT] > 0
    flips = int(selected.sum())
    assert 0 < flips < len(selected)
    assert shut["routing/flip_rate"] == flips / everything.numel()
    assert shut["routing/flip_rate_selected"] == flips / int((everything > 0).sum())
    assert shut["routing/tokens_flipped"] == flips / len(selected)
    assert shut["routing/log_prob_gap_max"] > 1e-3

    assert by_choice["routing/flip_rate"] > 0.01 and by_choice["routing/log_prob_gap"] > 1e-3
    assert not moved and kept_nothing
    assert last["routing/flip_rate"] == 0
    assert last["routing/margin_50%"] != first["routing/margin_50%"]
