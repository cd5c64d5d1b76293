"""Positions of a rank's tokens in their sequence."""

import torch
from torch import Tensor


def sequence_positions(length: int, cp_rank: int, cp_size: int, device: torch.device) -> Tensor:
    """Return the positions of a context-parallel rank's `length` tokens, int64 `[length]`.

    Megatron cuts a sequence into `2 * cp_size` chunks and gives rank r the chunks r and
    `2 * cp_size - 1 - r`, which evens out the work of causal attention.
    """
    index = torch.arange(length, device=device)
    if cp_size == 1:
        return index
    half = length // 2
    second = index >= half
    chunk = torch.where(second, 2 * cp_size - 1 - cp_rank, cp_rank)
    return chunk * half + index - half * second
