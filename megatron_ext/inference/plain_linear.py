"""Linear layers without what only training or several tensor-parallel ranks need.

Megatron's pass each product through autograd functions that hold its backward pass and collectives.
For a few tokens on one rank these take as long as a small product.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def simplify_linear_layers(module: torch.nn.Module) -> None:
    """Let Megatron's own linear layers that are whole on this rank compute their product only."""
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
    """Output, and the bias where the caller adds it, as Megatron's layers return them."""
    weight = layer.weight if weight is None else weight
    if layer.skip_bias_add:
        return F.linear(inputs, weight), layer.bias
    return F.linear(inputs, weight, layer.bias), None
