"""Floating-point operations of training, by Megatron's formulas."""

import copy
from argparse import Namespace

from megatron.training.training import num_floating_point_operations

from megatron_ext.model.identity import setting_value
from megatron_ext.moe.registry import router_type


def training_flops(args: Namespace, sequences: int) -> float:
    """Return the operations of a step, forward and backward.

    Megatron's formula of GPT models counts Gated DeltaNet layers, but no Mamba layers; that of
    hybrid models takes the layers from a pattern, in which they have a symbol. Both take the mean
    fan-out of thresholds as the number of experts of a token.

    Args:
        args: Arguments after Megatron's validation.
        sequences: Sequences of the step on all ranks.
    """
    args = copy.copy(args)
    if args.num_experts and router_type(args.router_type).uses_thresholds:
        args.moe_router_topk = float(setting_value(args, "et_mean_experts"))
    mamba = setting_value(args, "mamba_layers")
    if any(mamba):
        linear = setting_value(args, "linear_attention_freq")
        experts = setting_value(args, "moe_layer_freq") if args.num_experts else [0] * len(mamba)
        pairs = [
            ("M" if mamba else "G" if linear else "*") + ("E" if moe else "-")
            for mamba, linear, moe in zip(mamba, linear, experts, strict=True)
        ]
        depths = [f"/{pairs[-1]}"] * (args.mtp_num_layers or 0)
        args.hybrid_layer_pattern = "".join(pairs + depths)
    return float(num_floating_point_operations(args, sequences))
