"""Tests of fan-out and loads of a training step, against decisions that are counted one by one."""

import pytest
import torch

from alignment.engines.batch import TokenBatch, TokenSample
from tests.alignment.engines.test_engines import make_expert_threshold
from tests.distributed import run_ranks

LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    (2, {"expert": 2, "micro_batch": 2}),
    (2, {"pipeline": 2}),
]


def step_and_count(model, layout):
    """Return metrics of a step on samples of unequal length, and decisions of each sample."""
    from alignment.engines.megatron import MegatronEngine, MegatronLayout
    from alignment.engines.protocol import Optimization, negative_log_likelihood
    from megatron_ext.moe.record_routing import record_routing
    from megatron_ext.moe.router import routers_of

    engine = MegatronEngine(model, Optimization(lr=1e-4, steps=9), MegatronLayout(**layout))
    samples = [TokenSample([(7 * n + i) % 60 for i in range(3 + n)], 1) for n in range(9)]
    counts: dict[int, torch.Tensor] = {}

    def count(router, logits, maps):
        counts[router.layer_number] = counts.get(router.layer_number, 0) + maps.sum(0).cpu()

    if layout == {}:
        with record_routing(routers_of(engine._model), count):
            for sample in samples:
                engine.log_probs(TokenBatch.of([sample]))
    share = samples[engine.data_rank :: engine.data_size]
    result = engine.train_step(TokenBatch.packed(share, 16), negative_log_likelihood)
    tokens = sum(len(sample.tokens) for sample in samples)
    return result.metrics, tokens, {layer: count.tolist() for layer, count in counts.items()}


@pytest.mark.slow
def test_loads_are_those_of_the_tokens_on_every_layout(tmp_path):
    make_expert_threshold(tmp_path / "model")
    [(metrics, tokens, counts)] = run_ranks(step_and_count, 1, tmp_path / "model", {})
    assert counts
    fan_outs = [sum(load) / tokens for load in counts.values()]
    assert metrics["moe/fan_out"] == pytest.approx(sum(fan_outs) / len(fan_outs))
    largest = max(max(load) * len(load) / sum(load) for load in counts.values())
    assert metrics["moe/largest_load"] == pytest.approx(largest)
    for ranks, layout in LAYOUTS[1:]:
        for other, _, _ in run_ranks(step_and_count, ranks, tmp_path / "model", layout):
            assert other["moe/fan_out"] == pytest.approx(metrics["moe/fan_out"])
            assert other["moe/largest_load"] == pytest.approx(largest)
