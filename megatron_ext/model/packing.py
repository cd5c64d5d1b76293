"""Rows packed with several samples: attention within each, positions from 0 in each.

Attention takes the sample of every token as its mask, see `SDPAttention`. The model's rotary
embedding has one table for all rows; here each token takes the entry of its `position_ids`, which
Megatron reads for learned positions only.
"""

from typing import Any

from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor


def rotate_by_position_ids(model: HybridModel) -> None:
    """Rotate queries and keys by the model's argument `position_ids`, int64 `[batch, length]`.

    Positions must be below the length of a row.
    """
    position_ids: list[Tensor] = []  # of the current forward pass

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position_ids[:] = [kwargs["position_ids"] if "position_ids" in kwargs else args[1]]

    def look_up(rotary: Any, args: tuple[Any, ...], table: Tensor) -> Tensor:
        full = rotary.get_emb(args[0])  # [length, 1, 1, dim]; under CP `table` is a part of it
        return full[position_ids[0].T.to(full.device), 0]  # [length, batch, 1, dim]

    model.register_forward_pre_hook(record, with_kwargs=True)
    model.rotary_pos_emb.register_forward_hook(look_up)
