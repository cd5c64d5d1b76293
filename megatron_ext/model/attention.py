"""Core attention through torch's scaled_dot_product_attention, for the local implementation."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ext.sequence import sequence_positions


class SDPAttention(torch.nn.Module):
    """Causal attention, also of a few new queries against a cache of earlier keys.

    Megatron's local attention writes every score to memory; torch's kernels do not. Under context
    parallelism, which Megatron's refuses, each rank gathers the keys and values of the others.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self.cp_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return the attention output of queries over keys and values.

        Args:
            query: `[queries, batch, heads, head_dim]`.
            key: `[keys, batch, kv_heads, head_dim]`; the last key belongs to the last query.
            value: Like `key`.
            attention_mask: int64 `[batch, length]`, the sample of every token of the whole rows,
                to which its attention is limited; None for one sample per row. Causal in any case.
            attn_mask_type: Not used; the attention is causal.
            attention_bias: Not supported, must be None.
            packed_seq_params: Not supported, must be None.

        Returns:
            `[queries, batch, heads * head_dim]`.
        """
        assert packed_seq_params is None and attention_bias is None
        queries, keys = query.shape[0], key.shape[0]
        mask = None
        if self.cp_group.size() > 1:
            assert queries == keys, "no cache under context parallelism"
            key, value, mask = self._gather(key, value, attention_mask)
        elif attention_mask is not None:
            assert queries == keys, "no cache with several samples per row"
            positions = torch.arange(keys, device=query.device)
            causal = positions.unsqueeze(1) >= positions
            mask = _within_samples(causal, attention_mask, positions, positions)
        elif 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(keys - queries)
        # Tensor-parallel ranks have different heads and must drop different weights.
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and queries > 1,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )  # [batch, heads, queries, head_dim]
        return context.permute(2, 0, 1, 3).flatten(2)

    def _gather(
        self, key: Tensor, value: Tensor, samples: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gather the keys and values of all context-parallel ranks, and build the mask.

        Returns:
            Keys and values `[ranks * keys, batch, kv_heads, head_dim]`, in the order of the ranks,
            and the mask of what a query attends to, bool `[queries, ranks * keys]` or `[batch, 1,
            queries, ranks * keys]`.
        """
        size, rank, length = self.cp_group.size(), self.cp_group.rank(), key.shape[0]
        positions = [sequence_positions(length, r, size, key.device) for r in range(size)]
        query_positions, key_positions = positions[rank], torch.cat(positions)
        mask = query_positions.unsqueeze(1) >= key_positions
        if samples is not None:
            mask = _within_samples(mask, samples, query_positions, key_positions)
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
            for x in (key, value)
        )
        return key, value, mask


def _within_samples(mask: Tensor, samples: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Limit a causal mask to pairs within one sample.

    Args:
        mask: bool `[queries, keys]`.
        samples: int64 `[batch, length]`, the sample of every token.
        queries: int64 `[queries]`, positions of the queries in the row.
        keys: int64 `[keys]`, positions of the keys in the row.

    Returns:
        bool `[batch, 1, queries, keys]`.
    """
    same_sample = samples[:, queries].unsqueeze(2) == samples[:, keys].unsqueeze(1)
    return torch.logical_and(mask, same_sample).unsqueeze(1)
