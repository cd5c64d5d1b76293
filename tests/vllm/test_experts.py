"""Sums over experts of variable fan-out, next to one token and one expert at a time."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.vllm.experts import buffer_rows, grouped_experts, loop_over_experts, route
from tests.closeness import rounding

EXPERTS, HIDDEN, INNER = 6, 32, 48

needs_grouped_mm = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="torch 2.9 has no grouped product; that of vLLM is newer"
)


def layer(gated: bool, dtype: torch.dtype, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inner = INNER * (2 if gated else 1)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    up = torch.randn(EXPERTS, inner, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5
    return x.to(dtype), up.to(dtype), down.to(dtype)


def products(weights: Tensor) -> list[Any]:
    """Return the product with the weight of each expert."""
    return [partial(F.linear, weight=weight) for weight in weights]


def one_at_a_time(x, weights, routing_map, up, down, gated):
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token, expert in routing_map.nonzero().tolist():
        inner = up[expert].double() @ x[token].double()
        if gated:
            gate, rest = inner[:INNER], inner[INNER:]
            inner = gate * torch.sigmoid(gate) * rest
        else:
            inner = inner.clamp(min=0) ** 2
        output[token] += weights[token, expert].double() * (down[expert].double() @ inner)
    return output


@pytest.fixture(params=["random", "nothing", "everything", "one expert"])
def routing_map(request):
    places = torch.zeros(40, EXPERTS, dtype=torch.bool)
    if request.param == "random":
        places = torch.rand(40, EXPERTS, generator=torch.Generator().manual_seed(1)) < 0.3
        places[:, 2] = False  # an expert without a token
        places[5] = True  # a token of every expert
    elif request.param == "everything":
        places[:] = True
    elif request.param == "one expert":
        places[:, 3] = True
    return places


@needs_grouped_mm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_both_sums_equal_that_of_one_pair_at_a_time(routing_map, gated, dtype):
    x, up, down = layer(gated, dtype)
    weights = torch.rand(40, EXPERTS, generator=torch.Generator().manual_seed(2))
    expected = one_at_a_time(x, weights, routing_map, up, down, gated)
    scale = expected.abs().max().item()
    for result in (
        loop_over_experts(x, weights, routing_map, products(up), products(down), gated),
        grouped_experts(x, weights, routing_map, up, down, gated, 40 * EXPERTS),
    ):
        assert result.dtype == dtype
        # Every pair rounds its inner values and its result to `dtype`.
        error = (result.double() - expected).abs().max().item()
        assert error <= 8 * torch.finfo(dtype).eps * scale


def pairs_of_mean_two(pairs: int) -> Tensor:
    """Return a routing map of 40 tokens with 80 pairs, four for half of the tokens, and more."""
    routing_map = torch.zeros(40, EXPERTS, dtype=torch.bool)
    routing_map[:20, :4] = True
    routing_map.view(-1)[-pairs:] = True
    return routing_map


def test_buffer_has_space_for_the_cap_and_one_more_token_of_every_expert():
    assert buffer_rows(40, EXPERTS, 2) == 40 * 2 + EXPERTS
    assert buffer_rows(40, EXPERTS, EXPERTS) == 40 * EXPERTS
    assert buffer_rows(1, EXPERTS, 2) == EXPERTS  # one token never exceeds the cap


@needs_grouped_mm
def test_grouped_sum_is_exact_if_the_pairs_just_fit():
    x, up, down = layer(True, torch.float32)
    routing_map, rows = pairs_of_mean_two(EXPERTS), buffer_rows(40, EXPERTS, 2)
    assert routing_map.sum() == rows
    weights = torch.rand(40, EXPERTS)
    expected = loop_over_experts(x, weights, routing_map, products(up), products(down), True)
    result = grouped_experts(x, weights, routing_map, up, down, True, rows)
    torch.testing.assert_close(result, expected, atol=rounding(expected), rtol=0)


def test_grouped_sum_refuses_more_pairs_than_fit():
    x, up, down = layer(True, torch.float32)
    routing_map, rows = pairs_of_mean_two(EXPERTS + 1), buffer_rows(40, EXPERTS, 2)
    with pytest.raises(RuntimeError, match="more experts than the model's max_fan_out allows"):
        grouped_experts(x, torch.rand(40, EXPERTS), routing_map, up, down, True, rows)


def test_sum_of_no_tokens_is_empty():
    x, up, down = layer(True, torch.float32, tokens=0)
    weights, routing_map = torch.empty(0, EXPERTS), torch.empty(0, EXPERTS, dtype=torch.bool)
    result = loop_over_experts(x, weights, routing_map, products(up), products(down), True)
    assert result.shape == (0, HIDDEN)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "relu"])
def test_route_equals_the_router_of_the_hf_model(gate):
    from megatron_ext.hf.remote.configuration_et import ExpertThresholdConfig
    from megatron_ext.hf.remote.modeling_et import Router

    config = ExpertThresholdConfig(hidden_size=HIDDEN, num_experts=EXPERTS, router_gate=gate)
    router = Router(config)
    router.weight.data.normal_()
    router.thresholds.normal_()
    x = F.normalize(torch.randn(40, HIDDEN), dim=-1)
    weights, routing_map = route(x, router.weight, router.thresholds, gate)
    expected_weights, expected_map = router(x)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(routing_map, expected_map)
