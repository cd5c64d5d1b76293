"""Squared ReLU with few passes over memory."""

from typing import Any

import torch
from torch import Tensor

# Number of elements that stay in a core's cache between two operations on them.
_BLOCK = 1 << 16


class _SquaredReLU(torch.autograd.Function):
    """relu(x)², block by block on the CPU.

    On a CPU, elementwise operations on large tensors take as long as moving them between memory and
    cache. Written as `relu(x) ** 2`, autograd moves about five times as much: the ReLU, its first
    power, twice that, and the gradient of each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        for part, out in zip(_blocks(x), _blocks(y)):
            torch.clamp_min(part, 0, out=out)
            out.mul_(out)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        dx = torch.empty_like(x)
        for part, g, out in zip(_blocks(x), _blocks(grad), _blocks(dx)):
            torch.clamp_min(part, 0, out=out)
            out.mul_(g).mul_(2)
        return dx


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    flat = x.view(-1)
    return flat.split(_BLOCK) if x.is_cpu else (flat,)


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)² of any shape.

    Values and gradients are those of `F.relu(x).pow(2)` in every bit.
    """
    if not torch.is_grad_enabled() and x.numel() <= _BLOCK:
        # A token at a time, as in generation, the function itself takes longer than its operations.
        y = x.clamp_min(0)
        return y.mul_(y)
    return _SquaredReLU.apply(x)
