"""Halves of a transformer layer that also run with this project's key-value cache."""

from abc import abstractmethod
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ext.inference.cache import RaggedCache


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention; in inference, for tokens of many rows at different positions.

    Megatron's static cache stores keys before rotation, rotates all of them again for each token,
    and requires all rows to be at one position; its dynamic cache needs flash-attn.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; with a `RaggedCache`, `hidden_states` is `[tokens, 1, hidden]`."""
        cache = kwargs.get("inference_context")
        if not isinstance(cache, RaggedCache):
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        table = kwargs.get("rotary_pos_emb")
        rotated = not (self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1])
        if table is not None and rotated:
            rotated_heads = cache.rotate(
                torch.cat((query, key), dim=2),
                table,
                self._yarn_concentration_factor,
                self.config.rotary_interleaved,
            )
            query, key = (
                rotated_heads[:, :, : query.shape[2]],
                rotated_heads[:, :, query.shape[2] :],
            )
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        context = cache.attend(self.layer_number, query, key, value, self.config.softmax_scale)
        return self.linear_proj(context.unsqueeze(1))


class _CachedLayer(TransformerLayer):
    """Half of Megatron's layer, without its overhead in inference.

    What Megatron adds for training (dropout, recomputation, offloading, tensors that are not views)
    takes a third of a millisecond, as long as the matrix products of one token.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; with a `RaggedCache`, `hidden_states` is `[tokens, 1, hidden]`."""
        cache = kwargs.get("inference_context")
        if not isinstance(cache, RaggedCache):
            return super().forward(*args, **kwargs)
        residual = kwargs["hidden_states"]
        output, bias = self._infer(residual, cache, kwargs.get("rotary_pos_emb"))
        if self.config.fp32_residual_connection:
            residual = residual.float()
        return residual + (output if bias is None else output + bias), None

    @abstractmethod
    def _infer(self, hidden: Tensor, cache: RaggedCache, rotary: Tensor | None) -> Any:
        """Return the output that is added to `hidden`, and its bias or None."""


class AttentionLayer(_CachedLayer):
    """Attention half of a transformer layer."""

    def _infer(self, hidden: Tensor, cache: RaggedCache, rotary: Tensor | None) -> Any:
        return self.self_attention(
            self.input_layernorm(hidden), inference_context=cache, rotary_pos_emb=rotary
        )


class FeedForwardLayer(_CachedLayer):
    """Half of a transformer layer that has an MLP or experts."""

    def _infer(self, hidden: Tensor, cache: RaggedCache, rotary: Tensor | None) -> Any:
        return self.mlp(self.pre_mlp_layernorm(hidden))
