"""Core attention through torch's scaled_dot_product_attention, for the local implementation."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class SDPAttention(torch.nn.Module):
    """Causal attention, also of a few new queries against a cache of earlier keys.

    Megatron's local attention writes every score to memory; torch's kernels do not.
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
        if config.context_parallel_size > 1:
            raise ValueError("--context-parallel-size above 1 needs Transformer Engine's attention")
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
        """Attend.

        Args:
            query: `[queries, batch, heads, head_dim]`.
            key: `[keys, batch, kv_heads, head_dim]`; the last key belongs to the last query.
            value: as `key`.
            attention_mask: ignored: attention is causal.

        Returns:
            `[queries, batch, heads * head_dim]`.
        """
        assert packed_seq_params is None and attention_bias is None
        queries, keys = query.shape[0], key.shape[0]
        mask = None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(keys - queries)
        # Tensor-parallel ranks hold other heads and must drop other weights.
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=queries == keys and queries > 1,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )  # [batch, heads, queries, head_dim]
        return context.permute(2, 0, 1, 3).flatten(2)
