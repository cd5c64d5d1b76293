"""Simplified linear layers for inference on one tensor-parallel rank.

Megatron's linear layers pass each product through autograd functions with a backward pass and
collectives. For a few tokens on one rank, these take as long as a small product.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def simplify_linear_layers(module: torch.nn.Module) -> None:
    """Make Megatron's linear layers compute only their product, if this rank has all of it."""
    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear) and _is_whole(layer):
            layer.forward = partial(_product, layer)


def _is_whole(layer: Any) -> bool:
    return layer.tp_group is not None and layer.tp_group.size() == 1


def _product(
    layer: Any,
    inputs: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and the bias if the caller adds it, as Megatron's layers do."""
    weight = layer.weight if weight is None else weight
    if layer.skip_bias_add:
        return F.linear(inputs, weight), layer.bias
    return F.linear(inputs, weight, layer.bias), None
