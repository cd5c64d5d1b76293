"""Tests that an expert's share of a pool is at least one token."""

from argparse import Namespace
from fractions import Fraction
from types import SimpleNamespace

import pytest

from megatron_ext.errors import UserError
from megatron_ext.moe.registry import ROUTERS
from megatron_ext.moe.thresholds import RoutingRate
from megatron_ext.training.input_checks import check_pools


def test_expert_choice_runs_with_ranks_without_tokens() -> None:
    """64 experts, top 1: 32 tokens on each of 8 ranks are 4 for an expert, but none on a rank."""
    args = Namespace(
        micro_batch_size=1, seq_length=32, context_parallel_size=1, data_parallel_size=8,
        tensor_model_parallel_size=1, global_batch_size=8,
    )  # fmt: skip
    config = SimpleNamespace(
        routing_rate=RoutingRate(Fraction(1, 64), Fraction(1, 2)), et_cutoff_pool="microbatch",
        et_capacity=0.5, et_capacity_pool="rank", num_moe_experts=64,
        router=ROUTERS["expert-choice"],
    )  # fmt: skip
    check_pools(args, config)  # type: ignore[arg-type]
    config.router = ROUTERS["expert-threshold"]
    with pytest.raises(UserError, match="less than one of a rank's 32"):
        check_pools(args, config)  # type: ignore[arg-type]
    args.data_parallel_size = 1
    config.router = ROUTERS["expert-choice"]
    with pytest.raises(UserError, match="less than one of the 32 in a micro-batch"):
        check_pools(args, config)  # type: ignore[arg-type]
